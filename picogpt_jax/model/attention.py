"""Causal attention: the plain form, and the fused kernels of accelerators, which never store the scores [T, T].

plain   what every runtime computes, and what the promise "trained as served, bit for bit" is about; any device, any
        type, with dropout and with a cache of earlier positions.
cudnn   NVIDIA's, through `jax.nn.dot_product_attention`.
splash  the Pallas kernel for TPUs.

Where a kernel can serve, `train.attention=auto` measures it and the plain form, and takes the faster one.

A fused kernel sums in another order and keeps its weights in blocks, so results differ from the plain form in the last
bits of the compute type. None of them has dropout: a run with `model.dropout` > 0 computes the plain form.

Shapes: B batch, T time (query), S time (key), H heads, D head size.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from picogpt_jax.config import AttentionForm, ModelConfig
from picogpt_jax.devices import sharding
from picogpt_jax.devices.setup import compiler_options
from picogpt_jax.errors import UserError
from picogpt_jax.kernels import products
from picogpt_jax.model import rounding
from picogpt_jax.model.dropout import DropoutKey, dropout

LANES = 128  # of a TPU: a block of the kernel is a multiple of them
MAX_BLOCK = 512  # positions in a block of the kernel
WARM_UP_CALLS, TIMED_CALLS = 3, 10
MARGIN = 1.05  # a kernel may be so much slower than the plain form, which stores the scores, and is still taken


def choose(
    wanted: AttentionForm,
    config: ModelConfig,
    dtype: jnp.dtype,
    device: jax.Device,
    measure: Callable[[AttentionForm], float] | None,
) -> AttentionForm:
    """The form that a run computes; of several processes, each must ask, and all get what the first one measured.

    Args:
        wanted: `train.attention`; "auto" takes the faster one of the plain form and the device's fused kernel, where
            that can serve.
        device: one of the mesh; they are all alike.
        measure: the seconds that a form takes, such as `seconds`; None, where nothing can run on the devices: "auto"
            then takes the kernel.

    Raises:
        UserError: a kernel was asked for by name and cannot serve this model or device.
    """
    if wanted == "auto":
        kernel: AttentionForm = "splash" if device.platform == "tpu" else "cudnn"
        if why_not(kernel, config, dtype, device):
            return "plain"
        if measure is None:
            return kernel
        is_kernel = jax.process_index() != 0 or _faster(kernel, measure) == kernel
        return kernel if multihost_utils.broadcast_one_to_all(np.int32(is_kernel)) else "plain"
    reason = None if wanted == "plain" else why_not(wanted, config, dtype, device)
    if reason:
        raise UserError(f"train.attention={wanted}: {reason}; change that, or use train.attention=auto")
    return wanted


def _faster(kernel: AttentionForm, measure: Callable[[AttentionForm], float]) -> AttentionForm:
    """The kernel or the plain form, whichever is faster; says which, and why. What fails is passed over."""
    times: dict[AttentionForm, float] = {}
    for form in (kernel, "plain"):
        try:
            times[form] = measure(form)
        except Exception as error:  # whatever cuDNN, the compiler or a full memory raises
            reason = " ".join(str(error).split())[:500]
            # As an error: warnings are below what the scripts show.
            logging.error("train.attention=auto passes %s over: %s: %s", form, type(error).__name__, reason)
    is_kernel = kernel in times and times[kernel] <= MARGIN * times.get("plain", math.inf)
    chosen: AttentionForm = kernel if is_kernel else "plain"
    said = ", ".join(f"{form} {1e3 * duration:.3f} ms" for form, duration in times.items())
    print(f"attention: {chosen} (forward and backward: {said or 'nothing could be measured'})", flush=True)
    return chosen


def seconds(
    form: AttentionForm, shape_BHTD: tuple[int, int, int, int], dtype: jnp.dtype, interpret: bool = False
) -> float:
    """The median time of a form's result and gradients, of numbers drawn at random, on one device of this process.

    Args:
        shape_BHTD: a device's share.
        interpret: see `fused`.
    """
    q, k, v, gradient = jax.random.normal(jax.random.key(0), (4, *shape_BHTD), dtype)
    attend = causal if form == "plain" else functools.partial(fused, form, interpret=interpret)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def step(q: Array, k: Array, v: Array, gradient: Array) -> tuple[Array, tuple[Array, ...]]:
        y, backward = jax.vjp(attend, q, k, v)
        return y, backward(gradient)

    times = []
    for _ in range(WARM_UP_CALLS + TIMED_CALLS):
        began = time.perf_counter()
        jax.block_until_ready(step(q, k, v, gradient))
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM_UP_CALLS:])


def why_not(form: AttentionForm, config: ModelConfig, dtype: jnp.dtype, device: jax.Device) -> str | None:
    """What keeps a fused kernel from serving; None where nothing does."""
    platform = {"cudnn": "gpu", "splash": "tpu"}[form]
    if device.platform != platform:
        return f"it runs on a {platform.upper()}, the devices are {device.device_kind}"
    if config.dropout > 0.0:
        return f"it has no dropout, and model.dropout={config.dropout}"
    if form == "splash" and config.block_size % LANES:
        return f"model.block_size={config.block_size} is not a multiple of {LANES}"
    if form == "cudnn" and dtype == jnp.float32:
        return "it computes in half precision, and train.dtype is float32"
    if form == "cudnn" and (config.head_size % 8 or config.head_size > 128):
        return f"the head size n_embd / n_head = {config.head_size} is not a multiple of 8 up to 128"
    if form == "cudnn" and _compute_capability(device) < 8.0:
        return f"it needs compute capability 8.0, and {device.device_kind} has {_compute_capability(device)}"
    return None


def _compute_capability(device: jax.Device) -> float:
    return float(getattr(device, "compute_capability", "0"))


def fused(
    form: AttentionForm,
    q_BHTD: Float[Array, "B H T D"],
    k_BHTD: Float[Array, "B H T D"],
    v_BHTD: Float[Array, "B H T D"],
    interpret: bool = False,
) -> Float[Array, "B H T D"]:
    """The same as `plain` without a past and without dropout, by a fused kernel.

    A kernel is opaque to the compiler's partitioner: each device calls it for its own sequences and heads.

    Args:
        interpret: compute the Pallas kernel by an interpreter, on any device (for tests).
    """

    def kernel(q: Float[Array, "b h T D"], k: Float[Array, "b h T D"], v: Float[Array, "b h T D"]) -> Array:
        return _cudnn(q, k, v) if form == "cudnn" else _splash(q, k, v, interpret)

    if jax.sharding.get_abstract_mesh().empty:
        return kernel(q_BHTD, k_BHTD, v_BHTD)
    place = sharding.partition_spec(("batch", "heads", None, None))
    # check_vma: Pallas calls do not say over which mesh axes their results vary.
    sharded = jax.shard_map(kernel, in_specs=(place, place, place), out_specs=place, check_vma=False)
    return sharded(q_BHTD, k_BHTD, v_BHTD)


def _cudnn(
    q_BHTD: Float[Array, "B H T D"], k_BHTD: Float[Array, "B H T D"], v_BHTD: Float[Array, "B H T D"]
) -> Float[Array, "B H T D"]:
    q_BTHD, k_BTHD, v_BTHD = (x.transpose(0, 2, 1, 3) for x in (q_BHTD, k_BHTD, v_BHTD))
    y_BTHD = jax.nn.dot_product_attention(q_BTHD, k_BTHD, v_BTHD, is_causal=True, implementation="cudnn")
    return y_BTHD.transpose(0, 2, 1, 3)


def _splash(
    q_BHTD: Float[Array, "B H T D"],
    k_BHTD: Float[Array, "B H T D"],
    v_BHTD: Float[Array, "B H T D"],
    interpret: bool,
) -> Float[Array, "B H T D"]:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, heads, time, head_size = q_BHTD.shape
    block = next(size for size in range(MAX_BLOCK, 0, -LANES) if time % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((time, time))] * heads)
    attend = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    return jax.vmap(attend)(q_BHTD * head_size**-0.5, k_BHTD, v_BHTD)  # the kernel does not scale


def plain(
    q_BHtD: Float[Array, "B H t D"],
    k_BHTD: Float[Array, "B H T D"],
    v_BHTD: Float[Array, "B H T D"],
    past: tuple[Float[Array, "B H S D"], Float[Array, "B H S D"], Int[Array, ""], bool] | None,
    rate: float,
    key: DropoutKey | None,
    site: str,
    backward_dtype: jnp.dtype | None = None,
) -> Float[Array, "B H t D"]:
    """Causal attention with softmax in float32; the queries are the last t of the T positions.

    Args:
        past: keys, values and number of the positions before these, and whether attention to them is exact; read as
            they are, apart from the new ones, so that the compiler can update the cache in place.
        rate, key, site: of the dropout on the attention weights.
        backward_dtype: what the operands of the gradients' products are rounded to, in training.
    """
    if past is None:
        drop = lambda weights: dropout(weights, rate, key, site)  # noqa: E731
        attend = functools.partial(causal, drop=drop, backward_dtype=None if key is None else backward_dtype)
        return rounding.in_float64(attend, exact=key is None)(q_BHtD, k_BHTD, v_BHTD)
    return cached_attention(q_BHtD, k_BHTD, v_BHTD, *past)


def causal_scores(
    q_BHtD: Float[Array, "B H t D"], k_BHTD: Float[Array, "B H T D"], backward_dtype: jnp.dtype | None = None
) -> Float[Array, "B H t T"]:
    """Scaled query-key products, in float32 at least; what a query may not see is the lowest number."""
    queries, time = q_BHtD.shape[2], k_BHTD.shape[2]
    scores_BHtT = key_products(q_BHtD, k_BHTD, backward_dtype)
    visible_tT = lax.broadcasted_iota(jnp.int32, (queries, time), 1) <= time - queries + lax.broadcasted_iota(
        jnp.int32, (queries, time), 0
    )
    return jnp.where(visible_tT[None, None], scores_BHtT, jnp.finfo(scores_BHtT.dtype).min)


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
    drop: Callable[[Array], Array] = lambda weights: weights,
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
    exact: bool,
) -> Float[Array, "B H t D"]:
    """Attention to the new positions and to the first `length` of a cache.

    Args:
        exact: as in `rounding.in_float64`; else only the softmax is, whose sum depends on its order, and 32 streams of
            the default model are 1.7 times as fast, one 1.1 times.
    """
    seen_S = (jnp.arange(keys_BHSD.shape[2]) < length).astype(q_BHtD.dtype)
    attend: Callable[..., Array]
    if exact:
        # By sums of single products, which the compiler makes one loop of; a product of matrices would need a copy of
        # the cache in float64.
        by_loops = functools.partial(_cached, softmax=_softmax, multiply=_summed_keys, weigh=_summed_values)
        attend = functools.partial(_cached, softmax=_softmax, multiply=key_products, weigh=_weighed)
        attend = rounding.in_float64(attend, wide=by_loops)
    else:
        softmax = rounding.in_float64(_softmax)
        attend = functools.partial(_cached, softmax=softmax, multiply=key_products, weigh=_weighed)
    return attend(q_BHtD, k_BHTD, v_BHTD, keys_BHSD, values_BHSD, seen_S)


def _cached(
    q_BHtD: Float[Array, "B H t D"],
    k_BHTD: Float[Array, "B H T D"],
    v_BHTD: Float[Array, "B H T D"],
    keys_BHSD: Float[Array, "B H S D"],
    values_BHSD: Float[Array, "B H S D"],
    seen_S: Float[Array, " S"],
    softmax: Callable[[Array], Array],
    multiply: Callable[[Array, Array], Array],
    weigh: Callable[[Array, Array], Array],
) -> Float[Array, "B H t D"]:
    time = k_BHTD.shape[2]
    before_BHtS = multiply(q_BHtD, keys_BHSD)
    before_BHtS = jnp.where(seen_S[None, None, None] > 0, before_BHtS, jnp.finfo(before_BHtS.dtype).min)
    scores_BHtS = jnp.concatenate([causal_scores(q_BHtD, k_BHTD), before_BHtS], axis=-1)
    weights_BHtS = softmax(scores_BHtS).astype(v_BHTD.dtype)
    return weigh(weights_BHtS[..., :time], v_BHTD) + weigh(weights_BHtS[..., time:], values_BHSD)


_softmax = functools.partial(jax.nn.softmax, axis=-1)


def _weighed(weights_BHtS: Float[Array, "B H t S"], values_BHSD: Float[Array, "B H S D"]) -> Float[Array, "B H t D"]:
    return jnp.einsum("bhts,bhsd->bhtd", weights_BHtS, values_BHSD)


def _summed_keys(q_BHtD: Float[Array, "B H t D"], k_BHSD: Float[Array, "B H S D"]) -> Float[Array, "B H t S"]:
    """`key_products` without a product of matrices."""
    return (q_BHtD[:, :, :, None] * q_BHtD.shape[3] ** -0.5 * k_BHSD[:, :, None]).sum(-1)


def _summed_values(weights_BHtS: Float[Array, "B H t S"], v_BHSD: Float[Array, "B H S D"]) -> Float[Array, "B H t D"]:
    """`_weighed` without a product of matrices."""
    return (weights_BHtS[..., None] * v_BHSD[:, :, None]).sum(-2)
