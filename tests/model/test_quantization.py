import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from picogpt_jax.config import Granularity, QuantConfig
from picogpt_jax.model import quantization
from picogpt_jax.model.numerics import Numerics
from picogpt_jax.model.quantization import ROUNDING, QuantizedTensor, converted, quantized_dot_general

quantize = jax.jit(quantization.quantize, static_argnames="granularity")
fake_quantize = jax.jit(quantization.fake_quantize, static_argnums=1)
int8_dot = jax.jit(quantization.int8_dot, static_argnums=2)
dequantize = jax.jit(QuantizedTensor.dequantize)

QUANT = tiny_config().quant
FLOAT32 = jnp.dtype("float32")


def quant(**changes: Any) -> QuantConfig:
    return dataclasses.replace(QUANT, **changes)


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Rows of very different size, as float32."""
    generator = np.random.default_rng(seed)
    sizes = 10.0 ** generator.uniform(-3, 3, (*shape[:-1], 1))
    return (sizes * generator.normal(size=shape)).astype(np.float32)


def grid(x: np.ndarray, granularity: Granularity) -> tuple[np.ndarray, np.ndarray]:
    """The definition, in NumPy: (codes int8, scale float64)."""
    axes = None if granularity == "per_tensor" else -1
    absmax = np.abs(x.astype(np.float64)).max(axes, keepdims=True)
    scale = np.where(absmax == 0, 1.0, absmax / 127)
    inverse = (1 / scale.astype(np.float32)).astype(np.float32)
    clipped = np.clip(x * inverse, np.float32(-127), np.float32(127))
    return np.rint(clipped).astype(np.int8), scale  # rint rounds halves to even


GRANULARITIES: list[Granularity] = ["per_channel", "per_tensor"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(64, 33), (4, 7, 32)])
def test_codes_and_scales_are_the_documented_ones(granularity: Granularity, shape: tuple[int, ...]) -> None:
    x = normal(shape)
    tensor = quantize(x, granularity=granularity)
    codes, scale = grid(x, granularity)
    assert tensor.codes.dtype == jnp.int8
    assert tensor.scale.dtype == jnp.float32
    assert tensor.scale.shape == scale.shape == ((1,) * len(shape) if granularity == "per_tensor" else (*shape[:-1], 1))
    np.testing.assert_array_max_ulp(np.asarray(tensor.scale), scale.astype(np.float32), maxulp=1)
    # A scale that is one unit in the last place off moves a code only where x / scale is a tie, to within float32.
    differing = np.asarray(tensor.codes) != codes
    ratio = x / scale
    ties = np.abs(ratio - np.floor(ratio) - 0.5) < 1e-5 * np.abs(ratio).max()
    assert not np.any(differing & ~ties)
    assert differing.mean() < 0.01
    assert np.abs(np.asarray(tensor.codes, np.int32)).max(-1 if granularity == "per_channel" else None).min() == 127


def test_halves_are_rounded_to_even() -> None:
    x = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], np.float32)  # a scale of exactly one
    tensor = quantize(jnp.asarray(x))
    assert tensor.scale.tolist() == [[1.0]]
    assert tensor.codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_the_largest_value_survives() -> None:
    """absmax / 127: its code is 127 and not, as on AQT's default grid of 127.5 steps, halfway to the next."""
    x = jnp.asarray([[1.0, -0.25, 0.0], [-3.0, 0.1, 0.2]])
    tensor = quantize(x)
    assert tensor.codes[0, 0] == 127
    assert tensor.codes[1, 0] == -127, "symmetric: -128 is not used"
    np.testing.assert_allclose(dequantize(tensor)[:, 0], [1.0, -3.0], rtol=2e-7)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros_stay_zeros_with_a_finite_scale(granularity: Granularity) -> None:
    x = jnp.zeros((3, 4)) if granularity == "per_tensor" else jnp.zeros((3, 4)).at[1].set(2.0)
    tensor = quantize(x, granularity)
    zero_rows = tensor.scale if granularity == "per_tensor" else tensor.scale[::2]
    assert np.all(np.isfinite(zero_rows) & (zero_rows > 0))
    assert not np.any(tensor.codes[::2])
    np.testing.assert_array_equal(dequantize(tensor)[::2], 0.0)


def test_the_codes_do_not_depend_on_the_compute_type() -> None:
    """bfloat16 activations are widened before the scale is taken."""
    x = jnp.asarray(normal((8, 32))).astype(jnp.bfloat16)
    low, high = quantize(x), quantize(x.astype(jnp.float32))
    assert low.scale.dtype == jnp.float32
    np.testing.assert_array_equal(low.codes, high.codes)
    np.testing.assert_array_equal(low.scale, high.scale)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fake_quantization_is_exact_forward_and_straight_through_backward(granularity: Granularity) -> None:
    x = jnp.asarray(normal((16, 32)))
    codes, scale = grid(np.asarray(x), granularity)
    value, gradient = jax.value_and_grad(lambda x: (fake_quantize(x, granularity) * 3.0).sum())(x)
    del value
    np.testing.assert_array_equal(gradient, np.full(x.shape, 3.0))
    quantized = fake_quantize(x, granularity)
    np.testing.assert_array_equal(quantized, dequantize(quantize(x, granularity)))
    np.testing.assert_allclose(quantized, codes * scale, atol=1.01 * scale.max(), rtol=0)
    assert np.any(quantized != x), "something was rounded"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_an_int8_product_is_exact_integer_arithmetic(granularity: Granularity, dtype: Any) -> None:
    """But for the rounding of the sums where the compute type is bfloat16."""
    x, w = np.clip(normal((2, 5, 32), seed=1), -60_000, 60_000), normal((24, 32), seed=2)
    weight = quantize(jnp.asarray(w), granularity)
    activations = quantize(jnp.asarray(x, dtype))
    y = int8_dot(jnp.asarray(x, dtype), weight, 8)
    integers = np.einsum("bti,oi->bto", np.asarray(activations.codes, np.int64), np.asarray(weight.codes, np.int64))
    if dtype == jnp.bfloat16:
        integers = integers.astype(jnp.bfloat16).astype(np.float64)
    expected = integers * np.asarray(activations.scale, np.float64) * np.asarray(weight.scale, np.float64).T
    assert y.shape == (2, 5, 24)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=3e-7)  # three roundings of float32


def test_the_sum_does_not_overflow() -> None:
    """127 * 127 * 1024 needs 24 bits; int16, or the 24 bits of a float32 sum of odd products, would not hold it."""
    weight = QuantizedTensor(codes=jnp.full((1, 1025), 127, jnp.int8), scale=jnp.ones((1, 1)))
    y = int8_dot(jnp.full((1, 1, 1025), 127.0), weight, 8)
    assert int(y[0, 0, 0]) == 127 * 127 * 1025


def test_without_activation_bits_only_the_weight_is_rounded() -> None:
    x, w = normal((2, 5, 32), seed=1), normal((24, 32), seed=2)
    weight = quantize(jnp.asarray(w))
    y = int8_dot(jnp.asarray(x), weight, None)
    expected = x.astype(np.float64) @ (np.asarray(weight.codes) * np.asarray(weight.scale, np.float64)).T
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert np.any(np.abs(y - int8_dot(jnp.asarray(x), weight, 8)) > 1e-3 * np.abs(y).max())


def aqt(mode: str, x: np.ndarray, kernel: np.ndarray, config: QuantConfig) -> tuple[Any, Any]:
    """AQT's product of x [N, in] and a kernel [in, out], and the collection it leaves."""
    module = quantized_dot_general(Numerics(config, mode))
    assert module is not None
    dimensions = (((1,), (0,)), ((), ()))
    apply = lambda x, kernel: module.apply({}, x, kernel, dimensions, None, mutable=["aqt"])  # noqa: E731
    return jax.jit(apply)(x, kernel)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("activation_bits", [8, None])
def test_training_converting_and_serving_give_the_same_bits(
    granularity: Granularity, activation_bits: int | None
) -> None:
    """Weight-only serving multiplies floats, whose sum may be taken in another order: equal to rounding there."""
    config = quant(weight_granularity=granularity, activation_bits=activation_bits)
    x, kernel = normal((20, 32), seed=1), normal((32, 24), seed=2)
    trained, _ = aqt("train", x, kernel, config)
    at_conversion, collection = aqt("convert", x, kernel, config)
    tensor = converted(collection["aqt"])
    weight = QuantizedTensor(codes=tensor.codes.T, scale=tensor.scale.T)
    served = int8_dot(x[None], weight, activation_bits)[0]
    np.testing.assert_array_equal(at_conversion, trained)
    if activation_bits:
        np.testing.assert_array_equal(served, trained)
    else:
        assert np.all(np.abs(served - trained) < 1e-6 * np.abs(trained).max(-1, keepdims=True))
    float_product = x @ kernel
    assert np.any(np.abs(trained - float_product) > 1e-4 * np.abs(float_product)), "something was quantized"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_converted_weight_is_our_own_quantization_of_it(granularity: Granularity) -> None:
    kernel = normal((32, 24), seed=2)
    _, collection = aqt("convert", normal((20, 32)), kernel, quant(weight_granularity=granularity))
    tensor = converted(collection["aqt"])
    ours = quantize(kernel.T, granularity)
    np.testing.assert_array_equal(tensor.codes, ours.codes.T)
    np.testing.assert_array_equal(tensor.scale, ours.scale.T)


def test_one_changed_code_changes_the_product() -> None:
    x = jnp.asarray(normal((1, 3, 32), seed=1))
    weight = quantize(jnp.asarray(normal((24, 32), seed=2)))
    changed = dataclasses.replace(weight, codes=weight.codes.at[5, 7].add(1))
    differing = int8_dot(x, weight, 8) != int8_dot(x, changed, 8)
    assert np.argwhere(differing).tolist() == [[0, token, 5] for token in range(3)]


@pytest.mark.parametrize("activation_bits", [8, None])
def test_gradients_are_those_of_the_float_product(activation_bits: int | None) -> None:
    """A linear loss through one product: dL/dx = g w^T and dL/dw = x^T g exactly, at the float operands."""
    x, kernel, g = normal((20, 32), seed=1), normal((32, 24), seed=2), normal((20, 24), seed=3)
    module = quantized_dot_general(Numerics(quant(activation_bits=activation_bits), "train"))

    def loss(x: jax.Array, kernel: jax.Array, product: Any) -> jax.Array:
        return (product(x, kernel) * g).sum()

    quantized = lambda x, w: module.apply({}, x, w, (((1,), (0,)), ((), ())), None)  # noqa: E731
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    for ours, expected in zip(gradients(x, kernel, quantized), gradients(x, kernel, jnp.matmul), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_int8_gradients_are_rounded_without_bias() -> None:
    """backward_bits=8: one draw is off, the mean over many draws is not."""
    x, kernel, g = (jax.random.normal(jax.random.key(seed), (16, 16)) for seed in range(3))
    module = quantized_dot_general(Numerics(quant(backward_bits=8), "train"), draws=True)

    def gradient(key: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
        rngs = {ROUNDING: key}
        loss = lambda w: (module.apply({}, x, w, (((1,), (0,)), ((), ())), None, rngs=rngs) * g).sum()  # noqa: E731
        return jax.grad(loss)(kernel)

    keys = jax.random.split(jax.random.key(0), 100)
    draws = np.asarray(jax.jit(jax.vmap(gradient, in_axes=(0, None, None)))(keys, x, kernel))
    expected = x.T @ g
    spread = draws.std(0)
    assert spread.min() > 0, "every draw is rounded in its own way"
    assert np.abs(draws[0] - expected).max() < 0.1 * np.abs(expected).max()
    in_standard_errors = (draws.mean(0) - expected) / (spread / 100**0.5)
    assert np.sqrt((in_standard_errors**2).mean()) < 1.5, "1 is pure chance"


def test_float_mode_has_no_quantizer() -> None:
    assert quantized_dot_general(Numerics(QUANT, "float")) is None
