"""Causal attention: the plain form, and the fused kernels of accelerators, which never store the scores [T, T].

plain   what every runtime computes, and what the promise "trained as served, bit for bit" is about; any device, any
        type, with dropout and with a cache of earlier positions.
cudnn   NVIDIA's, through `jax.nn.dot_product_attention`.
splash  the Pallas kernel for TPUs.

A fused kernel sums in another order and keeps its weights in blocks, so results differ from the plain form in the last
bits of the compute type. None of them has dropout: a run with `model.dropout` > 0 computes the plain form.

Shapes: B batch, T time (query), S time (key), H heads, D head size.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from picogpt_jax import sharding
from picogpt_jax.config import AttentionForm, ModelConfig
from picogpt_jax.dropout import DropoutKey, dropout
from picogpt_jax.errors import UserError

LANES = 128  # of a TPU: a block of the kernel is a multiple of them
MAX_BLOCK = 512  # positions in a block of the kernel


def choose(wanted: AttentionForm, config: ModelConfig, dtype: jnp.dtype, device: jax.Device) -> AttentionForm:
    """The form that a run computes.

    Args:
        wanted: `train.attention`; "auto" takes the device's fused kernel where it can serve.
        device: one of the mesh; they are all alike.

    Raises:
        UserError: a kernel was asked for by name and cannot serve this model or device.
    """
    if wanted == "plain":
        return wanted
    if wanted == "auto":
        fused: AttentionForm = "splash" if device.platform == "tpu" else "cudnn"
        return "plain" if why_not(fused, config, dtype, device) else fused
    reason = why_not(wanted, config, dtype, device)
    if reason:
        raise UserError(f"train.attention={wanted}: {reason}; change that, or use train.attention=auto")
    return wanted


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
    past: tuple[Float[Array, "B H S D"], Float[Array, "B H S D"], Int[Array, ""]] | None,
    rate: float,
    key: DropoutKey | None,
    site: str,
) -> Float[Array, "B H t D"]:
    """Causal attention with softmax in float32; the queries are the last t of the T positions.

    Args:
        past: keys, values and number of the positions before these; read as they are, apart from the new ones, so that
            the compiler can update the cache in place.
        rate, key, site: of the dropout on the attention weights.
    """
    queries, time, head_size = q_BHtD.shape[2], k_BHTD.shape[2], q_BHtD.shape[3]
    q_BHtD = q_BHtD * head_size**-0.5
    lowest = jnp.finfo(jnp.float32).min
    scores_BHtS = jnp.einsum("bhtd,bhsd->bhts", q_BHtD, k_BHTD).astype(jnp.float32)
    visible_tT = lax.broadcasted_iota(jnp.int32, (queries, time), 1) <= time - queries + lax.broadcasted_iota(
        jnp.int32, (queries, time), 0
    )
    scores_BHtS = jnp.where(visible_tT[None, None], scores_BHtS, lowest)
    if past is not None:
        keys_BHSD, values_BHSD, length = past
        before_BHtS = jnp.einsum("bhtd,bhsd->bhts", q_BHtD, keys_BHSD).astype(jnp.float32)
        before_BHtS = jnp.where(jnp.arange(keys_BHSD.shape[2])[None, None, None] < length, before_BHtS, lowest)
        scores_BHtS = jnp.concatenate([scores_BHtS, before_BHtS], axis=-1)
    weights_BHtS = jax.nn.softmax(scores_BHtS, axis=-1).astype(v_BHTD.dtype)
    weights_BHtS = dropout(weights_BHtS, rate, key, site)
    y_BHtD = jnp.einsum("bhts,bhsd->bhtd", weights_BHtS[..., :time], v_BHTD)
    if past is not None:
        y_BHtD = y_BHtD + jnp.einsum("bhts,bhsd->bhtd", weights_BHtS[..., time:], values_BHSD)
    return y_BHtD
