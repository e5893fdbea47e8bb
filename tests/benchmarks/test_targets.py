"""The C model on every target: NumPy's digest and texts, integers alone, little stack; the checks find faults."""

import dataclasses
import functools
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RunScript
from test_int8_model import random_model
from test_onnx_integer import random_integer_model

from picogpt_jax.benchmarks import emulators, targets
from picogpt_jax.benchmarks.report import format_report
from picogpt_jax.errors import UserError
from picogpt_jax.formats.c_export import save_c
from picogpt_jax.int8.integer_model import IntegerModel

TARGETS = {target.name: target for target in targets.targets()}
MODELS = {
    "gelu": lambda: random_integer_model(seed=2, bias=True),
    "relu": lambda: random_integer_model("per_tensor", seed=2, activation="relu", n_head=1),
}
WITH_HELPERS = {
    "ARM Cortex-M0+",
    "ARM Cortex-M0+, -Os",
    "RISC-V rv32i",
}  # which have no divider, or neither divider nor multiplier
STACK = 2048

Exported = Callable[[str], tuple[IntegerModel, Path, targets.Results]]
Compiled = Callable[[str], tuple[Path, list[str]]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model by its name, where it lies in C, and what NumPy computes."""

    @functools.cache
    def export(name: str) -> tuple[IntegerModel, Path, targets.Results]:
        model, folder = MODELS[name](), tmp_path_factory.mktemp(name) / "c"
        save_c(model, folder)
        return model, folder, targets.by_numpy(model)

    return export


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The folder with picogpt.o of a target, and the functions that it calls; compiled once."""

    @functools.cache
    def compile_once(name: str) -> tuple[Path, list[str]]:
        folder = tmp_path_factory.mktemp("target")
        return folder, targets.compile_model(TARGETS[name], folder)

    return compile_once


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_computes_what_numpy_computes(name: str, exported: Exported, compiled: Compiled) -> None:
    object_folder, called = compiled(name)
    assert any("mem" not in function for function in called) == (name in WITH_HELPERS)
    for model_name in MODELS:
        model, folder, expected = exported(model_name)
        results, figures = targets.measure(TARGETS[name], model, folder, object_folder, called)
        assert results == expected
        assert all(len(set(text)) > 3 for text in results.texts)
        if TARGETS[name].machine is not emulators.Native:
            assert 0 < figures["stack_bytes"] < STACK
            assert 2000 < figures["code_bytes"] < 40_000
            assert figures["instructions_per_token"] > model.model.n_parameters


FLOAT = "int32_t added(int32_t x) { return (int32_t)((float)x * 1.5f); }"
DIVISION = "uint64_t added(uint64_t a, uint64_t b) { return a / b; }"
LIBRARY = "int abs(int x); int added(int x) { return abs(x); }"


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("ARM Cortex-M3", FLOAT, "computes with float for ARM"),
        ("x86, 32 bits", FLOAT, "computes with float for x86"),  # without a call: the processor has floats
        ("WebAssembly", FLOAT, "computes with float for Web"),
        ("ARM Cortex-M3", DIVISION, "calls __aeabi_uldivmod for ARM"),
        ("x86, 32 bits", DIVISION, "calls __udivdi3 for x86"),
        ("WebAssembly", LIBRARY, "calls abs for Web"),
    ],
)
def test_what_the_model_must_not_need_is_found(tmp_path: Path, name: str, line: str, message: str) -> None:
    source = tmp_path / "picogpt.c"
    source.write_text(f"{targets.PICOGPT_C.read_text(encoding='ascii')}\n{line}\n")
    with pytest.raises(UserError, match=message):
        targets.compile_model(TARGETS[name], tmp_path, source)


def test_instructions_are_counted_one_by_one(exported: Exported, compiled: Compiled) -> None:
    """Thumb's have two lengths: a call at every single one tells the same."""
    name = "ARM Cortex-M0+"
    (model, folder, _), (object_folder, called), target = exported("gelu"), compiled(name), TARGETS[name]
    targets.measure(target, model, folder, object_folder, called)
    program, counts = next(object_folder.glob("*/program")), []
    assert target.processor is not None
    for processor in (target.processor, dataclasses.replace(target.processor, length=None)):
        machine = emulators.Emulated(program, processor)
        for what, count in ((targets.DIGEST, 0), (targets.TEXT, 2), (targets.TOKEN, 2)):
            machine.write("request", [what, count, 1, 0, 0, 0])
            if what != targets.TOKEN:
                machine.run()
        counts.append(machine.count())
    assert counts[0] == counts[1] > model.model.n_parameters


def test_the_report_is_of_results_that_were_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["relu"]()
    chosen = [TARGETS["ARM Cortex-M0+"], TARGETS[next(name for name in TARGETS if name.endswith("clang -O0"))]]
    monkeypatch.setattr(targets, "targets", lambda: chosen)
    report = format_report(targets.benchmark_targets(model))
    assert re.search(r"^ARM Cortex-M0\+( +[\d,]+){5}$", report, re.MULTILINE), report
    assert "ARM Cortex-M0+ calls __aeabi_idiv" in report
    wrong = dataclasses.replace(targets.by_numpy(model), digest=1)
    monkeypatch.setattr(targets, "by_numpy", lambda model: wrong)
    with pytest.raises(UserError, match=r"ARM Cortex-M0\+ computes something else than NumPy"):
        targets.benchmark_targets(model)


def test_models_that_c_does_not_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="mixed arithmetic"):
        targets.benchmark_targets(random_model())
    monkeypatch.setattr(targets, "LARGEST_HEADER", 100)
    with pytest.raises(UserError, match="at most 100 are compiled"):
        targets.benchmark_targets(MODELS["relu"]())


@pytest.mark.parametrize("missing", ["ziglang", "unicorn", "wasmtime"])
def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for name in ("emulators", "targets"):
        monkeypatch.delitem(sys.modules, f"picogpt_jax.benchmarks.{name}")
    with pytest.raises(ImportError, match=r"pip install 'picogpt_jax\[targets\]'"):
        importlib.import_module("picogpt_jax.benchmarks.targets")


def test_the_script_asks_for_a_model(run_script: RunScript) -> None:
    done = run_script("scripts/benchmark.py", "targets")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "targets needs --model" in done.stderr
