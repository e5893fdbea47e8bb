import re
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from picogpt_jax.devices.chips import CHIPS, chip_of, model_flops_utilization
from picogpt_jax.training.loop import TrainLog
from picogpt_jax.training.trainer import StepMetrics


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA B200", "NVIDIA B200"),
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5e", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("TPU7x", "TPU7x"),
        ("cpu", None),
    ],
)
def test_the_chip_of_a_device_kind(kind: str, name: str | None) -> None:
    chip = chip_of(kind)
    assert (chip and chip.name) == name
    matching = [chip for chip in CHIPS if re.fullmatch(chip.device_kind, kind)]
    assert len(matching) == (name is not None), "a device kind belongs to one chip only"


def test_the_table_holds_what_physics_allows() -> None:
    for chip in CHIPS:
        assert 1e14 < chip.bfloat16_flops < 1e16, chip.name
        assert chip.int8_ops is None or 1.0 <= chip.int8_ops / chip.bfloat16_flops < 2.01, chip.name
        assert 16e9 < chip.memory_bytes < 300e9, chip.name
        # A chip reads its whole memory in 10 to 100 ms, and its links are slower than its memory.
        assert 0.01 < chip.memory_bytes / chip.memory_bandwidth < 0.1, chip.name
        assert chip.links * chip.link_bandwidth < chip.memory_bandwidth, chip.name
        # A switch joins GPUs; their hosts' network is slower.
        assert (chip.network_bandwidth is not None) == chip.name.startswith("NVIDIA"), chip.name
        if chip.network_bandwidth is not None:
            assert 0.05 < chip.network_bandwidth / (chip.links * chip.link_bandwidth) < 0.2, chip.name


def test_mfu_is_relative_to_the_bfloat16_peak_of_all_devices() -> None:
    assert model_flops_utilization(0.5 * 197e12 * 8, "TPU v5 lite", 8) == pytest.approx(0.5)
    assert model_flops_utilization(989e12, "NVIDIA H200", 4) == pytest.approx(0.25)
    assert model_flops_utilization(2307e12, "TPU7x", 2) == pytest.approx(1.0), "two devices are one chip"
    assert model_flops_utilization(1e12, "cpu", 1) is None


@pytest.mark.parametrize(("kind", "peak"), [("NVIDIA H200", 989e12), ("cpu", None)])
def test_training_logs_the_mfu_of_devices_in_the_table(kind: str, peak: float | None) -> None:
    written: list[dict[str, float]] = []
    progress: Any = types.SimpleNamespace(update=lambda *_: None)
    mesh: Any = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(device_kind=kind)] * 2), size=2)
    config = tiny_config()
    log = TrainLog(config, lambda step, split, values: written.append(values), progress, mesh)
    log.enqueue(0, 2, StepMetrics(jnp.ones(2), jnp.ones(2)), flush=True)
    (values,) = written
    if peak is None:
        assert "mfu" not in values
    else:
        flops = values["tokens_per_second"] * config.model.flops_per_token
        assert values["mfu"] == pytest.approx(flops / (2 * peak))
