"""What is stored is stored once, and is what it was."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from picogpt_jax.devices.setup import compiler_options
from picogpt_jax.kernels.barriers import materialized, scaled

X = jax.random.normal(jax.random.key(0), (64, 32))


def loops_with_the_value(keep: bool) -> int:
    """In how many loops of the compiled program abs(x) * 3 is computed, whose result two others read."""

    def readers(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = jnp.abs(x) * 3.0
        y = materialized(y) if keep else y
        return y.sum(0), y.T + 1.0

    text = jax.jit(readers, compiler_options=compiler_options("cpu")).lower(X).compile().as_text()
    return len(re.findall(r" abs\(", text))


def test_a_stored_value_is_computed_once() -> None:
    assert loops_with_the_value(keep=True) == 1
    assert loops_with_the_value(keep=False) == 2, "the compiler has learned it: barriers.py may go"


def test_values_and_gradients_stay_as_they_are() -> None:
    scale = jnp.arange(1.0, 33.0)[None]

    def of(x: jax.Array, scale: jax.Array) -> jax.Array:
        return (scaled(jnp.sin(materialized(x)), scale) * X).sum()

    step = jax.jit(jax.value_and_grad(of, argnums=(0, 1)), compiler_options=compiler_options("cpu"))
    value, (x_gradient, scale_gradient) = step(X, scale)
    np.testing.assert_allclose(value, (np.sin(X) * scale * X).sum(), rtol=1e-5)
    np.testing.assert_allclose(x_gradient, np.cos(X) * scale * X, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scale_gradient, (np.sin(X) * X).sum(0, keepdims=True), rtol=1e-5, atol=1e-5)
