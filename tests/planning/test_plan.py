"""Plans of a small model, one of them really compiled by the TPU compiler (libtpu, in the extra dev)."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, RunScript
from tiny import tiny_config

from picogpt_jax.devices import setup
from picogpt_jax.devices.chips import chip_of
from picogpt_jax.errors import UserError
from picogpt_jax.planning import plan
from picogpt_jax.planning.cost import Collective

# Two layers, scanned, in two parts: each product of a layer stands once in the program, and runs four times.
LAYERS, PARTS, CHIPS = 2, 2, 4
SMALL = [f"model.n_layer={LAYERS}", "model.n_head=2", "model.n_embd=128", "model.block_size=128"]
SMALL += ["model.vocab_size=256", "model.dropout=0.0", "mesh.data=2", "mesh.fsdp=2", "train.scan_layers=True"]
SMALL += ["train.batch_size=16", f"train.gradient_accumulation_steps={PARTS}"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plan of a small QAT training on four chips, as scripts/plan.py writes it; what it prints under "text"."""
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    arguments = [f"--config={ROOT / 'configs' / 'base.py'}", "--topology=v5e:2x2", "--quick", f"--json={file}"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "plan.py"), *arguments, *(f"--config.{key}" for key in SMALL)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        capture_output=True,
        text=True,
        timeout=300.0,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(file.read_text(encoding="utf-8")) | {"text": result.stdout}


def test_a_plan_holds_what_the_contract_names(small: dict[str, Any]) -> None:
    keys = "chips parameters bytes_per_chip chip_memory_bytes fits flops_per_step collectives step_time_ms "
    assert set((keys + "tokens_per_second mfu").split()) <= set(small)
    assert (small["chips"], small["chip"], small["mesh"]) == (CHIPS, "TPU v5e", {"data": 2, "fsdp": 2, "tensor": 1})
    assert all({"count", "bytes"} <= set(row) for row in small["collectives"].values())
    assert "6 N + 12 L T C" in small["text"]
    assert "What the estimate leaves out" in small["text"]


def test_the_matmuls_of_qat_are_int8_forward_and_bfloat16_backward(small: dict[str, Any]) -> None:
    matmuls = small["matmuls"]
    assert matmuls["int8"]["count"] == PARTS * (4 * LAYERS + 1)
    # Two products of the gradient for each of them; the attention kernels have 2, 3 and 4 products.
    assert matmuls["bfloat16"]["count"] == PARTS * (2 * (4 * LAYERS + 1) + 9 * LAYERS)
    assert matmuls["float32"]["count"] == 0
    # The formula counts 6 products of attention: the kernels compute the scores and their gradient twice.
    again = 6 * LAYERS * 128 * 128 * small["tokens_per_step"]
    assert small["flops_per_step"] == small["model_flops_per_step"] + again


def test_parameters_are_split_and_gathered_as_int8(small: dict[str, Any]) -> None:
    collectives = small["collectives"]
    assert collectives["all-gather"]["count"] > 0
    assert all(row["bytes"] > 0 for row in collectives.values())
    gathered = [row for row in small["largest_collectives"] if row["kind"] == "all-gather" and row["dtype"] == "s8"]
    assert [row["axes"] for row in gathered] == ["fsdp"]
    codes = PARTS * (LAYERS * 8 * 128 * 128 + 256 * 128)  # bytes of c_attn, c_proj, c_fc, c_proj and wte
    assert gathered[0]["bytes"] == codes
    norms = small["parameter_bytes_per_chip"] - small["parameter_bytes"] / 2
    assert 0 < norms < 8192, "half a chip, but LayerNorms are on every one"


@pytest.mark.parametrize("rings", [False, True])
def test_sixteen_chips_in_a_row_gather_weights_before_they_multiply(
    rings: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself, the compiler makes loops of products and transfers, unrolled by two: they are counted as well."""
    if rings:
        monkeypatch.setattr(setup, "TPU_OPTIONS", {})
    config = tiny_config(
        **dict(model__n_layer=1, model__n_embd=256, model__block_size=128, model__vocab_size=256, model__dropout=0.0),
        **dict(train__batch_size=64, train__dtype="bfloat16", mesh__data=1, mesh__fsdp=16),
    )
    found = plan.make_plan(config, "v5e:4x4", quick=True)
    transfers = found["collectives"].get("collective-permute", {"count": 0})["count"]
    assert (transfers > 100) == rings, "no rings: this test is about nothing" if rings else "int8 sums are in bfloat16"
    assert (found["matmuls"]["int8"]["count"] == 4 + 1) == (not rings)
    again = 6 * 128 * 256 * found["tokens_per_step"]
    assert found["flops_per_step"] == found["model_flops_per_step"] + again


def test_memory_and_time_are_those_of_a_step_that_fits(small: dict[str, Any]) -> None:
    assert small["fits"] is True
    assert sum(small["memory"].values()) == small["bytes_per_chip"]
    assert small["memory"]["temporaries"] > 0
    state = small["parameter_bytes_per_chip"] + small["optimizer_bytes_per_chip"]
    assert state < small["memory"]["arguments"] < 1.2 * state
    assert small["optimizer_bytes"] == pytest.approx(2 * small["parameter_bytes"], rel=1e-3), "Adam's two moments"
    longest = max(small[f"{what}_ms"] for what in ("compute", "memory"))
    assert longest <= small["step_time_ms"] <= small["step_time_ms_nothing_hidden"]
    assert small["tokens_per_second"] == pytest.approx(16 * 128 / (1e-3 * small["step_time_ms"]))
    assert 0 < small["mfu_nothing_hidden"] <= small["mfu"] < 1


def test_an_unknown_topology_names_known_ones(run_script: RunScript) -> None:
    result = run_script("scripts/plan.py", f"--config={ROOT / 'configs' / 'base.py'}", "--topology=v99:2x2")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --topology=v99:2x2 begins with no chip that is known; give one such as ")
    assert "v4:4x4x8, v5e:16x16, v5p:4x4x8, v6e:16x16" in result.stderr
    assert "a100:8, h100:8, h200:8, b200:8" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["v5e:3x3", "v5e", "v5e:16x16x16x16", "v5e:"])
def test_an_impossible_slice_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="give a chip and the shape of a slice, such as v4:4x4x8, v5e:16x16"):
        plan.topology_devices(name)


@pytest.mark.parametrize(
    ("name", "devices", "a_chip"), [("v4:2x2x1", 4, 1), ("v5p:2x2x1", 4, 1), ("tpu7x:2x2x1", 8, 2)]
)
def test_the_cores_of_a_chip_are_seen_as_jax_shows_them(name: str, devices: int, a_chip: int) -> None:
    found = plan.topology_devices(name)
    chips = {tuple(device.coords) for device in found}
    assert (len(found), len(found) // len(chips)) == (devices, a_chip)
    chip = chip_of(found[0].device_kind)
    assert chip is not None
    assert chip.devices == a_chip


def test_without_the_compiler_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'picogpt_jax\[tpu\]'"):
        plan.topology_devices("v5e:2x2")


def test_a_mesh_that_leaves_chips_idle_is_refused() -> None:
    devices = plan.topology_devices("v5e:2x2")
    assert [device.platform for device in devices] == ["tpu"] * 4
    with pytest.raises(UserError, match="uses 2 of 4 devices; change mesh"):
        plan.compile_step(tiny_config(mesh__data=2), devices)
    with pytest.raises(UserError, match="needs 8 devices, found 4"):
        plan.compile_step(tiny_config(mesh__data=8), devices)


def test_what_does_not_fit_is_read_from_the_compilers_message() -> None:
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of "
    )
    assert plan._needed_bytes(message + "15.75G hbm. Exceeded hbm capacity by 4.75G.") == 20.5 * 2**30
    assert plan._needed_bytes("INTERNAL: something else") is None


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ([[0, 1], [2, 3], [4, 5], [6, 7]], "fsdp"),
        ([[0, 4], [1, 5]], "data"),
        ([[0, 1, 4, 5]], "data+fsdp"),
        ([[3]], "-"),
    ],
)
def test_a_collective_is_told_by_the_mesh_axes_of_its_groups(groups: list[list[int]], axes: str) -> None:
    devices = np.array([types.SimpleNamespace(id=index) for index in range(8)]).reshape(2, 2, 2)
    mesh: Any = types.SimpleNamespace(devices=devices.transpose(0, 2, 1), axis_names=("data", "tensor", "fsdp"))
    assert plan.group_axes(Collective("all-gather", 8, "s8", groups, False, 1, ""), mesh) == axes
