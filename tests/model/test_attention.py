"""The plain form of attention, with a cache and without."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from picogpt_jax.model import attention
from picogpt_jax.model.numerics import Numerics


def attend(q: jax.Array, k: jax.Array, v: jax.Array, past: Any, exact: bool) -> jax.Array:
    numerics = Numerics(tiny_config().quant, "serve", exact_cache=exact)
    return attention.attend(numerics, q, k, v, past, drop=lambda weights: weights)


@pytest.mark.parametrize("queries", [1, 3])
def test_attention_to_a_cache_rounds_like_that_to_the_whole_window(queries: int) -> None:
    """In float64, rounded once; in float32 as exact as float32 sums are."""
    shape, past = (2, 4, 96, 48), 96 - queries
    q, k, v = 3 * jax.random.normal(jax.random.key(0), (3, *shape))
    whole = attend(q, k, v, None, exact=True)[:, :, past:]

    def cached(exact: bool) -> np.ndarray:
        filled = (jnp.where(jnp.arange(96)[:, None] < past, part, jnp.nan_to_num(jnp.inf)) for part in (k, v))
        new = (part[:, :, past:] for part in (q, k, v))
        return jax.jit(lambda *new: attend(*new, (tuple(filled), jnp.int32(past)), exact))(*new)

    assert (np.asarray(cached(True)) == whole).mean() > 0.999
    np.testing.assert_allclose(cached(True), whole, rtol=2e-7, atol=1e-12)
    np.testing.assert_allclose(cached(False), whole, atol=1e-5)
    assert (np.asarray(cached(False)) == whole).mean() < 0.9, "a control: float32 is less exact"
