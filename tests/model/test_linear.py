"""The matmul and its pieces, against NumPy."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from picogpt_jax.config import Granularity
from picogpt_jax.devices.setup import compiler_options
from picogpt_jax.model.linear import Embedding, in_parts, init_stddev, matmul
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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(weight_granularity="per_tensor"),
        dict(activation_bits=None),
        dict(arithmetic="integer"),
        dict(mode="none"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_table_that_is_prepared_makes_the_same_logits(changes: dict[str, Any], dtype: str) -> None:
    """In every bit; rows beyond the tokens in use are padding."""
    quant = dataclasses.replace(tiny_config().quant, **changes)
    numerics = Numerics(quant, "train" if quant.mode == "int8" else "float", jnp.dtype(dtype))
    embedding = Embedding(12, 8, ("vocab", "embed"), numerics, used=10)
    variables = {"params": {"embedding": normal(0, 12, 8)}}
    x = normal(1, 2, 5, 8).astype(jnp.float32 if numerics.is_integer else numerics.dtype)
    empty = {"params": {"embedding": jnp.zeros((12, 8))}}

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def both(variables: Any, empty: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        table = embedding.apply(variables, method="multiplied")
        return embedding.apply(variables, x, method="attend"), embedding.apply(empty, x, table, method="attend")

    np.testing.assert_array_equal(*both(variables, empty, x))


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_few_rows_are_looked_up_like_many(granularity: Granularity) -> None:
    """Values and gradients: whether rows are quantized before they are looked up or after."""
    quant = dataclasses.replace(tiny_config().quant, weight_granularity=granularity)
    embedding = Embedding(12, 8, ("vocab", "embed"), Numerics(quant, "train"))
    ids, weights = jnp.array([3, 7, 3]), normal(1, 3, 8)

    def rows(table: jax.Array, ids: jax.Array) -> jax.Array:
        return embedding.apply({"params": {"embedding": table}}, ids)[:3]

    many = jnp.concatenate([ids, jnp.zeros(20, jnp.int32)])
    few_rows, few_gradient = jax.vjp(lambda table: rows(table, ids), normal(0, 12, 8))
    many_rows, many_gradient = jax.vjp(lambda table: rows(table, many), normal(0, 12, 8))
    np.testing.assert_array_equal(few_rows, many_rows)
    np.testing.assert_array_equal(few_gradient(weights)[0], many_gradient(weights)[0])


def test_projections_into_the_residual_stream_start_smaller_the_deeper_the_model() -> None:
    assert init_stddev("c_fc", 8) == 0.02
    assert init_stddev("c_proj", 8) == pytest.approx(0.02 / 4)
