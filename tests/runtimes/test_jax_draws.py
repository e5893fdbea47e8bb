"""A token drawn in JAX is the one drawn in NumPy."""

import jax
import numpy as np
import pytest

from picogpt_jax.runtimes import draws, jax_draws
from picogpt_jax.runtimes.draws import Scale
from picogpt_jax.runtimes.jax_draws import high_word

compiled = jax.jit(jax_draws.draw, static_argnums=3)


@pytest.mark.parametrize("top_k", [None, 1, 5])
@pytest.mark.parametrize(("vocab_size", "streams"), [(11, 300), (65, 300), (50257, 8)])
def test_the_tokens_are_those_of_numpy(vocab_size: int, streams: int, top_k: int | None) -> None:
    generator = np.random.default_rng(vocab_size)
    logits_BV = generator.normal(0, 3, (streams, vocab_size)).astype(np.float32)
    logits_BV[: streams // 2] = np.round(logits_BV[: streams // 2])  # many are equal
    bits_B = generator.integers(0, 2**32, streams, dtype=np.uint32)
    found = []
    for temperature in (0, 1e-5, 0.1, 0.8, 1, 5, 1e30):
        scale = Scale.of(temperature) if temperature else None
        tokens_B = np.asarray(compiled(logits_BV, bits_B, scale, top_k))
        np.testing.assert_array_equal(tokens_B, draws.draw(logits_BV, bits_B, scale, top_k))
        found.append(tokens_B)
    if top_k != 1:
        assert not np.array_equal(found[0], found[-1]), "a control"


def test_the_high_word_of_a_product() -> None:
    edges = np.array([0, 1, 65535, 65536, 2**31, 2**32 - 1], np.uint32)
    a, b = (part.ravel() for part in np.meshgrid(edges, edges))
    a, b = (np.append(x, np.random.default_rng(i).integers(0, 2**32, 999, np.uint32)) for i, x in enumerate((a, b)))
    found = jax.jit(high_word)(a, b)
    np.testing.assert_array_equal(found, (a.astype(np.uint64) * b.astype(np.uint64)) >> np.uint64(32))
