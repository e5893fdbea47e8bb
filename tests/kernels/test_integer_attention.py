"""The integer attention kernel, by Pallas' interpreter: the bits of the form that stores the scores."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from picogpt_jax.config import MeshConfig
from picogpt_jax.devices import sharding
from picogpt_jax.kernels import integer_attention
from picogpt_jax.model import integer

pytestmark = pytest.mark.usefixtures("compile_quickly_and_once")

Operands = tuple[tuple[jax.Array, jax.Array], ...]


def drawn(kind: str, *shape_BHTD: int) -> Operands:
    """Codes and exponents of q, k and v, as `integer.quantize` could give them."""
    draw = np.random.default_rng(0)
    codes = draw.integers(-127, 128, (3, *shape_BHTD))
    exponents = draw.integers(-12, -4, (3, *shape_BHTD[:3], 1))
    if kind == "sharp":  # a weight of nearly 1 for one key
        exponents[:2] += 4
    elif kind == "flat":  # all weights alike, and the largest sums that there are
        codes = np.full_like(codes, 127)
        exponents[:] = [[[[[-12]]]], [[[[-12]]]], [[[[9]]]]]
    elif kind == "zeros":
        codes[:] = 0
    return tuple((jnp.asarray(c, jnp.int8), jnp.asarray(e, jnp.int8)) for c, e in zip(codes, exponents, strict=True))


def kernel(form: Any, block_size: int, qkv: Operands) -> jax.Array:
    return integer_attention.attention(form, *qkv, integer.weight_bits(block_size), interpret=True)


@pytest.mark.parametrize(
    ("form", "kind", "time", "size", "block_size"),
    [
        ("cudnn", "even", 136, 64, 1024),  # two blocks and a part
        ("cudnn", "sharp", 64, 24, 256),  # features that are filled up; weights that are bytes
        ("splash", "sharp", 256, 64, 2048),
        ("splash", "even", 128, 32, 256),
        ("splash", "flat", 256, 32, 256),
        ("splash", "zeros", 128, 32, 1024),
    ],
)
def test_the_kernel_gives_the_bits_of_the_plain_form(
    form: str, kind: str, time: int, size: int, block_size: int
) -> None:
    qkv = drawn(kind, 1, 2, time, size)
    expected, _ = jax.jit(lambda qkv: integer.attention(*qkv, 0, block_size))(qkv)
    np.testing.assert_array_equal(kernel(form, block_size, qkv), expected)
    assert np.any(expected) == (kind != "zeros")


def test_each_device_has_its_own_sequences_and_heads() -> None:
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), 2, jax.devices()[:4])
    qkv = drawn("even", 2, 4, 64, 32)

    @jax.jit
    def attend(qkv: Operands) -> jax.Array:
        with sharding.on(mesh):
            return kernel("cudnn", 256, qkv)

    place = jax.NamedSharding(mesh, sharding.partition_spec(("batch", "heads")))
    found = attend(jax.device_put(qkv, place))
    assert found.sharding.shard_shape(found.shape) == (1, 2, 64, 32)
    np.testing.assert_array_equal(found, kernel("cudnn", 256, qkv))


@pytest.mark.parametrize(
    ("form", "platform", "target"), [("cudnn", "cuda", "__gpu$xla.gpu.triton"), ("splash", "tpu", "tpu_custom_call")]
)
@pytest.mark.parametrize("size", [8, 80])
def test_the_kernel_is_written_for_each_device(form: Any, platform: str, target: str, size: int) -> None:
    attend = functools.partial(integer_attention.attention, form, weight_bits=8)
    lowered = jax.jit(attend).trace(*drawn("even", 1, 2, 384, size)).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count(target) == 1
