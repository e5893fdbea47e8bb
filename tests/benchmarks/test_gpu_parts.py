"""What is measured on a GPU, computed on a CPU: logits of two devices, the trace's kernels, plans."""

import dataclasses
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import VOCABULARY, tiny_config, write_data

from picogpt_jax.benchmarks import gpu_parts
from picogpt_jax.errors import UserError
from picogpt_jax.int8.convert import FLOAT
from picogpt_jax.int8.folder import save_int8_model
from picogpt_jax.int8.integer_model import IntegerModel, integer_model
from picogpt_jax.model.gpt import GPT
from picogpt_jax.model.numerics import Numerics
from picogpt_jax.planning import gpus
from picogpt_jax.runtimes.numpy_integer import NumpyIntegerGPT

CONFIG = tiny_config().model


@pytest.fixture(scope="module")
def model() -> IntegerModel:
    return integer_model(CONFIG, "per_channel", gpu_parts.random_arrays(CONFIG), VOCABULARY, {})


def test_the_logits_of_a_folder_are_those_of_numpy(model: IntegerModel, tmp_path: Path) -> None:
    save_int8_model(model, tmp_path / "int8")
    text = "abcdefghij" * 9
    data_dir = write_data(tmp_path / "data", text)
    one, *_, other = jax.devices()
    row = gpu_parts.folder_logits(str(tmp_path / "int8"), str(data_dir), one, other)
    config = {
        **{"format": "picogpt-int8", "format_version": 2, "arithmetic": "integer"},
        "model": dataclasses.asdict(model.model),
        "quantization": {"weight_granularity": "per_channel"},
    }
    starts = np.linspace(0, len(text) - 8, gpu_parts.WINDOWS).astype(int)
    ids_BT = VOCABULARY.encode(text)[starts[:, None] + np.arange(8)].astype(np.int64)
    expected = NumpyIntegerGPT(config, model.tensors).forward(ids_BT).astype(np.float32)
    assert row["digest"] == hashlib.sha256(expected.tobytes()).hexdigest()[:16]
    assert (row["equal"], row["largest_difference"]) == (True, 0.0)
    assert row["model"] == model.digest.hex()
    save_int8_model(model.mixed(), tmp_path / "mixed")
    with pytest.raises(UserError, match=r"mixed is a model in mixed arithmetic; train with .*=integer"):
        gpu_parts.folder_logits(str(tmp_path / "mixed"), str(data_dir), one, other)


def test_one_bit_of_one_logit_is_a_difference(model: IntegerModel, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_BTV = np.ones((1, 2, 12), np.float32)
    other_BTV = logits_BTV.copy()
    other_BTV[0, 1, 7] = np.nextafter(np.float32(1), np.float32(2))
    found = iter([logits_BTV, other_BTV])
    monkeypatch.setattr(gpu_parts, "on_device", lambda *_: next(found))
    row = gpu_parts.compare(GPT(CONFIG, Numerics(FLOAT, "float")), {}, np.zeros((1, 2)), *jax.devices()[:2])
    assert (row["equal"], row["largest_difference"]) == (False, 2.0**-23)


def test_a_trace_is_reduced_to_the_kernels_of_the_gpus_streams(tmp_path: Path) -> None:
    def named(kind: str, name: str, pid: int, tid: int = 0) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}

    def event(name: str, microseconds: float, pid: int, tid: int) -> dict[str, Any]:
        return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": 0.0, "dur": microseconds}

    events = [
        *(named("process_name", "/device:GPU:0 (NVIDIA)", 1), named("process_name", "/host:CPU", 2)),
        *(named("thread_name", "Stream #14(Compute)", 1, 14), named("thread_name", "XLA Ops", 1, 15)),
        *(named("thread_name", "Stream", 2, 14), {"ph": "M", "name": "process_sort_index", "pid": 1, "args": {}}),
        *(event("imma_gemm", 3000.0, 1, 14), event("softmax", 2000.0, 1, 14), event("imma_gemm", 3000.0, 1, 14)),
        *(event("fusion.1", 9000.0, 1, 15), event("python", 9000.0, 2, 14), {}),
    ]
    (tmp_path / "plugins").mkdir()
    with gzip.open(tmp_path / "plugins" / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert gpu_parts.top_kernels(tmp_path) == [
        {"name": "imma_gemm", "ms": 6.0, "calls": 2, "share": 0.75},
        {"name": "softmax", "ms": 2.0, "calls": 1, "share": 0.25},
    ]


def test_a_gpu_that_jax_cannot_use_is_not_replaced_by_the_cpu() -> None:
    with pytest.raises(UserError, match=r"the system shows a GPU, which JAX cannot use; pip install .*\[cuda\]"):
        gpu_parts.check_platform("cuda,cpu")
    gpu_parts.check_platform("cpu")


def test_a_plan_is_of_one_such_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def make_plan(config: Any, topology: str) -> dict[str, Any]:
        asked.append((config.quant.mode, config.quant.arithmetic, topology))
        return {"topology": topology, "bytes_per_chip": 5, "fits": False, "chips": 1}

    monkeypatch.setattr(gpu_parts, "make_plan", make_plan)
    found = gpu_parts.plan(tiny_config(), "integer", gpus.TARGETS["h100"].name)
    assert found == {"topology": "h100:1", "bytes_per_chip": 5, "fits": False, "step_time_ms": None, "mfu": None}
    gpu_parts.plan(tiny_config(), None, gpus.TARGETS["h200"].name)
    assert asked == [("int8", "integer", "h100:1"), ("none", "mixed", "h200:1")]
    with pytest.raises(UserError, match=r"planning does not know NVIDIA T4; add it to devices/chips\.py"):
        gpu_parts.plan(tiny_config(), None, "NVIDIA T4")
