import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from picogpt_jax.config import MeshConfig
from picogpt_jax.devices.sharding import make_mesh
from picogpt_jax.errors import UserError
from picogpt_jax.training import integrity

NUMBERS = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)


def test_the_checksum_is_the_formula() -> None:
    """Written again in Python, whose integers have no end."""
    total = 0
    for at, bits in enumerate(NUMBERS.reshape(-1).view(np.uint32).tolist()):
        position = at
        for factor, shift in ((0x7FEB352D, 15), (0x846CA68B, 16)):
            position = (position ^ (position >> shift)) * factor % 2**32
        total += bits * (position | 1)
    assert int(integrity.checksum(NUMBERS)) == total % 2**32


def test_the_checksum_does_not_depend_on_the_devices() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), 8)
    for spec in (PartitionSpec(), PartitionSpec("data"), PartitionSpec("tensor", "data")):
        array = jax.device_put(NUMBERS, NamedSharding(mesh, spec))
        assert int(integrity.checksum(array)) == int(integrity.checksum(NUMBERS))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.int32, jnp.uint16, jnp.bool_])
def test_one_changed_element_changes_the_checksum(dtype: Any) -> None:
    array = jnp.asarray(NUMBERS > 0 if dtype == jnp.bool_ else NUMBERS * 8).astype(dtype)
    before = int(integrity.checksum(array))
    for at in np.ndindex(2, 12):
        changed = array.at[at].set(~array[at] if dtype == jnp.bool_ else array[at] + 1)
        assert int(integrity.checksum(changed)) != before
    assert int(integrity.checksum(array.at[jnp.array([0, 1])].set(array[jnp.array([1, 0])]))) != before, "two swapped"


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "tensor")])
def test_checksums_need_no_memory(spec: PartitionSpec) -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), 8)
    array = jax.ShapeDtypeStruct((4096, 512), jnp.float32, sharding=NamedSharding(mesh, spec))
    compiled = integrity.compiled_checksums().lower({"one": array, "other": array}).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024


STATE = {"params": {"wte": jnp.ones((3, 2)), "step": jnp.int32(4)}}


def test_a_manifest_names_what_there_is() -> None:
    manifest = integrity.manifest(STATE)
    assert {name: (entry["shape"], entry["dtype"]) for name, entry in manifest.items()} == {
        "params/wte": ([3, 2], "float32"),
        "params/step": ([], "int32"),
    }
    integrity.check_fits(manifest, jax.eval_shape(lambda: STATE), "here")
    integrity.check_unchanged(manifest, STATE, "here")
    changed = {"params": {**STATE["params"], "step": jnp.int32(5)}}
    with pytest.raises(UserError, match="checkpoint here is damaged: not the numbers that were saved: params/step"):
        integrity.check_unchanged(manifest, changed, "here")


def test_a_long_list_of_names_is_cut() -> None:
    state = {f"{index:02}": jnp.zeros(()) for index in range(20)}
    with pytest.raises(UserError, match="unexpected: 00, 01, 02, 03, 04, 05, 06, 07 and 12 more"):
        integrity.check_fits(integrity.manifest(state), {}, "here")


def test_sealed_meta_data_show_every_change() -> None:
    meta = {"config": {"model": {"n_layer": 3}}, "best_val_loss": float("inf"), "text": "é"}
    sealed = integrity.seal(meta, integrity.manifest(STATE))
    assert integrity.unseal(copy.deepcopy(sealed)) == (meta, sealed["arrays"])
    for damage in (
        lambda it: it["meta"]["config"]["model"].update(n_layer=4),
        lambda it: it["arrays"]["params/wte"].update(checksum=0),
        lambda it: it.pop("crc32"),
        lambda it: it.pop("arrays"),
        lambda it: it.update(meta=it.pop("meta") | {"config": {}}),
    ):
        other = copy.deepcopy(sealed)
        damage(other)
        with pytest.raises(UserError, match="the meta data are not those that were saved"):
            integrity.unseal(other)
    with pytest.raises(UserError, match="the meta data are not"):
        integrity.unseal([1])


def test_meta_data_from_before_the_seals_are_read() -> None:
    assert integrity.unseal({"config": {}, "val_loss": 1.0}) == ({"config": {}, "val_loss": 1.0}, None)
