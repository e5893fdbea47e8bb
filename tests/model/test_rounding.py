"""Each step against NumPy in float64: on CPU the result is the exact one, rounded once."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from picogpt_jax.devices.setup import compiler_options
from picogpt_jax.model import rounding
from picogpt_jax.model.attention import causal
from picogpt_jax.model.gpt import ACTIVATIONS


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=shape) * scale).astype(np.float32)


def compiled(function: Callable) -> Callable:
    return jax.jit(function, compiler_options=compiler_options())


def test_a_sum_in_float64_does_not_depend_on_its_order() -> None:
    x = normal(512, 192)
    expected = x.astype(np.float64).mean(-1).astype(np.float32)
    mean = lambda x: x.mean(-1)  # noqa: E731
    in_float64 = compiled(rounding.in_float64(mean))(x)
    assert in_float64.dtype == jnp.float32
    np.testing.assert_array_equal(in_float64, expected)
    assert np.any(np.asarray(compiled(rounding.in_float64(mean, exact=False))(x)) != expected), "float32 must differ"


def test_a_result_has_the_type_of_the_operands() -> None:
    x = jnp.asarray(normal(4, 8), jnp.bfloat16)
    result = rounding.in_float64(lambda x: x.sum(-1))(x)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, np.asarray(x, np.float64).sum(-1).astype(jnp.bfloat16))


def test_a_product_is_rounded_before_it_is_added() -> None:
    x, y, z = normal(3, 4096)
    apart = compiled(lambda x, y, z: rounding.rounded(x * y) + z)(x, y, z)
    np.testing.assert_array_equal(apart, x * y + z)


@pytest.mark.parametrize("exact", [False, True])
def test_erf_is_the_error_function(exact: bool) -> None:
    x = np.concatenate([normal(4096, scale=2.0), np.float32([0.0, -0.0, 5.0, -5.0, np.inf, -np.inf, np.nan, 1e-30])])
    expected = np.array([math.erf(value) for value in x.astype(np.float64)]).astype(np.float32)
    actual = np.asarray(compiled(lambda x: rounding.erf(x, exact))(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    if exact:
        same = (actual == expected) | np.isnan(expected)
        assert same.mean() > 0.99, "the polynomial is within 4e-10: all but a few are the rounded value"


def test_gradients_are_those_of_float32() -> None:
    x, weights = jnp.asarray(normal(6, 5)), normal(6, 5)

    def gradient(function: Callable) -> jax.Array:
        return jax.grad(lambda x: (function(x) * weights).sum())(x)

    for function, plain in (
        (rounding.in_float64(jax.nn.softmax), jax.nn.softmax),
        (lambda x: rounding.erf(x, True), lax.erf),
        (rounding.rounded, lambda x: x),
    ):
        np.testing.assert_array_equal(gradient(function), gradient(plain))
    np.testing.assert_array_equal(jax.grad(lambda x: rounding.rounded(x).sum())(jnp.zeros(3)), 1.0)


def test_attention_is_the_exact_one_rounded() -> None:
    q, k, v = normal(3, 2, 2, 80, 16)
    actual = compiled(rounding.in_float64(causal))(q, k, v)
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    scores = q / 4 @ k.swapaxes(-1, -2)
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * np.tril(np.ones((80, 80)))
    expected = (weights / weights.sum(-1, keepdims=True) @ v).astype(np.float32)
    assert (np.asarray(actual) == expected).mean() > 0.999


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_the_same_function_in_training(name: str) -> None:
    x = jnp.asarray(normal(1000, scale=3.0))
    np.testing.assert_allclose(ACTIVATIONS[name](x, exact=True), ACTIVATIONS[name](x, exact=False), atol=2e-6)
