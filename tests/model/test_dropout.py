import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from picogpt_jax.config import MeshConfig
from picogpt_jax.devices.sharding import BATCH_AXES, make_mesh
from picogpt_jax.model.dropout import DropoutKey, fold
from picogpt_jax.model.dropout import dropout as eager_dropout

dropout = jax.jit(eager_dropout, static_argnums=(1, 3))
SHAPE = (16, 128, 64)
N = 16 * 128 * 64


def key(step: int = 0, row: int = 0, seed: int = 1337) -> DropoutKey:
    return DropoutKey(seed=fold(seed, step), row=jnp.uint32(row))


def mask(rate: float = 0.5, site: str = "site", step: int = 0, seed: int = 1337) -> np.ndarray:
    """1 where an element is kept; float64 [16, 128, 64]."""
    kept = dropout(jnp.ones(SHAPE), rate, key(step, seed=seed), site)
    return np.asarray(kept > 0, np.float64)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements_is_the_rate(rate: float) -> None:
    four_sigma = 4 * (rate * (1 - rate) / N) ** 0.5
    for step in range(5):
        assert abs((1 - mask(rate, step=step).mean()) - rate) < four_sigma


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_kept_is_scaled_and_the_rest_is_zero(dtype: jnp.dtype) -> None:
    x = jax.random.normal(jax.random.key(0), SHAPE).astype(dtype) + 3
    y = dropout(x, 0.25, key(), "site")
    assert y.dtype == dtype
    kept = mask(0.25) > 0
    np.testing.assert_array_equal(y[kept], (x * (1 / 0.75)).astype(dtype)[kept])
    assert not np.any(y[~kept])


def test_the_gradient_flows_where_the_value_did() -> None:
    gradient = jax.grad(lambda x: eager_dropout(x, 0.25, key(), "site").sum())(jnp.ones(SHAPE))
    np.testing.assert_allclose(gradient, mask(0.25) / 0.75, rtol=1e-6)


def test_dropout_is_off_without_a_key_and_at_rate_zero() -> None:
    x = jnp.ones((2, 3))
    assert eager_dropout(x, 0.5, None, "site") is x
    assert eager_dropout(x, 0.0, key(), "site") is x


def test_a_rate_just_below_one_is_a_rate() -> None:
    assert not np.any(dropout(jnp.ones(SHAPE), 1 - 1e-12, key(), "site"))


def test_masks_are_independent_of_one_another() -> None:
    """Between sites, steps and seeds; and within a mask between rows, positions and features."""
    first = mask()
    pairs = {
        "sites": (first, mask(site="other site")),
        "steps": (first, mask(step=1)),
        "distant steps": (first, mask(step=1 << 20)),
        "seeds": (first, mask(seed=1338)),
        "rows": (first[:-1], first[1:]),
        "positions": (first[:, :-1], first[:, 1:]),
        "features": (first[..., :-1], first[..., 1:]),
        "rows eight apart": (first[:-8], first[8:]),
    }
    for name, (one, other) in pairs.items():
        correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 4 / one.size**0.5, name


def test_no_row_position_or_feature_is_favoured() -> None:
    first = mask()
    for axis, size in enumerate(SHAPE):
        others = tuple(other for other in range(3) if other != axis)
        deviation = np.abs(first.mean(others) - 0.5).max()
        assert deviation < 5 * 0.5 / (N / size) ** 0.5, axis  # 5 sigma: the largest of up to 128 means


def test_every_step_has_a_seed_of_its_own() -> None:
    seeds = jax.vmap(lambda step: fold(1337, step))(jnp.arange(100_000, dtype=jnp.uint32))
    assert len(np.unique(seeds)) == 100_000


def test_the_mask_is_the_documented_hash() -> None:
    """Written again in NumPy: the masks do not change between platforms or releases."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x735A2D97)
        return x ^ (x >> np.uint32(15))

    def fold_numpy(seed: np.ndarray, value: int) -> np.ndarray:
        return mix(mix(seed + np.uint32(0x9E3779B9)) ^ np.uint32(value))

    seed = fold_numpy(fold_numpy(np.array([1337], np.uint32), 3), zlib.crc32(b"site"))
    index = np.arange(N, dtype=np.uint32).reshape(SHAPE)
    expected = mix(index * np.uint32(0x9E3779B1) + seed) >= np.uint32(round(0.1 * 2**32))
    np.testing.assert_array_equal(mask(0.1, step=3), expected)


def test_a_batch_in_parts_is_dropped_like_the_whole() -> None:
    x = jnp.ones(SHAPE)
    whole = dropout(x, 0.5, key(), "site")
    for first in (0, 4, 8, 12):
        part = dropout(x[first : first + 4], 0.5, key(row=first), "site")
        np.testing.assert_array_equal(part, whole[first : first + 4])
    assert np.any(dropout(x[4:8], 0.5, key(row=0), "site") != whole[4:8]), "the offset matters"


@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_the_mask_does_not_depend_on_the_devices(data: int, tensor: int) -> None:
    devices = jax.devices()[: data * tensor]
    mesh = make_mesh(MeshConfig(data=data, fsdp=1, tensor=tensor), batch_size=16, devices=devices)
    place = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, "tensor"))
    drop = jax.jit(eager_dropout, static_argnums=(1, 3), out_shardings=place)
    x = jax.device_put(jnp.ones(SHAPE), place)
    y = drop(x, 0.5, key(), "site")
    assert y.addressable_shards[0].data.shape == (16 // data, 128, 64 // tensor)
    np.testing.assert_array_equal(np.asarray(y) > 0, mask() > 0)
