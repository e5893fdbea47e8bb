"""Causal attention in integer arithmetic by one kernel for GPUs and TPUs, which never stores the scores [T, T].

A program of the kernel computes a block of queries: it goes over the keys up to them three times. What a pass needs of
a row is known after the one before: its largest score; the sum of its weights, and their common exponent; then the
weights themselves, which multiply the values. On a TPU a program keeps its rows on the chip from one pass to the next.
On a GPU there is no room for them: each pass multiplies the scores anew, int8 times int8.

The integers are those of `model.integer.attention`, where "Version 2" of `picogpt_jax/int8/README.md` is spelled out.
Between the products they stand in float32 here, which holds them exactly: all that count are within 2^24. A shift is
a product with a power of two and a floor, and the length of a number in bits is its exponent.

Shapes: B batch, H heads, T time, D head size; N queries of a program, M keys of a step.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Int8

from picogpt_jax.config import AttentionForm
from picogpt_jax.kernels.fused_attention import LANES, on_each_device

NAME = "integer_attention_{}x"  # so many products of a block of queries with one of keys or values
GPU_BLOCK = 64  # positions: the rows of a tensor core's instruction
SMALLEST_HEAD = 32  # features that a tensor core's int8 instruction multiplies
UNSEEN = -(2.0**25)  # below every score, by more than the largest difference that counts

Operand = tuple[Int8[Array, "B H T D"], Int[Array, "B H T 1"]]


def attention(
    form: AttentionForm, q: Operand, k: Operand, v: Operand, weight_bits: int, interpret: bool = False
) -> Float[Array, "B H T D"]:
    """What `model.integer.attention` returns first, of whole sequences, without dropout.

    Args:
        form: "cudnn": a kernel for a GPU; "splash": for a TPU.
        q, k, v: codes and exponents, of heads up to `fused_attention.LARGEST_HEAD`.
        weight_bits: of an attention weight.
        interpret: compute the kernel by an interpreter, on any device (for tests).
    """
    cap = largest_exponent(q[0].shape[3])
    # A score has 8 fraction bits, 4 of them from each side.
    q_scale, k_scale = (_power(jnp.minimum(exponent.astype(jnp.int32) + 4, cap)).mT for _, exponent in (q, k))
    v_scale = _power(v[1].astype(jnp.int32)).mT
    call = functools.partial(_call, form=form, weight_bits=weight_bits, interpret=interpret)
    return on_each_device(call, q[0], k[0], v[0], q_scale, k_scale, v_scale)


def largest_exponent(head_size: int) -> int:
    """Of a query or a key, with its 4 fraction bits: scores are within 2^24 then."""
    return (24 - (127 * 127 * head_size).bit_length()) >> 1


def exponential(d: Int[Array, "..."]) -> Int[Array, "..."]:
    """2^-d with 12 fraction bits, of d with 8 and up to 15: a parabola and a shift."""
    f = d & 255
    return (4096 - ((f * (2753 - ((705 * f) >> 8))) >> 8)) >> (d >> 8)


def _power(exponent: Array) -> Array:
    """2^exponent, exactly."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _exponent(x: Array) -> Array:
    """Of the power of two at or below x > 0."""
    return (lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def _call(*operands: Array, form: AttentionForm, weight_bits: int, interpret: bool) -> Float[Array, "B H T D"]:
    batch, heads, time, size = operands[0].shape
    from jax.experimental.pallas import tpu, triton

    params: Any
    if form == "cudnn":
        block, features, params = GPU_BLOCK, max(1 << (size - 1).bit_length(), SMALLEST_HEAD), triton.CompilerParams()
    else:
        block, features, params = LANES, size, tpu.CompilerParams()
    # Whole blocks: of what is added, no query sees the keys, and the rows are cut off. Triton wants powers of two.
    rest = -time % block
    codes = (jnp.pad(x, ((0, 0), (0, 0), (0, rest), (0, features - size))) for x in operands[:3])
    scales = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, rest))) for x in operands[3:])
    length = time + rest
    rows_of_scores = [tpu.VMEM((block, length), jnp.float32)] if form == "splash" else []
    products = (1 if rows_of_scores else 3) + (1 if weight_bits < 8 else 2)
    rows = pl.BlockSpec((None, None, block, features), lambda b, h, i: (b, h, i, 0))
    whole = pl.BlockSpec((None, None, length, features), lambda b, h, i: (b, h, 0, 0))
    row_scale = pl.BlockSpec((None, None, 1, block), lambda b, h, i: (b, h, 0, i))
    whole_scale = pl.BlockSpec((None, None, 1, length), lambda b, h, i: (b, h, 0, 0))
    y_BHTD = pl.pallas_call(
        functools.partial(_kernel, weight_bits=weight_bits),
        grid=(batch, heads, length // block),
        in_specs=[rows, whole, whole, row_scale, whole_scale, whole_scale],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct((batch, heads, length, features), jnp.float32),
        scratch_shapes=rows_of_scores,
        compiler_params=params,
        interpret=interpret,
        name=NAME.format(products),
    )(*codes, *scales)
    return y_BHTD[:, :, :time, :size]


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    q_scale_ref: Any,
    k_scale_ref: Any,
    v_scale_ref: Any,
    y_ref: Any,
    *kept_refs: Any,
    weight_bits: int,
) -> None:
    block, size = q_ref.shape
    own = pl.program_id(2)
    q_ND = q_ref[...]
    q_scale_N1 = q_scale_ref[...].T
    row_NM, column_NM = (lax.broadcasted_iota(jnp.int32, (block, block), dim) for dim in (0, 1))

    def keys(step: Any) -> Any:
        return pl.ds(pl.multiple_of(step * block, block), block)

    def logarithms(step: Any) -> Array:
        """The scores with 8 fraction bits."""
        sums_NM = _product(q_ND, k_ref[keys(step), :], 1).astype(jnp.float32)
        z_NM = jnp.floor(sums_NM * q_scale_N1 * k_scale_ref[:, keys(step)] + 0.5)
        return jnp.where((column_NM <= row_NM) | (step < own), z_NM, UNSEEN)

    def keep(step: Any, x_NM: Array) -> None:
        for kept_ref in kept_refs:
            kept_ref[:, keys(step)] = x_NM

    def kept(step: Any, compute: Any) -> Array:
        """What the pass before has kept, or computed again."""
        return kept_refs[0][:, keys(step)] if kept_refs else compute(step)

    def over_keys(body: Any, *first: Any) -> Any:
        return lax.fori_loop(0, own + 1, body, first)

    def constant(value: float) -> Array:
        return jnp.full((block, block), value, jnp.float32)

    def largest_score(step: Any, carry: Any) -> Any:
        z_NM = logarithms(step)
        keep(step, z_NM)
        return (jnp.maximum(carry[0], z_NM),)

    (z_NM,) = over_keys(largest_score, constant(UNSEEN))
    top_z_N1 = z_NM.max(1, keepdims=True)

    def exponentials(step: Any) -> Array:
        d = jnp.minimum(top_z_N1 - kept(step, logarithms), 15 * 256).astype(jnp.int32)
        return exponential(d).astype(jnp.float32)

    def sum_and_largest(step: Any, carry: Any) -> Any:
        p_NM = exponentials(step)
        keep(step, p_NM)
        return carry[0] + p_NM, jnp.maximum(carry[1], p_NM * v_scale_ref[:, keys(step)])

    den_NM, largest_NM = over_keys(sum_and_largest, constant(0), constant(0))
    top_N1 = _exponent(largest_NM.max(1, keepdims=True)) + 1 - weight_bits
    w_scale_N1 = _power(-top_N1)

    def weighted(step: Any, carry: Any) -> Any:
        w_NM = jnp.floor(kept(step, exponentials) * v_scale_ref[:, keys(step)] * w_scale_N1 + 0.5)
        w_NM = jnp.minimum(w_NM, 2**weight_bits - 1).astype(jnp.int32)
        v_MD = v_ref[keys(step), :]
        if weight_bits < 8:
            return (carry[0] + _product(w_NM.astype(jnp.int8), v_MD, 0),)
        # A byte as a signed one: sum w v = sum (w - 128) v - sum (-128) v.
        surplus_ND = _product(jnp.full((block, block), -128, jnp.int8), v_MD, 0)
        return (carry[0] + _product((w_NM - 128).astype(jnp.int8), v_MD, 0) - surplus_ND,)

    (o_ND,) = over_keys(weighted, jnp.zeros((block, size), jnp.int32))
    y_ref[...] = _divided(o_ND.astype(jnp.float32), den_NM.sum(1, keepdims=True), top_N1)


def _divided(o_ND: Array, den_N1: Array, top_N1: Array) -> Array:
    """By the sum of the weights."""
    n_N1 = jnp.maximum(_exponent(jnp.abs(o_ND).max(1, keepdims=True)) + 1 - 15, 0)
    dt_N1 = _exponent(den_N1) + 1 - 8
    narrow_N1 = (den_N1.astype(jnp.int32) + (1 << (dt_N1 - 1))) >> dt_N1  # beyond 2^24 with the half
    r_N1 = lax.div((1 << 15) + (narrow_N1 >> 1), narrow_N1).astype(jnp.float32)
    u_ND = jnp.floor(o_ND * _power(-n_N1) + 0.5) * r_N1
    return u_ND * _power(top_N1 + n_N1 - 15 - dt_N1)


def _product(lhs: Int8[Array, "N K"], rhs: Int8[Array, "..."], contracted: int) -> Array:
    return lax.dot_general(lhs, rhs, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.int32)
