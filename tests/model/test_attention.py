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


@pytest.mark.parametrize(("dtype", "depends"), [("bfloat16", True), ("float16", True), ("float32", False)])
def test_the_mask_depends_on_the_layer_in_the_type_of_accelerators(dtype: str, depends: bool) -> None:
    """And no gradient passes through it."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 8), dtype)
    program = str(jax.make_jaxpr(causal)(x, x, x))
    assert ("optimization_barrier" in program) == depends
    gradient = jax.grad(lambda x: causal(x, x, x).astype(jnp.float32).sum())
    assert "pad" not in str(jax.make_jaxpr(gradient)(x))
    np.testing.assert_allclose(gradient(x).astype(jnp.float32), gradient(x.astype(jnp.float32)), atol=0.04)
