"""The loss over a large vocabulary: its gradient is written once, in the compute type, beside a part of the logits.

Float32 logits of GPT-2's vocabulary are the largest arrays of a training step, and `jax.grad` of a cross-entropy makes
more of them: the softmax's gradient, a scatter into it, the product's copy in the compute type. Here the head and the
loss go through the sequences part by part, and each part leaves behind only what the backward pass's products read,

    d loss / d logits = (softmax(logits) - onehot(target)) / number of targets

Shapes: B batch, T time, P parts, t time of a part, C width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from picogpt_jax.devices.sharding import known_mesh, partition_spec

SMALL_VOCABULARY = 8192  # up to here logits are no burden, and the loss is the plain one
PART_LOGITS = 1 << 28  # of one device at once: 1 GiB in float32


def time_parts(sequences: int, time: int, vocabulary: int) -> int:
    """In how many parts a device's sequences are cut, so that a part has `PART_LOGITS` logits or is one position."""
    fits = max(PART_LOGITS // (sequences * vocabulary), 1)
    return next(parts for parts in range(1, time + 1) if time % parts == 0 and time // parts <= fits)


@jax.custom_vjp
def with_gradient(logits: Float[Array, "..."], loss: Float[Array, ""], gradient: Float[Array, "..."]) -> Array:
    """`loss`, whose gradient at float32 `logits` is `gradient`; the logits' own values are not needed, nor computed."""
    return loss


with_gradient.defvjp(
    lambda logits, loss, gradient: (loss, gradient),
    lambda gradient, factor: (gradient.astype(jnp.float32) * factor, None, None),
)


def log_sum_exp(logits_BtV: Float[Array, "B t V"]) -> Float[Array, "B t"]:
    """`jax.nn.logsumexp` over the vocabulary; on a GPU the logits are read once, not twice."""
    return lax.platform_dependent(logits_BtV, cuda=log_sum_exp_at_once, default=lambda x: jax.nn.logsumexp(x, -1))


def log_sum_exp_at_once(logits_BtV: Float[Array, "B t V"]) -> Float[Array, "B t"]:
    """The largest logit so far and the sum of exponentials relative to it (arXiv 1805.02867)."""

    def combine(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
        largest = jnp.maximum(one[0], other[0])
        return largest, one[1] * jnp.exp(one[0] - largest) + other[1] * jnp.exp(other[0] - largest)

    none = jnp.finfo(jnp.float32).min, jnp.float32(0)
    largest_Bt, total_Bt = lax.reduce((logits_BtV, jnp.ones_like(logits_BtV)), none, combine, (2,))
    return largest_Bt + jnp.log(total_Bt)


def empty_gradient(shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, "B P t V"]:
    """An array to be written, placed as logits are: of `lax.empty` alone, each device would hold the whole."""
    mesh = known_mesh()
    if mesh is None:
        return lax.empty(shape, dtype)
    spec = partition_spec(("batch", None, None, "vocab"))
    share = NamedSharding(mesh, spec).shard_shape(shape)
    return jax.shard_map(lambda: lax.empty(share, dtype), in_specs=(), out_specs=spec, check_vma=False)()


def mean_loss(
    head: Callable[[Any, Float[Array, "B t C"]], Float[Array, "B t V"]],
    weights: Any,
    constant_weights: Any,
    x_BTC: Float[Array, "B T C"],
    targets_BT: Int[Array, "B T"],
    scale: Float[Array, ""],
    parts: int,
    dtype: jnp.dtype,
) -> Float[Array, ""]:
    """`scale` times the mean cross-entropy, in nats.

    Args:
        head: (weights, x) -> float32 logits, each position's of itself alone.
        constant_weights: `head` makes the same logits of them, and they have no gradient: what is quantized already.
        scale: float16's loss scale: it is in the gradient before that is rounded.
        parts: of the time; divides it.
        dtype: of the logits' gradient.
    """
    constant_weights, constant_BTC = lax.stop_gradient((constant_weights, x_BTC))
    in_parts = lambda array: array.reshape(array.shape[0], parts, -1, *array.shape[2:])  # noqa: E731

    def part(gradient_BPtV: Array, index: Array) -> tuple[Array, Array]:
        pick = lambda array: lax.dynamic_index_in_dim(in_parts(array), index, 1, keepdims=False)  # noqa: E731
        logits_BtV = head(constant_weights, pick(constant_BTC))
        # Compared, not indexed: a scatter would be one more array of this size.
        is_target = lax.broadcasted_iota(jnp.int32, logits_BtV.shape, 2) == pick(targets_BT)[..., None]
        normalizer_Bt = log_sum_exp(logits_BtV)
        losses_Bt = normalizer_Bt - jnp.where(is_target, logits_BtV, 0.0).sum(-1)
        rise_BtV = (jnp.exp(logits_BtV - normalizer_Bt[..., None]) - is_target) * (scale / targets_BT.size)
        return lax.dynamic_update_index_in_dim(gradient_BPtV, rise_BtV.astype(dtype), index, 1), losses_Bt

    logits_BTV = head(weights, x_BTC)  # for its gradient
    empty_BPtV = empty_gradient(jax.eval_shape(in_parts, logits_BTV).shape, dtype)
    gradient_BPtV, losses = lax.scan(part, empty_BPtV, jnp.arange(parts))
    return with_gradient(logits_BTV, losses.mean() * scale, gradient_BPtV.reshape(logits_BTV.shape))
