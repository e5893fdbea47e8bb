"""Causal attention by the fused kernels of accelerators, which never store the scores [T, T].

cudnn   NVIDIA's, through `jax.nn.dot_product_attention`.
splash  the Pallas kernel for TPUs.

A kernel sums in another order than the plain form (`model.attention`), so results differ in the last bits of the
compute type. None has dropout: a run with `model.dropout` > 0 computes the plain form.

Shapes: B batch, T time, H heads, D head size.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from picogpt_jax.config import AttentionForm, ModelConfig
from picogpt_jax.devices import sharding
from picogpt_jax.devices.setup import compiler_options
from picogpt_jax.errors import UserError

LANES = 128  # of a TPU: a block of the kernel is a multiple of them
LARGEST_HEAD = 512  # features, in integers: of more a score could be odd and above 2^23, where float32 has no halves
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
        measure: the seconds that a form takes, by `seconds`; None, where nothing can run on the devices: "auto"
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


def seconds(attend: Callable[..., Array], shape_BHTD: tuple[int, int, int, int], dtype: jnp.dtype) -> float:
    """The median time of a form's result and gradients, of numbers drawn at random, on one device of this process.

    Args:
        attend: the form, of q, k and v.
        shape_BHTD: a device's share.
    """
    q, k, v, gradient = jax.random.normal(jax.random.key(0), (4, *shape_BHTD), dtype)

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
    if config.head_size > LARGEST_HEAD:
        return f"the head size n_embd / n_head = {config.head_size} is above {LARGEST_HEAD}"
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
    """Causal attention without dropout, by a fused kernel.

    Args:
        interpret: compute the Pallas kernel by an interpreter, on any device (for tests).
    """

    def kernel(q: Float[Array, "b h T D"], k: Float[Array, "b h T D"], v: Float[Array, "b h T D"]) -> Array:
        return _cudnn(q, k, v) if form == "cudnn" else _splash(q, k, v, interpret)

    return on_each_device(kernel, q_BHTD, k_BHTD, v_BHTD)


def on_each_device(kernel: Callable[..., Array], *operands_BH: Array) -> Array:
    """Calls a kernel, which is opaque to the compiler's partitioner: each device for its own sequences and heads."""
    if sharding.known_mesh() is None:
        return kernel(*operands_BH)
    place = sharding.partition_spec(("batch", "heads", None, None))
    # check_vma: Pallas calls do not say over which mesh axes their results vary.
    in_specs = (place,) * len(operands_BH)
    return jax.shard_map(kernel, in_specs=in_specs, out_specs=place, check_vma=False)(*operands_BH)


def _cudnn(q_BHTD: Array, k_BHTD: Array, v_BHTD: Array) -> Array:
    q_BTHD, k_BTHD, v_BTHD = (x.transpose(0, 2, 1, 3) for x in (q_BHTD, k_BHTD, v_BHTD))
    y_BTHD = jax.nn.dot_product_attention(q_BTHD, k_BTHD, v_BTHD, is_causal=True, implementation="cudnn")
    return y_BTHD.transpose(0, 2, 1, 3)


def _splash(q_BHTD: Array, k_BHTD: Array, v_BHTD: Array, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, heads, time, head_size = q_BHTD.shape
    block = next(size for size in range(MAX_BLOCK, 0, -LANES) if time % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    blocks: dict[str, Any] = dict.fromkeys(names, block)
    mask = splash.MultiHeadMask([splash.CausalMask((time, time))] * heads)
    attend = splash.make_splash_mha(
        mask, block_sizes=splash.BlockSizes(**blocks), head_shards=1, q_seq_shards=1, interpret=interpret
    )
    return jax.vmap(attend)(q_BHTD * head_size**-0.5, k_BHTD, v_BHTD)  # the kernel does not scale
