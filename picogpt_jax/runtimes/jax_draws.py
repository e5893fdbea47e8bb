"""Drawing a token in JAX, within compiled loops: the tokens of `picogpt_jax.runtimes.draws`, in uint32.

Shapes: B streams, V vocabulary.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from picogpt_jax.runtimes.draws import LARGEST, Scale, weights


def draw(
    logits_BV: Float[Array, "B V"], bits_B: UInt32[Array, " B"], scale: Scale | None, top_k: int | None
) -> Int[Array, " B"]:
    """One token for each stream, int32 [B]; `scale` None: the likeliest."""
    if scale is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    n_BV = jnp.clip(jnp.rint(logits_BV.astype(jnp.float32) * 1024), -LARGEST, LARGEST).astype(jnp.int32)
    d_BV = (n_BV.max(-1, keepdims=True) - n_BV).astype(jnp.uint32)
    w_BV = weights(d_BV, scale, n_BV.shape[1])
    if top_k is not None:
        least_B1 = lax.top_k(n_BV, top_k)[0][:, -1:]
        room_B1 = top_k - (n_BV > least_B1).sum(-1, keepdims=True)
        tied_BV = n_BV == least_B1
        w_BV = w_BV * ((n_BV > least_B1) | (tied_BV & (jnp.cumsum(tied_BV, axis=-1) <= room_B1)))
    ends_BV = jnp.cumsum(w_BV, axis=-1, dtype=jnp.uint32)
    return (ends_BV <= high_word(bits_B, ends_BV[:, -1])[:, None]).sum(-1, dtype=jnp.int32)


def high_word(a: UInt32[Array, "..."], b: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """(a * b) >> 32 by halves: JAX has no 64-bit integers here."""
    a_low, a_high, b_low, b_high = a & 65535, a >> 16, b & 65535, b >> 16
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    other = a_low * b_high + (middle & 65535)
    return a_high * b_high + (middle >> 16) + (other >> 16)
