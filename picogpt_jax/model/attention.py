"""Causal attention in the plain form: on any device, in any type, with dropout and with a cache.

It is what every runtime computes, and what the promise "trained as served, bit for bit" is about.

Shapes: B batch, T time (t of the queries), S positions of a cache, H heads, D head size.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from picogpt_jax.config import ModelConfig
from picogpt_jax.kernels import integer_attention, products
from picogpt_jax.kernels.fused_attention import fused
from picogpt_jax.model import integer
from picogpt_jax.model.numerics import Numerics

# Of one layer's earlier positions: keys and values [B, H, S, D], in integer arithmetic the codes of both and then their
# exponents [B, H, S, 1], all int8.
Kept = tuple[Array, ...]
LayerCache = tuple[Kept, Int[Array, ""]]  # and their number
Drop = Callable[[Array], Array]  # dropout


def attend(
    numerics: Numerics,
    q_BHtD: Float[Array, "B H t D"],
    k_BHTD: Float[Array, "B H T D"],
    v_BHTD: Float[Array, "B H T D"],
    past: LayerCache | None,
    drop: Drop,
) -> Float[Array, "B H t D"]:
    """Causal attention with softmax in float32; the queries are the last t of the T positions.

    Args:
        past: the positions before these; read as they are, apart from the new ones, so that the compiler can update the
            cache in place. There is no dropout with them.
        drop: dropout on the attention weights.
    """
    if past is not None:
        (keys_BHSD, values_BHSD), length = past
        return cached_attention(q_BHtD, k_BHTD, v_BHTD, keys_BHSD, values_BHSD, length)
    return causal(q_BHtD, k_BHTD, v_BHTD, drop, numerics.backward_dtype)


def query_factor(head_size: int) -> float:
    """What integer arithmetic has multiplied the queries by: a score is then a logarithm to the base 2."""
    return math.log2(math.e) / math.sqrt(head_size)


def integer_attend(
    numerics: Numerics,
    config: ModelConfig,
    q_BHtD: Float[Array, "B H t D"],
    k_BHTD: Float[Array, "B H T D"],
    v_BHTD: Float[Array, "B H T D"],
    past: LayerCache | None,
    drop: Drop | None,
) -> tuple[Float[Array, "B H t D"], Kept]:
    """`attend` in integer arithmetic, of what carries integers, and what is kept of the keys and values.

    Where a fused kernel serves, the values are an integer kernel's and the gradient is the float one's.

    Args:
        q_BHtD: multiplied by `query_factor` already.
        past: the positions before these; they are kept with the new ones among them.
    """
    q, k, v = (integer.quantize(x, integer.HEAD_BITS) for x in (q_BHtD, k_BHTD, v_BHTD))
    kept: Kept = (k[0], v[0], k[1].astype(jnp.int8), v[1].astype(jnp.int8))
    first: Any = k_BHTD.shape[2] - q_BHtD.shape[2]
    if past is not None:
        before, length = past
        place = functools.partial(lax.dynamic_update_slice_in_dim, start_index=length, axis=2)
        kept = tuple(place(old, new) for old, new in zip(before, kept, strict=True))
        first = first + length
    keep = None if drop is None else drop(jnp.ones((*q_BHtD.shape[:3], k_BHTD.shape[2]))) > 0.0
    is_trained = numerics.mode != "serve" and past is None and not first
    if is_trained and keep is None and numerics.attention != "plain":
        y_BHtD = integer_attention.attention(numerics.attention, q, k, v, integer.weight_bits(config.block_size))
        to_natural = math.log(2.0) * math.sqrt(config.head_size)
        q_BHtD, k_BHTD, v_BHTD = (x.astype(numerics.dtype) for x in (q_BHtD * to_natural, k_BHTD, v_BHTD))
        y_BHtD = integer.carry(y_BHtD, fused(numerics.attention, q_BHtD, k_BHTD, v_BHTD))
        return checkpoint_name(y_BHtD, "attention"), kept
    keys, values = (kept[0], kept[2]), (kept[1], kept[3])
    y_BHtD, weights_BHtS = integer.attention(q, keys, values, first, config.block_size, keep)
    kept_scale = 1.0 / (1.0 - config.dropout)
    if keep is not None:
        y_BHtD = y_BHtD * kept_scale
    if not is_trained:
        return y_BHtD, kept
    q_BHtD, k_BHTD, v_BHTD = (x.astype(numerics.dtype) for x in (q_BHtD, k_BHTD, v_BHTD))
    operands = (y_BHtD, weights_BHtS, keep, q_BHtD, k_BHTD, v_BHTD)
    return with_gradient(*operands, kept_scale, numerics.backward_dtype), kept


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def with_gradient(
    y_BHTD: Array,
    weights_BHTT: Array,
    keep_BHTT: Array | None,
    q_BHTD: Array,
    k_BHTD: Array,
    v_BHTD: Array,
    kept_scale: float,
    backward_dtype: jnp.dtype | None,
) -> Array:
    """`y_BHTD`, with the gradient of attention whose weights these are; scores are logarithms to the base 2.

    Args:
        weights_BHTT: integers, which are divided by their sum.
        keep_BHTT: what dropout leaves, times `kept_scale`; None: everything.
        backward_dtype: see `Numerics`.
    """
    return y_BHTD


def _forward(y: Array, *operands: Any) -> tuple[Array, tuple[Any, ...]]:
    return y, operands[:5]


def _backward(
    kept_scale: float, backward_dtype: jnp.dtype | None, operands: tuple[Any, ...], gradient: Array
) -> tuple[Array | None, ...]:
    weights, keep, q, k, v = operands
    last, before = (((3,), (3,)), ((0, 1), (0, 1))), (((3,), (2,)), ((0, 1), (0, 1)))

    def dot(lhs: Array, rhs: Array, dimensions: products.Dimensions) -> Array:
        if backward_dtype is not None:
            return products.of_rounded(lhs, rhs, dimensions, backward_dtype)
        return lax.dot_general(lhs, rhs, dimensions)

    def dropped(x: Array) -> Array:
        return x if keep is None else jnp.where(keep, x * kept_scale, 0.0)

    p = weights.astype(jnp.float32)
    p = p / p.sum(-1, keepdims=True)
    narrow = gradient.astype(v.dtype)
    to_keys = (((2,), (2,)), ((0, 1), (0, 1)))
    dv = dot(dropped(p).astype(v.dtype), narrow, to_keys)
    dp = dropped(dot(narrow, v, last).astype(jnp.float32))
    scores = (math.log(2.0) * p * (dp - (dp * p).sum(-1, keepdims=True))).astype(v.dtype)
    dq, dk = dot(scores, k, before), dot(scores, q, to_keys)
    return jnp.zeros_like(gradient), None, None, dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


with_gradient.defvjp(_forward, _backward)


def causal_scores(
    q_BHtD: Float[Array, "B H t D"], k_BHTD: Float[Array, "B H T D"], backward_dtype: jnp.dtype | None = None
) -> Float[Array, "B H t T"]:
    """Scaled query-key products, in float32 at least; what a query may not see is the lowest number."""
    queries, time = q_BHtD.shape[2], k_BHTD.shape[2]
    scores_BHtT = key_products(q_BHtD, k_BHTD, backward_dtype)
    visible_tT = lax.broadcasted_iota(jnp.int32, (queries, time), 1) <= time - queries + lax.broadcasted_iota(
        jnp.int32, (queries, time), 0
    )
    lowest = jnp.asarray(jnp.finfo(scores_BHtT.dtype).min, scores_BHtT.dtype)
    if q_BHtD.dtype != jnp.float32:
        # Made to depend on the queries: else both are the same in each layer, and lie in memory as [B, H, t, T].
        made = lax.stop_gradient((visible_tT, lowest, q_BHtD[:, :1, :1, :1]))
        visible_tT, lowest, _ = lax.optimization_barrier(made)
    return jnp.where(visible_tT[None, None], scores_BHtT, lowest)


def key_products(
    q_BHtD: Float[Array, "B H t D"], k_BHSD: Float[Array, "B H S D"], backward_dtype: jnp.dtype | None = None
) -> Float[Array, "B H t S"]:
    """Scaled query-key products, in float32 at least."""
    by_heads = (((3,), (3,)), ((0, 1), (0, 1)))
    scores_BHtS = products.dot_general(q_BHtD * q_BHtD.shape[3] ** -0.5, k_BHSD, by_heads, backward_dtype)
    return scores_BHtS.astype(jnp.promote_types(scores_BHtS.dtype, jnp.float32))


def causal(
    q_BHtD: Float[Array, "B H t D"],
    k_BHTD: Float[Array, "B H T D"],
    v_BHTD: Float[Array, "B H T D"],
    drop: Drop = lambda weights: weights,
    backward_dtype: jnp.dtype | None = None,
) -> Float[Array, "B H t D"]:
    """Attention of the last t of T positions; `drop` is the dropout on the weights."""
    scores_BHtT = causal_scores(q_BHtD, k_BHTD, backward_dtype)
    weights_BHtT = jax.nn.softmax(scores_BHtT, axis=-1).astype(v_BHTD.dtype)
    return products.dot_general(drop(weights_BHtT), v_BHTD, (((3,), (2,)), ((0, 1), (0, 1))), backward_dtype)


def cached_attention(
    q_BHtD: Float[Array, "B H t D"],
    k_BHTD: Float[Array, "B H T D"],
    v_BHTD: Float[Array, "B H T D"],
    keys_BHSD: Float[Array, "B H S D"],
    values_BHSD: Float[Array, "B H S D"],
    length: Int[Array, ""],
) -> Float[Array, "B H t D"]:
    """Attention to the new positions and to the first `length` of a cache."""
    time = k_BHTD.shape[2]
    is_seen_S = jnp.arange(keys_BHSD.shape[2]) < length
    before_BHtS = key_products(q_BHtD, keys_BHSD)
    before_BHtS = jnp.where(is_seen_S[None, None, None], before_BHtS, jnp.finfo(before_BHtS.dtype).min)
    scores_BHtS = jnp.concatenate([causal_scores(q_BHtD, k_BHTD), before_BHtS], axis=-1)
    weights_BHtS = jax.nn.softmax(scores_BHtS, axis=-1).astype(v_BHTD.dtype)
    weigh = functools.partial(jnp.einsum, "bhts,bhsd->bhtd")
    return weigh(weights_BHtS[..., :time], v_BHTD) + weigh(weights_BHtS[..., time:], values_BHSD)
