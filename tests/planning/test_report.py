from pathlib import Path
from typing import Any

import pytest

from picogpt_jax.planning import report

GIB = 1 << 30


def row(**changes: Any) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "topology": "v5e:2x2", "chip": "TPU v5e", "chips": 4, "mesh": {"data": 2, "fsdp": 2, "tensor": 1},
        "quant_mode": "int8", "batch_size": 16, "tokens_per_step": 2048, "tokens_per_chip": 512.0,
        "gradient_accumulation_steps": 1, "parameters": 1000, "parameter_bytes": 4 * GIB, "optimizer_bytes": 8 * GIB,
        "parameter_bytes_per_chip": 2 * GIB, "optimizer_bytes_per_chip": 4 * GIB, "bytes_per_chip": 7 * GIB,
        "memory": {"arguments": 6 * GIB, "results": 0, "temporaries": GIB, "program": 0},
        "chip_memory_bytes": 16 * GIB, "fits": True, "model_flops_per_step": 1e12, "flops_per_step": 1.25e12,
        "matmuls": {"int8": {"count": 9, "flops": 5e11}, "bfloat16": {"count": 18, "flops": 7.5e11}},
        "collectives": {"all-gather": {"count": 3, "bytes": 1e6, "ms": 0.5}},
        "largest_collectives": [{"kind": "all-gather", "dtype": "s8", "axes": "fsdp", "overlapped": True, "count": 3,
                                 "bytes": 1e6, "ms": 0.5, "largest": "jit(step)/wte"}],
        "compute_ms": 3.0, "memory_ms": 2.0, "interconnect_ms": 0.5, "exposed_interconnect_ms": 0.0,
        "step_time_ms": 4.0, "step_time_ms_nothing_hidden": 4.5, "tokens_per_second": 512e3, "mfu": 0.25,
        "mfu_nothing_hidden": 0.2, "left_out": ["the host"], "compile_seconds": 12.0, "quick": False, "efficiency": 1.0,
    }  # fmt: skip
    return plan | changes


def test_a_plan_as_text() -> None:
    text = report.format_plan(row())
    assert "v5e:2x2: 4 chips TPU v5e, mesh data=2 fsdp=2 tensor=1, int8 QAT" in text
    assert "memory a chip       7.00 GiB of 16 GiB: fits" in text
    assert "2.00 GiB, of 4.00 GiB in all" in text
    assert "= 1.25 x 1e+12" in text
    assert "all-gather s8 fsdp, hidden" in text
    assert "step 4.0 ms, 512,000 tokens/s, MFU 25.0% (with nothing hidden: 4.5 ms, 20.0%)" in text
    assert text.endswith("- the host\nCompiled in 12 s.")


def test_a_plan_that_does_not_fit_says_so_and_estimates_nothing() -> None:
    known = ("mfu", "memory", "collectives", "matmuls", "step_time_ms")
    plan = {key: value for key, value in row(bytes_per_chip=20 * GIB, fits=False).items() if key not in known}
    text = report.format_plan(plan)
    assert "20.00 GiB of 16 GiB: DOES NOT FIT" in text
    assert "MFU" not in text


def test_a_comparison_names_what_bounds_each_plan_and_why_others_failed() -> None:
    failed = {"mesh": {"data": 1, "fsdp": 1, "tensor": 4}, "batch_size": 16, "quant_mode": "none", "fits": False}
    too_large = {key: value for key, value in row(fits=False, bytes_per_chip=20 * GIB).items() if key != "mfu"}
    lines = report.format_comparison([row(), too_large, failed | {"error": "2 heads do not divide"}]).splitlines()
    assert lines[0].split() == [
        "data",
        "fsdp",
        "tensor",
        "batch",
        "products",
        "GiB",
        "a",
        "chip",
        "ms/step",
        "tokens/s",
        "MFU",
        "bound",
        "by",
        "compiled",
    ]
    assert lines[1].split() == ["2", "2", "1", "16", "int8", "7.00", "4.0", "512,000", "25.0%", "compute", "in", "full"]
    assert lines[2].split() == ["2", "2", "1", "16", "int8", "20.00", "does", "not", "fit"]
    assert lines[3].split() == ["1", "1", "4", "16", "bfloat16", "2", "heads", "do", "not", "divide"]


def test_a_weak_scaling_as_text_and_picture(tmp_path: Path) -> None:
    larger = row(topology="v5e:4x4", chips=16, batch_size=64, tokens_per_second=1.9e6, efficiency=0.928)
    text = report.format_scaling([row(), larger])
    assert text.splitlines()[2].split() == ["v5e:4x4", "16", "64", "4.0", "1,900,000", "118,750", "25.0%", "92.8%"]
    png = tmp_path / "scaling.png"
    assert report.scaling_label(larger) == "TPU v5e, int8 QAT, 4 sequences a chip"
    report.plot_scaling({report.scaling_label(larger): [row(), larger]}, png, "Weak scaling")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(Exception, match=r"picogpt_jax\[plot\]"):
        report.plot_scaling({"": [row()]}, tmp_path / "x.png", "")
