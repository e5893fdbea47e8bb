"""Products with rounded gradients: their values in every layout, and that a CPU computes them as bfloat16."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from picogpt_jax.devices.cpu import has_bfloat16
from picogpt_jax.devices.setup import compiler_options
from picogpt_jax.kernels import products

BFLOAT16 = jnp.dtype("bfloat16")
SHAPES = [  # (batch, M, K, N)
    ((), 192, 64, 48),
    ((), 48, 64, 192),
    ((), 1, 17, 3),
    ((), 16, 1, 16),
    ((3,), 16, 8, 1),
    ((2, 3), 32, 16, 32),
]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def swapped(array: np.ndarray, swap: bool) -> np.ndarray:
    """Stored the other way around, if `swap`."""
    return np.ascontiguousarray(array.swapaxes(-1, -2)) if swap else array


def rounded(array: np.ndarray) -> np.ndarray:
    return np.asarray(array.astype(BFLOAT16), np.float64)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rhs_is_KN", [True, False])
@pytest.mark.parametrize(("batch", "m", "k", "n"), SHAPES)
def test_gradients_are_products_of_rounded_operands(
    batch: tuple[int, ...], m: int, k: int, n: int, rhs_is_KN: bool, transposed: bool
) -> None:
    """Also where transpositions surround the product, which the compiler must not draw into it."""
    lhs, rhs, gradient = normal(0, *batch, m, k), normal(1, *batch, k, n), normal(2, *batch, m, n)
    dims = len(batch)
    contracted = ((dims + 1,), (dims if rhs_is_KN else dims + 1,))
    dimensions = (contracted, (tuple(range(dims)), tuple(range(dims))))

    def turned(x: jax.Array) -> jax.Array:
        return x.mT if transposed else x

    def backward_pass(lhs: jax.Array, rhs: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        product = lambda lhs, rhs: products.dot_general(lhs, rhs, dimensions, BFLOAT16)  # noqa: E731
        y, gradients = jax.vjp(product, turned(lhs), turned(rhs))
        lhs_gradient, rhs_gradient = gradients(turned(gradient))
        return y, turned(lhs_gradient), turned(rhs_gradient)

    stored = [swapped(lhs, transposed), swapped(rhs, rhs_is_KN == transposed), swapped(gradient, transposed)]
    compiled = jax.jit(backward_pass, compiler_options=compiler_options("cpu"))
    y, lhs_gradient, rhs_gradient = (np.asarray(array) for array in compiled(*stored))

    np.testing.assert_allclose(y, lhs @ rhs, rtol=1e-4, atol=1e-5)  # the product itself is not rounded
    expected = [rounded(gradient) @ rounded(rhs).swapaxes(-1, -2), rounded(lhs).swapaxes(-1, -2) @ rounded(gradient)]
    np.testing.assert_allclose(swapped(lhs_gradient, transposed), expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(swapped(rhs_gradient, rhs_is_KN == transposed), expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "outputs", "is_rounded"), [(None, (4,), False), (BFLOAT16, (4,), True), (BFLOAT16, (2, 2), False)]
)
def test_what_is_rounded(dtype: jnp.dtype | None, outputs: tuple[int, ...], is_rounded: bool) -> None:
    """Nothing without a type, nor where an operand is no matrix."""
    lhs, rhs = jnp.asarray(normal(0, 8, 6)), jnp.asarray(normal(1, 6, 4))
    product = lambda lhs: products.dot_general(lhs, rhs.reshape(6, *outputs), (((1,), (0,)), ((), ())), dtype)  # noqa: E731
    error = np.abs(jax.grad(lambda lhs: product(lhs).sum())(lhs) - rhs.sum(1)[None]).max()
    assert (error > 1e-4) == is_rounded, error
    assert error < 0.02


@pytest.mark.parametrize("transposed", [False, True])
def test_a_cpu_that_multiplies_bfloat16_does_so(transposed: bool) -> None:
    """Not float32 after a conversion back, which the compiler falls into where it does not like a layout."""
    if not has_bfloat16():
        pytest.skip("this processor has no instructions for bfloat16 (avx512_bf16 or amx_bf16)")

    def backward_pass(x: jax.Array, weight: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, weight, gradient = (a.mT if transposed else a for a in (x, weight, gradient))
        dot = lambda x, weight: products.dot_general(x, weight, (((1,), (0,)), ((), ())), BFLOAT16)  # noqa: E731
        return jax.vjp(dot, x, weight)[1](gradient)

    arrays = (swapped(normal(i, *shape), transposed) for i, shape in enumerate([(128, 64), (64, 96), (128, 96)]))
    compiled = jax.jit(backward_pass, compiler_options=compiler_options("cpu")).lower(*arrays).compile()
    operands = re.findall(r"parameter.*\n.*parameter.*\n.* dot\(%(\S+), %(\S+)\)", text := compiled.as_text())
    assert len(operands) == 2, text
    for name in itertools.chain(*operands):
        assert f"%{name} = bf16[" in text, text
