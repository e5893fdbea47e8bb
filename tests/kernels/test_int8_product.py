import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from picogpt_jax.config import MeshConfig
from picogpt_jax.devices.cpu import wants_unsigned_int8
from picogpt_jax.devices.setup import compiler_options
from picogpt_jax.devices.sharding import batch_sharding, make_mesh, on, replicated
from picogpt_jax.kernels import int8_product
from picogpt_jax.kernels.int8_product import int8_dot_general
from picogpt_jax.kernels.products import Dimensions

COLLECTIVES = re.compile("all-to-all|all-reduce|all-gather|collective-permute")
ROWS_TIMES_MATRIX: Dimensions = (((1,), (0,)), ((), ()))


@pytest.fixture(params=[True, False], ids=["unsigned", "signed"])
def wants_unsigned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(int8_product, "wants_unsigned_int8", lambda: request.param)
    return bool(request.param)


def codes(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).integers(-128, 128, shape), jnp.int8)


@pytest.mark.parametrize(
    ("lhs", "rhs", "dimensions"),
    [
        ((64, 48), (48, 24), ROWS_TIMES_MATRIX),
        ((1, 48), (48, 24), ROWS_TIMES_MATRIX),
        ((3, 1, 48), (24, 48), (((2,), (1,)), ((), ()))),
        ((3, 20, 48), (24, 48), (((2,), (1,)), ((), ()))),
        ((2, 5, 48), (3, 8, 48), (((2,), (2,)), ((), ()))),
        ((48,), (48, 24), (((0,), (0,)), ((), ()))),
        ((48, 5), (48, 24), (((0,), (0,)), ((), ()))),
        ((4, 0), (0, 3), ROWS_TIMES_MATRIX),
        ((0, 4), (4, 3), ROWS_TIMES_MATRIX),
        ((4, 5, 48), (4, 48, 6), (((2,), (1,)), ((0,), (0,)))),
    ],
)
def test_gives_the_integers_of_the_plain_product(
    lhs: tuple[int, ...], rhs: tuple[int, ...], dimensions: Dimensions, wants_unsigned: bool
) -> None:
    a, b = codes(*lhs), codes(*rhs)
    expected = lax.dot_general(a.astype(jnp.int32), b.astype(jnp.int32), dimensions)
    result = jax.jit(lambda a, b: int8_dot_general(a, b, dimensions))(a, b)
    assert result.dtype == jnp.int32
    np.testing.assert_array_equal(result, expected)


def test_sums_may_wrap_around_on_the_way(wants_unsigned: bool) -> None:
    a, b = jnp.full((2, 130_000), 127, jnp.int8), jnp.full((130_000, 1), 127, jnp.int8)
    result = jax.jit(lambda a, b: int8_dot_general(a, b, ROWS_TIMES_MATRIX))(a, b)
    np.testing.assert_array_equal(result, 127 * 127 * 130_000)  # with 128 more on the left it is above 2^31


@pytest.mark.parametrize("axes", [(0, None), (1, 0), (None, 2)])
def test_can_be_vectorized(axes: tuple[int | None, int | None], wants_unsigned: bool) -> None:
    shapes = [(20, 48), (48, 24)]
    a, b = (
        codes(*(shape if axis is None else np.insert(shape, axis, 5))) for shape, axis in zip(shapes, axes, strict=True)
    )
    product = jax.vmap(lambda a, b: int8_dot_general(a, b, ROWS_TIMES_MATRIX), axes)
    expected = jax.vmap(lambda a, b: a.astype(jnp.int32) @ b.astype(jnp.int32), axes)(a, b)
    np.testing.assert_array_equal(product(a, b), expected)


@pytest.mark.parametrize("shape", [(2, 48), (64, 48), (2, 1, 48), (6, 3, 48)], ids=str)
def test_rows_may_be_split_over_devices(shape: tuple[int, ...], wants_unsigned: bool) -> None:
    """Each device multiplies its own rows and asks no other, also where it has a single one."""
    a, b = codes(*shape), codes(48, 24)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=1), shape[0], jax.devices()[:2])
    dimensions: Dimensions = (((len(shape) - 1,), (0,)), ((), ()))

    @jax.jit
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        with on(mesh):
            return int8_dot_general(a, b, dimensions)

    operands = jax.device_put(a, batch_sharding(mesh)), jax.device_put(b, replicated(mesh))
    np.testing.assert_array_equal(product(*operands), a.astype(jnp.int32) @ b.astype(jnp.int32))
    assert not COLLECTIVES.findall(product.lower(*operands).compile().as_text() or "")


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2)])
def test_split_weights_take_the_plain_product(
    data: int, fsdp: int, tensor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum over them could be a collective of its own."""
    monkeypatch.setattr(int8_product, "wants_unsigned_int8", lambda: True)
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), 8, devices)
    with on(mesh):
        jaxpr = jax.make_jaxpr(lambda a, b: int8_dot_general(a, b, ROWS_TIMES_MATRIX))(codes(8, 48), codes(48, 24))
    assert ("int8_dot" in str(jaxpr)) == (fsdp == tensor == 1)


def test_within_another_mesh_it_is_the_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_product, "wants_unsigned_int8", lambda: True)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jaxpr = jax.make_jaxpr(lambda a, b: int8_dot_general(a, b, ROWS_TIMES_MATRIX))(codes(8, 48), codes(48, 24))
    assert "int8_dot" not in str(jaxpr)


def test_a_device_that_computes_for_itself_takes_its_fast_kernel(wants_unsigned: bool) -> None:
    a, b = codes(8, 48), codes(48, 24)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = jax.shard_map(
        lambda a, b: int8_dot_general(a, b, ROWS_TIMES_MATRIX),
        mesh=mesh,
        in_specs=(PartitionSpec("rows"), PartitionSpec()),
        out_specs=PartitionSpec("rows"),
    )
    np.testing.assert_array_equal(split(a, b), a.astype(jnp.int32) @ b.astype(jnp.int32))
    assert ("int8_dot" in str(jax.make_jaxpr(split)(a, b))) == wants_unsigned


def test_accelerators_get_the_plain_product(wants_unsigned: bool) -> None:
    product = jax.jit(lambda a, b: int8_dot_general(a, b, ROWS_TIMES_MATRIX)).trace(codes(4, 48), codes(48, 24))
    texts = {name: product.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu", "cuda")}
    assert {name for name, text in texts.items() if "xui8>" in text} == ({"cpu"} if wants_unsigned else set())


@pytest.mark.parametrize("rows", [1, 2, 64])
def test_a_fast_kernel_takes_the_unsigned_bytes(rows: int) -> None:
    if not wants_unsigned_int8():
        pytest.skip("this processor has fast products of signed bytes, or none")
    compiled = (
        jax.jit(lambda a, b: int8_dot_general(a, b, ROWS_TIMES_MATRIX), compiler_options=compiler_options())
        .lower(codes(rows, 192), codes(192, 64))
        .compile()
        .as_text()
    )
    # What YNNPACK does not take is computed by int32 copies of the operands.
    assert compiled is not None
    assert "ynn_fusion" in compiled
    assert "s32[192,64]" not in compiled
