"""Plans for GPUs that are not here; one small step is really compiled, where the extra gpu-plan is installed."""

import importlib.metadata
import sys
import types
from typing import Any

import pytest
from tiny import tiny_config

from picogpt_jax.devices.chips import CHIPS, chip_of
from picogpt_jax.errors import UserError
from picogpt_jax.planning import gpus, plan, report, roofline
from picogpt_jax.training.trainer import Trainer

BY_TOPOLOGY = {chip.topology: chip for chip in CHIPS if chip.topology}
IS_INSTALLED = all(map(gpus._is_installed, gpus.PACKAGES))
needs_the_compiler = pytest.mark.skipif(not IS_INSTALLED, reason="pip install 'picogpt_jax[gpu-plan]' to run this test")

# Two layers, scanned, in two parts: each product of a layer stands once in the program, and runs four times.
LAYERS, PARTS = 2, 2
SMALL = dict(
    **dict(model__n_layer=LAYERS, model__n_head=2, model__n_embd=128, model__block_size=128, model__vocab_size=256),
    **dict(model__dropout=0.0, train__batch_size=8, train__dtype="bfloat16", train__scan_layers=True),
    train__gradient_accumulation_steps=PARTS,
)


def test_each_target_is_a_chip_of_the_table_by_the_name_that_cuda_gives_it() -> None:
    for topology, target in gpus.TARGETS.items():
        assert chip_of(target.name) is BY_TOPOLOGY[topology]
    of_gpus = [chip for chip in CHIPS if chip.network_bandwidth is not None and chip.topology]
    assert {chip.topology for chip in of_gpus} == set(gpus.TARGETS)


def test_a_target_takes_its_memory_from_the_table() -> None:
    text = gpus._target_config(gpus.TARGETS["a100"], BY_TOPOLOGY["a100"])
    assert "memory_bandwidth: 2039000000000 device_memory_size: 80000000000" in text
    assert "shared_memory_per_block_optin: 166912" in text
    assert "cuda_compute_capability { major: 8 feature_extension: NONE }" in text
    text = gpus._target_config(gpus.TARGETS["b200"], BY_TOPOLOGY["b200"])
    assert "cuda_compute_capability { major: 10 feature_extension: ACCELERATED_FEATURES }" in text


def test_without_the_compiler_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "nvidia-nvvm":
            raise importlib.metadata.PackageNotFoundError
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        UserError, match=r"not installed \(missing: nvidia-nvvm\); pip install 'picogpt_jax\[gpu-plan\]'"
    ):
        plan.topology_devices("h100:8")


@pytest.mark.parametrize("shape", ["", "0", "9", "2x16", "2x2x2", "8x", "0x8", "all"])
def test_an_impossible_number_of_gpus_is_refused(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "PACKAGES", ())
    with pytest.raises(UserError, match=f"^--topology=h200:{shape} is .* give h200:8, or h200:2x8 for two hosts$"):
        plan.topology_devices(f"h200:{shape}")


def test_cudnn_is_not_asked_for_its_version_and_asked_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> int:
        raise RuntimeError("cuDNN not found")

    versions: Any = types.SimpleNamespace(cudnn_get_version=missing, cudnn_build_version=lambda: 91200)
    plugin = types.ModuleType("jax_cuda13_plugin")
    plugin._versions = versions  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jax_cuda13_plugin", plugin)
    with gpus.without_cudnn():
        assert versions.cudnn_get_version() == 91200
    assert versions.cudnn_get_version is missing


@needs_the_compiler
@pytest.mark.parametrize(
    ("name", "hosts", "each"), [("a100:1", 1, 1), ("h100:8", 1, 8), ("h200:2x4", 2, 4), ("b200:2", 1, 2)]
)
def test_the_gpus_of_hosts_are_numbered_through(name: str, hosts: int, each: int) -> None:
    devices = plan.topology_devices(name)
    assert [plan._coordinates(device) for device in devices] == [
        (host, host * each + gpu) for host in range(hosts) for gpu in range(each)
    ]
    assert {chip_of(device.device_kind) for device in devices} == {BY_TOPOLOGY[name.partition(":")[0]]}


@needs_the_compiler
def test_a_step_for_one_h100_multiplies_int8_and_attends_with_cudnn() -> None:
    found = plan.make_plan(tiny_config(**SMALL), "h100:1")
    assert (found["chips"], found["chip"], found["collectives"]) == (1, "NVIDIA H100", {})
    matmuls = found["matmuls"]
    assert matmuls["int8"]["count"] == PARTS * (4 * LAYERS + 1)
    # Two products of the gradient for each of them; cuDNN's kernels have 2 and 5 products.
    assert matmuls["bfloat16"]["count"] == PARTS * (2 * (4 * LAYERS + 1) + 7 * LAYERS)
    assert matmuls["float32"]["count"] == 0
    # The formula counts 6 products of whole scores: the kernels compute 7 of those on or below the diagonal.
    formula = 12 * LAYERS * 128 * 128 * found["tokens_per_step"]
    attention = formula * 7 / 6 * 129 / 256
    assert found["flops_per_step"] == pytest.approx(found["model_flops_per_step"] - formula + attention, rel=1e-12)
    assert found["fits"] is True
    assert found["memory"]["temporaries"] > 0
    assert found["left_out"] == [*roofline.left_out(BY_TOPOLOGY["h100"])], "everything in the program is understood"


@needs_the_compiler
def test_what_does_not_fit_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU compiler only warns, where the TPU's makes no program."""
    sizes = dict.fromkeys(("argument", "output", "alias"), 80e9) | {"temp": 1e9, "generated_code": 0}
    analysis = types.SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
    program = types.SimpleNamespace(memory_analysis=lambda: analysis)
    compiled = lambda config, devices, _: plan.Compiled(Trainer(config, list(devices)), program, None, 1.0)  # noqa: E731
    monkeypatch.setattr(plan, "compile_step", compiled)
    found = plan.make_plan(tiny_config(**SMALL), "h100:1")
    assert (found["fits"], found["bytes_per_chip"]) == (False, 81e9)
    assert "mfu" not in found
    assert "75.44 GiB of 75 GiB: DOES NOT FIT" in report.format_plan(found)
