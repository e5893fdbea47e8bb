"""The product of int8 codes, added up in int32: the same integers on every device, by the kernel that is fast there.

CPUs with AVX-512 VNNI multiply unsigned bytes by signed ones. XLA hands int8 products to YNNPACK, whose kernels for
those (jaxlib 0.10.2) are 2.6 times as fast as the ones for signed bytes alone. So there the left operand is shifted:

    sum_k a_k b_k = sum_k (a_k + 128) b_k - 128 sum_k b_k

exactly, also where an int32 sum wraps around on the way.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import batching, mlir
from jaxtyping import Array, Int8, Int32, UInt8

from picogpt_jax.cpu import wants_unsigned_int8
from picogpt_jax.products import Dimensions
from picogpt_jax.sharding import splits

SHIFT = 128


def int8_dot_general(lhs: Int8[Array, "..."], rhs: Int8[Array, "..."], dimensions: Dimensions) -> Int32[Array, "..."]:
    """`lax.dot_general` of int8 operands with int32 sums; it has no gradient.

    Args:
        lhs: [..., rows, K], with its last dimension contracted and no batch dimensions; others are as fast as in XLA.
        rhs: [..., K] or [K, ...].
    """

    def plain(lhs: Array, rhs: Array) -> Array:
        return lax.dot_general(lhs, rhs, dimensions, preferred_element_type=jnp.int32)

    (lhs_contracted, rhs_contracted), (batch, _) = dimensions
    are_rows = lhs.ndim > 1 and tuple(lhs_contracted) == (lhs.ndim - 1,) and not batch
    # For weights that are split over devices, the sums over them could be one more collective, which processes on other
    # processors would not take part in.
    if not are_rows or splits("embed") or splits("mlp") or not wants_unsigned_int8():
        return plain(lhs, rhs)
    return lax.platform_dependent(
        lhs, rhs, cpu=functools.partial(_shifted, contracted=rhs_contracted[0]), default=plain
    )


def _shifted(lhs: Int8[Array, "... M K"], rhs: Int8[Array, "..."], contracted: int) -> Int32[Array, "..."]:
    rows, rows_dim = lhs.shape[-2], lhs.ndim - 2
    unsigned = lax.bitcast_convert_type(lhs, jnp.uint8) ^ jnp.uint8(SHIFT)
    # A single row, which may be a device's share of a few, XLA computes without the kernel, by an int32 copy of `rhs`.
    if lhs.size // lhs.shape[-1] < 2 * jax.local_device_count():
        unsigned = jnp.concatenate([unsigned, unsigned], rows_dim)
    product = lax.slice_in_dim(_mixed_dot(unsigned, rhs, contracted), 0, rows, axis=rows_dim)
    surplus = _mixed_dot(jnp.full((2, lhs.shape[-1]), SHIFT, jnp.uint8), rhs, contracted)[0]
    return product - jnp.expand_dims(surplus, range(rows_dim + 1))


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _mixed_dot(lhs: UInt8[Array, "... M K"], rhs: Int8[Array, "..."], contracted: int) -> Int32[Array, "..."]:
    """uint8 times int8; `lax.dot_general` would convert both to int32 first."""
    return _mixed_dot_p.bind(lhs, rhs, contracted=contracted)


_mixed_dot_p = Primitive("mixed_dot")


@_mixed_dot_p.def_abstract_eval
def _(lhs: ShapedArray, rhs: ShapedArray, *, contracted: int) -> ShapedArray:
    return ShapedArray((*lhs.shape[:-1], *rhs.shape[:contracted], *rhs.shape[contracted + 1 :]), jnp.dtype(jnp.int32))


def _lower(context: Any, lhs: Any, rhs: Any, *, contracted: int) -> list[Any]:
    (result,) = (mlir.aval_to_ir_type(context.module_context, aval) for aval in context.avals_out)
    numbers = stablehlo.DotDimensionNumbers.get([], [], [context.avals_in[0].ndim - 1], [contracted])
    return [stablehlo.dot_general(result, lhs, rhs, numbers)]


def _batch(operands: tuple[Array, Array], axes: tuple[int | None, int | None], *, contracted: int) -> tuple[Array, int]:
    def product(lhs: Array, rhs: Array) -> Array:
        return jnp.tensordot(lhs.astype(jnp.int32), rhs.astype(jnp.int32), ((lhs.ndim - 1,), (contracted,)))

    return jax.vmap(product, axes)(*operands), 0


mlir.register_lowering(_mixed_dot_p, _lower)
batching.primitive_batchers[_mixed_dot_p] = _batch
