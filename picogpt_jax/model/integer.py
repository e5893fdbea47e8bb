"""Integer arithmetic: every step between token ids and logits as a function of integers (`quant.arithmetic=integer`).

Why.  Integers add up the same in any order: on any device, over any mesh, in any batch. So training, serving and every
other runtime compute the same bits, and a device without a float unit can run the model.

What.  The formulas, bounds and constants are "Version 2" of `picogpt_jax/int8/README.md`; the names here are its.
In short: a scale is a power of two, so quantizing a vector is a rounding shift that leaves 7 bits and a sign. A linear
layer adds up int8 products in int32 and shifts the sum to fixed point. LayerNorm subtracts an integer mean and
multiplies by a short reciprocal of the standard deviation. Attention takes int8 queries, keys and values; 2^-x is a
parabola and a shift; the weights of the values are unsigned bytes. GELU is a polynomial. All but sums is within 2^24.

How it is carried.  Between the layers a value is a float32 number that holds an integer times a power of two, exactly.
So these functions stand where the float ones stand, and everything around them (dropout, remat, scan, meshes) is the
same code. `carry` gives the integer function's value and the float function's gradient: the float function's own value
is not needed then, and the compiler leaves it out.

Shapes: B batch, T time (query), S time (key), C width, H heads, D head size, I inputs, O outputs.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8, Int32

from picogpt_jax.config import Granularity
from picogpt_jax.devices import sharding
from picogpt_jax.kernels.int8_product import int8_dot_general
from picogpt_jax.kernels.integer_attention import exponential, largest_exponent

LIMIT = 1 << 22  # of a fixed-point value
LARGEST = (1 << 23) - 1  # of the residual stream
RESIDUAL_BITS = LOGIT_BITS = 10
HEAD_BITS = NORM_BITS = 12
HIDDEN_BITS = {"relu": 10, "gelu": 8, "gelu_tanh": 8}
EXPONENTS = (-24, 15)  # of a stored scale
NO_EXPONENT = -100  # below every other


@jax.custom_vjp
def carry(value: Float[Array, "..."], source: Float[Array, "..."]) -> Float[Array, "..."]:
    """`value`; the gradient goes to `source` alone."""
    return value


carry.defvjp(
    lambda value, source: (value, jnp.zeros((), source.dtype)),
    lambda like, gradient: (jnp.zeros_like(gradient), gradient.astype(like.dtype)),
)


def written(x: Array) -> Array:
    """`x`, on a CPU computed once: else the compiler computes it anew in each of the loops that read it.

    GPUs and TPUs rather compute it again from the int32 sums than read and write it in memory.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def power(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """2^exponent in float32, exactly, for -126 to 127."""
    return lax.bitcast_convert_type((exponent.astype(jnp.int32) + 127) << 23, jnp.float32)


def exponent_of(scale: Float[Array, "..."]) -> Int32[Array, "..."]:
    """The inverse of `power`; of other numbers, the exponent of the power of two below."""
    return (lax.bitcast_convert_type(scale, jnp.int32) >> 23) - 127


def bits(a: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """The length of a number that is not negative in bits."""
    return 32 - lax.clz(a)


def shift(x: Int32[Array, "..."], s: Int32[Array, "..."] | int) -> Int32[Array, "..."]:
    """round(x / 2^s), halves up, for s up to 31; where s is negative, x * 2^-s."""
    s = jnp.asarray(s, jnp.int32)
    right = jnp.maximum(s, 0)
    # Without `where`: JAX would move an array of its zeros out of a scan over layers, and each layer would read it.
    half = lax.shift_right_logical(jnp.int32(1) << right, jnp.ones_like(right))
    return ((x + half) >> right) << jnp.maximum(-s, 0)


def fixed(x: Float[Array, "..."], fraction_bits: int) -> Int32[Array, "..."]:
    """The integer that `x` carries; what is between two of them is rounded."""
    return jnp.rint(x * 2.0**fraction_bits).astype(jnp.int32)


def floating(x: Int32[Array, "..."], fraction_bits: int) -> Float[Array, "..."]:
    """The inverse of `fixed`."""
    return x.astype(jnp.float32) * 2.0**-fraction_bits


def fitting_exponent(x: Float[Array, "..."], dims: int | tuple[int, ...]) -> Int32[Array, "..."]:
    """The smallest exponent with |x| * 2^-exponent rounded to 127 at most; the dimensions `dims` become 1."""
    pattern = lax.bitcast_convert_type(jnp.abs(x).max(dims, keepdims=True), jnp.int32)
    # A fraction of 255/256 or more would be rounded to 128.
    return (pattern >> 23) - 127 - 6 + ((pattern & 0x7FFFFF) >= 0x7F0000)


def quantize(x: Float[Array, "... I"], fraction_bits: int = 64) -> tuple[Int8[Array, "... I"], Int32[Array, "... 1"]]:
    """Codes and exponents of vectors that carry integers.

    Args:
        fraction_bits: of `x`, below which no exponent goes. Without it small integers are multiplied before they are
            codes, which changes no product.
    """
    exponent = jnp.maximum(fitting_exponent(x, x.ndim - 1), -fraction_bits)
    return jnp.floor(x * power(-exponent) + 0.5).astype(jnp.int8), exponent


def quantize_weight(
    weight: Float[Array, "..."], in_dim: int, granularity: Granularity
) -> tuple[Int8[Array, "..."], Int32[Array, "..."]]:
    """Codes and exponents, one a channel, or one in all; `in_dim` is the dimension that is contracted."""
    dims = in_dim if granularity == "per_channel" else tuple(range(weight.ndim))
    exponent = jnp.clip(fitting_exponent(weight, dims), *EXPONENTS)
    return jnp.clip(jnp.rint(weight * power(-exponent)), -127, 127).astype(jnp.int8), exponent


def linear(
    x: Float[Array, "... I"],
    codes: Int8[Array, "..."],
    exponent: Int32[Array, "..."],
    in_dim: int,
    bias: Float[Array, "*O"] | None,
    input_bits: int,
    output_bits: int,
) -> Float[Array, "..."]:
    """A linear layer, whose input is quantized here.

    Args:
        codes: the weight; its dimension `in_dim` is contracted.
        exponent: broadcasts against the codes.
        input_bits: see `quantize`.
        output_bits: fraction bits of the result.
    """
    x_codes, x_exponent = quantize(x, input_bits)
    acc = int8_dot_general(x_codes, codes, (((x.ndim - 1,), (in_dim,)), ((), ())))
    exponent_O = jnp.broadcast_to(exponent, (*codes.shape[:in_dim], 1, *codes.shape[in_dim + 1 :])).squeeze(in_dim)
    exponent_NO = lax.expand_dims(exponent_O, range(x.ndim - 1))
    x_exponent = x_exponent.reshape(*x.shape[:-1], *(1,) * exponent_O.ndim)
    s = jnp.clip(-(x_exponent + exponent_NO + output_bits), -22, 31)
    bound = LIMIT >> jnp.maximum(-s, 0)
    y = jnp.where(s < 0, jnp.clip(acc, -bound, bound), acc)
    y = written(floating(jnp.clip(shift(y, s), -LIMIT, LIMIT), output_bits))
    if bias is None:
        return y
    bias_O = floating(jnp.clip(fixed(bias, output_bits), -LIMIT, LIMIT), output_bits)
    return y + lax.expand_dims(bias_O, range(y.ndim - bias_O.ndim))


def lookup(codes: Int8[Array, "... C"], exponent: Int32[Array, "... 1"]) -> Float[Array, "... C"]:
    """Rows of an embedding table, with the fraction bits of the residual stream."""
    rows = jnp.floor(codes.astype(jnp.float32) * power(exponent + RESIDUAL_BITS) + 0.5)
    return jnp.clip(rows, -LIMIT, LIMIT) * 2.0**-RESIDUAL_BITS


def add(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """x + y on the residual stream; what dropout has multiplied is rounded."""
    total = jnp.clip(fixed(x, RESIDUAL_BITS) + fixed(y, RESIDUAL_BITS), -LARGEST, LARGEST)
    return written(floating(total, RESIDUAL_BITS))


def isqrt(n: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """The integer square root of n <= 2^24, also where the device's square root is not exact."""
    q = jnp.sqrt(n.astype(jnp.float32)).astype(jnp.int32)
    q = q - (q * q > n)
    return q + ((q + 1) * (q + 1) <= n)


def norm(
    x: Float[Array, "... C"], weight: Float[Array, " C"], bias: Float[Array, " C"] | None
) -> Float[Array, "... C"]:
    """LayerNorm: codes times a power of two, of a residual stream."""
    width = x.shape[-1]
    v = 5 if width <= 1024 else 6 if width <= 4096 else 7
    k = (40 - width.bit_length()) >> 1
    constant = math.isqrt(width << (2 * k))
    row = (1,) * (x.ndim - 1) + (width,)

    integers = fixed(x, RESIDUAL_BITS)
    n = bits(jnp.abs(integers).max(-1, keepdims=True)) - 11
    integers = shift(integers, n)
    total = integers.sum(-1, keepdims=True)
    d = integers - jnp.sign(total) * lax.div(jnp.abs(total) + (width >> 1), jnp.int32(width))
    variance = jnp.maximum(jnp.square(shift(d, v)).sum(-1, keepdims=True), 1)
    j = (24 - bits(variance)) >> 1
    q = isqrt(variance << (2 * j))
    r = lax.div(constant + (q >> 1), q)

    pattern = lax.bitcast_convert_type(jnp.abs(weight).max(), jnp.int32)
    exponent = jnp.clip((pattern >> 23) - 127 - 11 - ((pattern & 0x7FFFFF) == 0), *EXPONENTS)
    m = jnp.clip(jnp.rint(weight * power(-exponent)), -4096, 4096).astype(jnp.int32).reshape(row)
    u = shift(d * m, 12) * r
    e = j - k - v + 12 + exponent
    if bias is None:
        y = u.astype(jnp.float32) * power(e)
    else:
        s = jnp.clip(-(e + NORM_BITS), -22, 31)
        bound = LIMIT >> jnp.maximum(-s, 0)
        u = jnp.clip(shift(jnp.where(s < 0, jnp.clip(u, -bound, bound), u), s), -LIMIT, LIMIT)
        y = floating(u + jnp.clip(fixed(bias, NORM_BITS), -LIMIT, LIMIT).reshape(row), NORM_BITS)
    codes, t = quantize(y, 64 if bias is None else NORM_BITS)
    return written(codes.astype(jnp.float32) * power(t))


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU of 8 fraction bits, with 10."""
    h = jnp.clip(fixed(x, HIDDEN_BITS["gelu"]), -32767, 32767)
    a = jnp.minimum(jnp.abs(h), 1024)
    p = 4096 - ((a * (3276 + ((a * (4220 - ((a * 3908) >> 10))) >> 10))) >> 10)
    square = (p * p) >> 12
    return floating(4 * jnp.maximum(h, 0) - shift(a * ((square * square) >> 12), 11), RESIDUAL_BITS)


def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(x, 0)."""
    return jnp.maximum(x, 0.0)


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu, "relu": relu}


def weight_bits(block_size: int) -> int:
    """Of an attention weight: so many that sums over `block_size` of them are below 2^24."""
    return 8 - ((block_size - 1) // 512).bit_length()


def attention(
    q: tuple[Int8[Array, "B H T D"], Int[Array, "B H T 1"]],
    k: tuple[Int8[Array, "B H S D"], Int[Array, "B H S 1"]],
    v: tuple[Int8[Array, "B H S D"], Int[Array, "B H S 1"]],
    first: Int[Array, ""] | int,
    block_size: int,
    keep: Array | None = None,
) -> tuple[Float[Array, "B H T D"], Int[Array, "B H T S"]]:
    """Causal attention of codes and exponents; a value is code * 2^exponent.

    Args:
        first: the queries stand at the positions from here on, the keys at those from 0.
        keep: booleans [B, H, T, S]; weights elsewhere are dropped, after they have been added up.

    Returns:
        the weighted values, and the weights before any is dropped, int16; those of a query do not add up to 1.
    """
    (q_BHTD, q_exponent), (k_BHSD, k_exponent), (v_BHSD, v_exponent) = q, k, v
    queries, keys = q_BHTD.shape[2], k_BHSD.shape[2]
    cap = largest_exponent(q_BHTD.shape[3])
    # A score has 8 fraction bits, 4 of them from each side.
    e = jnp.minimum(q_exponent.astype(jnp.int32) + 4, cap) + jnp.minimum(k_exponent.astype(jnp.int32) + 4, cap).mT
    z = shift(_scores(q_BHTD, k_BHSD), -e)
    positions = first + lax.broadcasted_iota(jnp.int32, (1, 1, queries, keys), 2)
    is_seen = lax.broadcasted_iota(jnp.int32, (1, 1, queries, keys), 3) <= positions
    z = jnp.where(is_seen, z, -(1 << 25))
    d = jnp.minimum(z.max(-1, keepdims=True) - z, 15 * 256)
    p = jnp.where(is_seen, exponential(d), 0)
    weights = written(p.astype(jnp.int16))
    p = weights.astype(jnp.int32)
    den = p.sum(-1, keepdims=True)
    if keep is not None:
        p = jnp.where(keep, p, 0)
    b = weight_bits(block_size)
    v_row = v_exponent.astype(jnp.int32).mT
    top = jnp.where(p > 0, bits(p) + v_row, NO_EXPONENT).max(-1, keepdims=True) - b
    s = jnp.clip(top - v_row, -22, 31)
    w = jnp.minimum(shift(p, s), (1 << b) - 1)
    o = _weighted(w, v_BHSD, is_byte=b == 8)
    n = jnp.maximum(bits(jnp.abs(o).max(-1, keepdims=True)) - 15, 0)
    dt = bits(den) - 8
    narrow = shift(den, dt)
    u = shift(o, n) * lax.div((1 << 15) + (narrow >> 1), narrow)
    return u.astype(jnp.float32) * power(jnp.clip(top + n - 15 - dt, -126, 100)), weights


def _products(lhs: Int[Array, "B H T K"], rhs: Int8[Array, "B H K N"], is_byte: bool) -> Int32[Array, "B H T N"]:
    """Products of matrices below 2^24: in float32 where a CPU computes, int8 has no kernel for a batch there.

    Args:
        is_byte: `lhs` is from 0 to 255; else from -128 to 127.
    """
    return lax.platform_dependent(lhs, rhs, cpu=_float_products, default=partial(int8_products, is_byte=is_byte))


def _float_products(lhs: Int[Array, "B H T K"], rhs: Int8[Array, "B H K N"]) -> Int32[Array, "B H T N"]:
    return jnp.matmul(lhs.astype(jnp.float32), rhs.astype(jnp.float32), precision="highest").astype(jnp.int32)


def int8_products(
    lhs: Int[Array, "B H T K"], rhs: Int8[Array, "B H K N"], is_byte: bool = False
) -> Int32[Array, "B H T N"]:
    """`_products` by the int8 units of a GPU or TPU; bytes are shifted: sum a b = sum (a - 128) b + 128 sum b."""
    narrow = (lhs - 128 if is_byte else lhs).astype(jnp.int8)
    sums = jnp.matmul(narrow, rhs, preferred_element_type=jnp.int32)
    return sums + 128 * rhs.sum(2, keepdims=True, dtype=jnp.int32) if is_byte else sums


def _scores(q: Int8[Array, "B H T D"], k: Int8[Array, "B H S D"]) -> Int32[Array, "B H T S"]:
    """Products of queries and keys. For one query, by sums: a copy of the keys in float32 would take longer."""
    if q.shape[2] == 1:
        return (q.mT.astype(jnp.int32) * k.mT.astype(jnp.int32)).sum(2, keepdims=True)
    return _products(q, k.mT, is_byte=False)


def _weighted(w: Int[Array, "B H T S"], v: Int8[Array, "B H S D"], is_byte: bool) -> Int32[Array, "B H T D"]:
    """Sums of values times their weights."""
    batch, heads, queries, keys = w.shape
    if queries > 1 or sharding.splits("heads"):
        return _products(w, v, is_byte)
    # With one dimension for streams and heads, 32 streams are 1.6 times as fast on a CPU: no copy is made in float32.
    w_NS, v_NSD = w.reshape(batch * heads, keys).astype(jnp.float32), v.reshape(batch * heads, keys, -1)
    sums_ND = jnp.einsum("ns,nsd->nd", w_NS, v_NSD.astype(jnp.float32), precision="highest")
    return sums_ND.reshape(batch, heads, 1, -1).astype(jnp.int32)
