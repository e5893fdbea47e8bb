"""The plain form of attention, with a cache and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from picogpt_jax.model.attention import cached_attention, causal


@pytest.mark.parametrize("queries", [1, 3])
def test_attention_to_a_cache_is_that_to_the_whole_window(queries: int) -> None:
    """What the cache holds beyond its length is not seen."""
    past = 96 - queries
    parts = 3 * jax.random.normal(jax.random.key(0), (3, 2, 4, 96, 48))
    keys, values = (jnp.where(jnp.arange(96)[:, None] < past, part, 1e30) for part in parts[1:])
    found = jax.jit(cached_attention)(*parts[:, :, :, past:], keys, values, jnp.int32(past))
    np.testing.assert_allclose(found, causal(*parts)[:, :, past:], atol=1e-5)
