"""The product of int8 codes, added up in int32: the same integers on every device, by the kernel that is fast there.

XLA hands int8 products to YNNPACK, whose kernels for unsigned times signed bytes are more than twice as fast on CPUs
with AVX-512 VNNI (jaxlib 0.10.2). So there the left operand is shifted, which is exact, also where a sum wraps around:

    sum_k a_k b_k = sum_k (a_k + 128) b_k - 128 sum_k b_k
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import batching, mlir
from jaxtyping import Array, Int8, Int32, UInt8

from picogpt_jax.devices.cpu import wants_unsigned_int8
from picogpt_jax.devices.sharding import batch_shares, splits_weights
from picogpt_jax.kernels.products import Dimensions

SHIFT = 128


def int8_dot_general(lhs: Int8[Array, "..."], rhs: Int8[Array, "..."], dimensions: Dimensions) -> Int32[Array, "..."]:
    """`lax.dot_general` of int8 operands with int32 sums; it has no gradient.

    Args:
        lhs: [..., rows, K], with its last dimension contracted and no batch dimensions; others are as fast as in XLA.
        rhs: [..., K] or [K, ...].
    """
    (lhs_contracted, rhs_contracted), (batch, _) = dimensions
    are_rows = lhs.ndim > 1 and tuple(lhs_contracted) == (lhs.ndim - 1,) and not batch
    # For weights that are split over devices, the sums over them could be one more collective, which processes on other
    # processors would not take part in.
    if are_rows and wants_unsigned_int8() and not splits_weights():
        is_single = math.prod(lhs.shape[:-1]) == batch_shares()
        return _int8_dot(lhs, rhs, contracted=rhs_contracted[0], is_single=is_single)
    return lax.dot_general(lhs, rhs, dimensions, preferred_element_type=jnp.int32)


@functools.partial(jax.jit, static_argnames=("contracted", "is_single"), inline=True)
def _int8_dot(
    lhs: Int8[Array, "... M K"], rhs: Int8[Array, "..."], contracted: int, is_single: bool
) -> Int32[Array, "..."]:
    """Contracts the last dimension of `lhs` with dimension `contracted` of `rhs`; by the platform's kernel.

    Args:
        is_single: each device has one row of `lhs`.
    """
    return _int8_dot_p.bind(lhs, rhs, contracted=contracted, is_single=is_single)


def _plain(lhs: Array, rhs: Array, contracted: int, is_single: bool) -> Array:
    del is_single
    dimensions = (((lhs.ndim - 1,), (contracted,)), ((), ()))
    return lax.dot_general(lhs, rhs, dimensions, preferred_element_type=jnp.int32)


def _shifted(lhs: Array, rhs: Array, contracted: int, is_single: bool) -> Array:
    unsigned = lax.bitcast_convert_type(lhs, jnp.uint8) ^ jnp.uint8(SHIFT)
    if is_single:
        # XLA computes one row without the kernel, by an int32 copy of `rhs`; here it has company.
        pair = _mixed_dot(jnp.stack([unsigned, jnp.full_like(unsigned, SHIFT)], -2), rhs, contracted)
        product, surplus = (lax.index_in_dim(pair, index, lhs.ndim - 1, keepdims=False) for index in (0, 1))
        return product - surplus
    surplus = _mixed_dot(jnp.full((2, lhs.shape[-1]), SHIFT, jnp.uint8), rhs, contracted)[0]
    return _mixed_dot(unsigned, rhs, contracted) - jnp.expand_dims(surplus, range(lhs.ndim - 1))


def _mixed_dot(lhs: UInt8[Array, "... M K"], rhs: Int8[Array, "..."], contracted: int) -> Int32[Array, "..."]:
    """uint8 times int8; `lax.dot_general` would convert both to int32 first."""
    return _mixed_dot_p.bind(lhs, rhs, contracted=contracted)


def _result(lhs: ShapedArray, rhs: ShapedArray, *, contracted: int, **_: bool) -> ShapedArray:
    return ShapedArray((*lhs.shape[:-1], *rhs.shape[:contracted], *rhs.shape[contracted + 1 :]), jnp.dtype(jnp.int32))


def _lower_mixed_dot(context: Any, lhs: Any, rhs: Any, *, contracted: int) -> list[Any]:
    (result,) = (mlir.aval_to_ir_type(context.module_context, aval) for aval in context.avals_out)
    numbers = stablehlo.DotDimensionNumbers.get([], [], [context.avals_in[0].ndim - 1], [contracted])
    return [stablehlo.dot_general(result, lhs, rhs, numbers)]


def _batch(
    operands: tuple[Array, Array], axes: tuple[int | None, int | None], *, contracted: int, is_single: bool
) -> tuple[Array, int]:
    lhs, rhs = operands
    if axes[1] is None:  # more rows
        return _int8_dot(jnp.moveaxis(lhs, axes[0] or 0, 0), rhs, contracted, is_single=False), 0
    return jax.vmap(functools.partial(_plain, contracted=contracted, is_single=is_single), axes)(lhs, rhs), 0


_int8_dot_p, _mixed_dot_p = Primitive("int8_dot"), Primitive("mixed_dot")
_int8_dot_p.def_abstract_eval(_result)
_mixed_dot_p.def_abstract_eval(_result)
mlir.register_lowering(_int8_dot_p, mlir.lower_fun(_plain, multiple_results=False))
mlir.register_lowering(_int8_dot_p, mlir.lower_fun(_shifted, multiple_results=False), platform="cpu")
mlir.register_lowering(_mixed_dot_p, _lower_mixed_dot)
batching.primitive_batchers[_int8_dot_p] = _batch
