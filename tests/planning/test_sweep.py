import dataclasses
from typing import Any

import pytest
from tiny import tiny_config

from picogpt_jax.config import MeshConfig
from picogpt_jax.errors import UserError
from picogpt_jax.planning import sweep


def test_the_default_meshes_use_every_chip_once() -> None:
    for devices in (4, 64, 256):
        shapes = [dataclasses.astuple(mesh) for mesh in sweep.mesh_shapes(devices)]
        assert len(set(shapes)) == len(shapes) >= 3
        assert {data * fsdp * tensor for data, fsdp, tensor in shapes} == {devices}


def fake_plan(config: Any, topology: str, quick: bool) -> dict[str, Any]:
    """Half as fast with every factor of fsdp; a batch of 64 does not fit. In full int8 is faster, quickly slower."""
    if config.mesh.tensor > 1:
        raise UserError("25 heads do not divide")
    row = {"topology": topology, "chips": int(topology[-1]) ** 2, "mesh": dataclasses.asdict(config.mesh)}
    row |= {
        "batch_size": config.train.batch_size,
        "quant_mode": config.quant.mode,
        "fits": config.train.batch_size < 64,
        "quick": quick,
    }
    if row["fits"]:
        int8 = 0.4 if quick else 1.5
        rate = 1000.0 * (int8 if config.quant.mode == "int8" else 1) / config.mesh.fsdp * row["chips"] ** 0.5
        row |= {"tokens_per_second": rate, "step_time_ms": 1.0, "mfu": 0.5, "compile_seconds": 1.0}
    return row


def shapes(rows: list[dict[str, Any]]) -> list[tuple[int, str, bool]]:
    return [(row["mesh"]["fsdp"], row["quant_mode"], row["quick"]) for row in rows if row["fits"]]


def test_a_comparison_ranks_what_fits_and_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "make_plan", fake_plan)
    meshes = [
        MeshConfig(data=2, fsdp=2, tensor=1),
        MeshConfig(data=4, fsdp=1, tensor=1),
        MeshConfig(data=2, fsdp=1, tensor=2),
    ]
    said: list[str] = []
    rows = sweep.compare(tiny_config(), "v5e:2x2", meshes, [32, 64], quick=False, progress=said.append)
    assert len(rows) == len(said) == 3 * 2 * 2
    assert shapes(rows) == [(1, "int8", False), (1, "none", False), (2, "int8", False), (2, "none", False)]
    assert [row["fits"] for row in rows] == [True] * 4 + [False] * 8
    assert sum("25 heads" in row.get("error", "") for row in rows) == 4


def test_the_best_of_each_type_are_compiled_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "make_plan", fake_plan)
    meshes = [MeshConfig(data=8 // fsdp, fsdp=fsdp, tensor=1) for fsdp in (1, 2, 4, 8)]
    said: list[str] = []
    rows = sweep.compare(tiny_config(), "v5e:2x2", meshes, [32, 64], progress=said.append)
    in_full = [(1, "int8", False), (1, "none", False), (2, "int8", False), (2, "none", False)]
    quickly = [(4, "none", True), (8, "none", True), (4, "int8", True), (8, "int8", True)]
    assert shapes(rows) == in_full + quickly
    assert len(said) == 4 * 2 * 2 + 4
    monkeypatch.setattr(sweep, "make_plan", lambda config, topology, quick: fake_plan(config, topology, False))
    said.clear()
    rows = sweep.compare(tiny_config(), "h100:4", meshes, [32], progress=said.append)
    assert len(said) == 4 * 2, "what was compiled in full at once, as for GPUs, is not compiled again"
    monkeypatch.setattr(sweep, "make_plan", fake_plan)
    every = sweep.compare(tiny_config(), "v5e:2x2", meshes, [32], quick=True, progress=said.append)
    assert all(quick for _, _, quick in shapes(every))


def test_weak_scaling_grows_the_batch_with_the_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "make_plan", fake_plan)
    monkeypatch.setattr(sweep, "topology_devices", lambda name: [None] * int(name[-1]) ** 2)
    config = tiny_config(train__batch_size=2)
    rows = sweep.weak_scaling(config, ["v5e:2x2", "v5e:4x4"], progress=lambda line: None)
    assert [(row["chips"], row["batch_size"]) for row in rows] == [(4, 2), (16, 8)]
    assert [row["efficiency"] for row in rows] == [1.0, pytest.approx(0.5)]


def test_a_weak_scaling_takes_a_mesh_for_each_slice_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "make_plan", fake_plan)
    monkeypatch.setattr(sweep, "topology_devices", lambda name: [None] * int(name[-1]) ** 2)
    meshes = [MeshConfig(data=1, fsdp=4, tensor=1), MeshConfig(data=2, fsdp=8, tensor=1)]
    rows = sweep.weak_scaling(tiny_config(), ["v5e:2x2", "v5e:4x4"], meshes, progress=lambda line: None)
    assert [row["mesh"]["fsdp"] for row in rows] == [4, 8]
    with pytest.raises(UserError, match="2 meshes for 1 slices"):
        sweep.weak_scaling(tiny_config(), ["v5e:2x2"], meshes)
