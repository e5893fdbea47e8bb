"""The matmul and its pieces, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from picogpt_jax.model.linear import in_parts, init_stddev, matmul
from picogpt_jax.model.numerics import Numerics
from picogpt_jax.model.quantization import QuantizedTensor, int8_dot


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(("in_dim", "shape"), [(0, (4, 6)), (1, (6, 4)), (0, (4, 3, 2))])
def test_the_matmul_contracts_the_dimension_it_is_told(in_dim: int, shape: tuple[int, ...]) -> None:
    x, weight = normal(0, 2, 5, 4), normal(1, *shape)
    found = matmul(x, weight, in_dim, None, Numerics(tiny_config().quant, "float"))
    np.testing.assert_allclose(found, np.tensordot(x, weight, (2, in_dim)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [12, 1])
def test_a_weight_in_parts_multiplies_like_the_whole(rows: int) -> None:
    codes = jax.random.randint(jax.random.key(0), (12, 8), -127, 128, jnp.int8)
    weight = QuantizedTensor(codes=codes, scale=jnp.abs(normal(1, rows, 1)) + 0.1)
    x = normal(2, 2, 5, 8)
    whole = int8_dot(x, weight, 8)
    apart = int8_dot(x, in_parts(weight, (3, 4)), 8)
    np.testing.assert_array_equal(apart, whole.reshape(2, 5, 3, 4))


def test_projections_into_the_residual_stream_start_smaller_the_deeper_the_model() -> None:
    assert init_stddev("c_fc", 8) == 0.02
    assert init_stddev("c_proj", 8) == pytest.approx(0.02 / 4)
