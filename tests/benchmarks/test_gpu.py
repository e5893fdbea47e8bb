"""The benchmark of a GPU, where there is none: its parts on a CPU and tiny models; how it fails; its page."""

import dataclasses
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, RunScript
from tiny import TINY, VOCABULARY, quick_compilation, tiny_config

from picogpt_jax.benchmarks import gpu, gpu_page, gpu_parts
from picogpt_jax.benchmarks.gpu import DEFAULT, GPT2, Part, PartError, Processes
from picogpt_jax.benchmarks.html_page import STYLE
from picogpt_jax.devices.accelerators import has_gpu
from picogpt_jax.errors import UserError
from picogpt_jax.int8.folder import save_int8_model
from picogpt_jax.int8.integer_model import integer_model

STEPS = dict(
    **dict(dtype="bfloat16", attention="cudnn", batch_size=32, block_size=1024, remat="dots", parameters=124_475_904),
    **dict(steps_per_round=10, round_seconds=[1.0], loss=10.8, step_time_ms=100.0, step_time_ms_min=99.0),
    **dict(tokens_per_second=327_680.0, mfu=0.28, compile_seconds=30.0, peak_bytes=20 << 30, compiled_bytes=19 << 30),
    kernels=[dict(name="sm90_xmma_gemm_i8i32_<gmma>", ms=3.0, calls=12, share=0.75)],
)


def products(on_tensor_cores: bool | None) -> list[dict[str, Any]]:
    bf16 = dict(precision="bfloat16", origin="cuBLASLt", tensor_cores=None, count=7, flops=3e9)
    int8 = dict(precision="int8", origin="Triton", tensor_cores=on_tensor_cores, count=9, flops=1e9)
    return [bf16, int8]


def met(results: Mapping[str, Any]) -> dict[str, bool | None]:
    return {row["goal"]: row["is_met"] for row in gpu.goals(results)}


# --- running parts ------------------------------------------------------------------------------------------------


def test_a_part_that_fails_is_written_down_and_the_next_one_runs() -> None:
    def fails(error: Exception) -> Any:
        def work(seconds: float, results: Mapping[str, Any]) -> Any:
            raise error

        return work

    parts = [
        Part("one", "", 9.0, lambda seconds, results: {"left": seconds}),
        Part("two", "", 9.0, fails(PartError("it was ended"))),
        Part("three", "", 9.0, fails(ZeroDivisionError("by zero,\n at last"))),
        Part("four", "", 9.0, lambda seconds, results: list(results)),
    ]
    saved: list[str] = []
    report = gpu.run_parts(parts, lambda report: saved.append(json.dumps(report)))
    entries = report["parts"]
    assert entries["one"]["result"] == {"left": 9.0}
    assert [entries[name]["error"] for name in ("two", "three")] == [
        "it was ended",
        "ZeroDivisionError: by zero, at last",
    ]
    assert entries["four"]["result"] == ["one"]
    assert [len(json.loads(text)["parts"]) for text in saved] == [1, 2, 3, 4]
    assert json.loads(saved[-1]) == json.loads(json.dumps(report))


def test_nothing_runs_after_a_first_part_that_failed() -> None:
    def fails(seconds: float, results: Mapping[str, Any]) -> Any:
        raise PartError("no GPU")

    with pytest.raises(UserError, match=r"^no GPU$"):
        gpu.run_parts([Part("one", "", 9.0, fails)], lambda report: pytest.fail("nothing to save"))


def test_no_part_has_more_than_what_is_left_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    now, given = [100.0], []
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def work(seconds: float, results: Mapping[str, Any]) -> None:
        given.append(seconds)
        now[0] += 8.0

    parts = [Part(name, "", 10.0, work) for name in "abcd"]
    report = gpu.run_parts(parts, lambda report: None, total_seconds=25.0)
    assert given == [10.0, 10.0, 9.0]
    assert report["parts"]["d"]["error"] == "the 25 s of all parts were over"
    assert (report["parts"]["c"]["seconds"], report["seconds"]) == (8.0, 24.0)


def test_a_later_part_names_the_earlier_one_that_it_needs() -> None:
    assert gpu.found({"device": 1}, "device") == 1
    with pytest.raises(PartError, match='it needs the part "recipe", which has no result'):
        gpu.found({"device": 1}, "recipe")


def test_a_process_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    child = f"import time; time.sleep(2); open({str(tmp_path / 'late')!r}, 'w')"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(PartError, match="it was ended after 1 s"):
        Processes(ROOT, tmp_path, "cpu").run(["-c", script], 0.7)
    time.sleep(2.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import sys; sys.exit('error: no data; prepare them')", "no data; prepare them"),
        ("raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory')", "RuntimeError: RESOURCE_EXHAUSTED: Out of memory"),
        ("import sys; print('ValueError: one', 'a frame', sep='\\n', file=sys.stderr); sys.exit(1)", "ValueError: one"),
        ("import os; os.abort()", "it ended with status -6"),
    ],
)
def test_why_a_process_failed_is_one_line(script: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PartError) as caught:
        Processes(ROOT, tmp_path, "cpu").run(["-c", script], 20.0)
    assert str(caught.value) == message


def test_each_process_has_an_empty_cache_and_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    names = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "JAX_COMPILATION_CACHE_DIR")
    script = f"import os; print(os.getcwd(), *(os.environ[name] for name in {names}))"
    processes = Processes(ROOT, tmp_path)
    one, two = (processes.run(["-c", script], 20.0).split() for _ in range(2))
    assert one[:3] == two[:3] == [str(ROOT), "cuda,cpu", "0"]
    assert one[3] != two[3]
    assert Path(one[3]).parent == tmp_path


def test_a_question_is_answered_by_a_process(tmp_path: Path) -> None:
    device = Processes(ROOT, tmp_path, "cpu").ask(100.0, "device")
    assert (device["platform"], device["memory_limit_bytes"]) == ("cpu", None)
    assert "jax" in device["versions"]


# --- the whole, on a CPU ------------------------------------------------------------------------------------------


class InProcess(Processes):
    """Answers questions here, the same one once; trains in a process, as a user does; the rest is made up."""

    def __init__(self, folder: Path) -> None:
        super().__init__(ROOT, folder, "cpu")
        self.answers: dict[str, str] = {}

    def ask(self, seconds: float, part: str, platform: str | None = None, **arguments: Any) -> Any:
        if part == "plan":
            raise UserError("planning does not know cpu")
        question = json.dumps({"part": part, **arguments})
        if question not in self.answers:
            self.answers[question] = json.dumps(gpu_parts.answer(json.loads(question)))
        return json.loads(self.answers[question])

    def run(self, arguments: Any, seconds: float, text: str = "", **environment: str) -> str:
        if arguments[0] == "scripts/quantize.py":  # it compiles for long, and has tests of its own
            config, output = tiny_config().model, arguments[2].removeprefix("--output=")
            assert arguments[1] == f"--workdir={self.folder / 'run'}"
            arrays = gpu_parts.random_arrays(config)
            save_int8_model(integer_model(config, "per_channel", arrays, VOCABULARY, {}), output)
            return ""
        if "tests/model/test_integer.py" in arguments:
            raise PartError("it was ended after 3 s")
        if arguments[0] == "-c":
            return "..F\nFAILED tests/a.py::test_b - assert 1 == 2\n1 failed, 2 passed, 3 deselected in 0.1s\n"
        return super().run(arguments, seconds, text, **environment)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> dict[str, Any]:
    """Of the whole benchmark, with tiny models on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_parts, "SIZES", (({}, (1, 3)),))
        patch.setattr(gpu, "CONTENDERS", {"bf16": None, "int8 integer": "integer"})  # to compile less
        patch.setenv("JAX_NUM_CPU_DEVICES", "1")  # of the processes
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
        models = dict.fromkeys((DEFAULT, GPT2), tiny_config(model__dropout=0.0))
        small = [f"--config.{section}.{key}={value}" for section, keys in TINY.items() for key, value in keys.items()]
        recipe = ["--config=configs/base.py", "--config.quant.arithmetic=integer", "--config.model.dropout=0", *small]
        processes = InProcess(tmp_path_factory.mktemp("gpu"))
        parts = gpu.all_parts(processes, str(data_dir), models, recipe)
        parts = [dataclasses.replace(part, seconds=1000.0) for part in parts]  # on a busy machine
        with quick_compilation():
            return gpu.run_parts(parts, lambda report: None, 9000.0)


def test_every_part_has_its_figures(report: dict[str, Any]) -> None:
    errors = {name: part["error"] for name, part in report["parts"].items() if "error" in part}
    contenders = ("bf16", "int8 integer")
    assert errors == {f"plan, {name}": "planning does not know cpu" for name in contenders}
    results = {name: part["result"] for name, part in report["parts"].items() if "result" in part}
    assert len(results) == 9
    assert {row["forward"] for row in results["logits"]} == set(FORWARDS)
    assert len({row["digest"] for row in results["logits"]}) == 1, "training and serving give the same bits"
    for model in (DEFAULT, GPT2):
        for name in contenders:
            steps = results[f"{model}, {name}"]
            assert steps["tokens_per_second"] == pytest.approx(8 * 8 / (1e-3 * steps["step_time_ms"]))
            assert ("int8" in {row["precision"] for row in steps["products"]}) == (name != "bf16")
            assert steps["compiled_bytes"] > 3 * 4 * steps["parameters"]
    recipe = results["recipe"]
    assert (recipe["steps"], recipe["best_val_loss"]) == (8, pytest.approx(recipe["val_loss"], abs=1e-4))
    assert results["recipe's int8 model"]["equal"] is True
    assert results["tests"]["counts"] == {"failed": 2, "passed": 4}
    assert results["tests"]["failures"][2:] == ["tests/model/test_integer.py: it was ended after 3 s"]
    assert met(results)["the GPU's tests pass"] is False


FORWARDS = ("serving", "training in float32", "training in bfloat16", "training by the attention kernel")


# --- goals --------------------------------------------------------------------------------------------------------


def test_what_was_not_measured_is_open() -> None:
    assert set(met({}).values()) == {None}


def test_goals_are_met_or_missed_by_what_was_found() -> None:
    fast = STEPS | {"mfu": 0.5, "products": products(True)}
    results = {
        f"{GPT2}, bf16": fast,
        f"{GPT2}, int8 mixed": fast | {"step_time_ms": 99.0},
        f"{GPT2}, int8 integer": fast | {"step_time_ms": 101.0, "products": products(False)},
        "recipe": {"seconds": 19.9},
        "logits": [{"equal": True}, {"equal": False}],
        "recipe's int8 model": {"equal": False, "largest_difference": 0.5},
        "tests": {"counts": {"passed": 3}, "failures": []},
    }
    rows = gpu.goals(results)
    assert [row["is_met"] for row in rows] == [True, True, True, True, False, False, False, False, True]
    assert [row["found"] for row in rows] == [
        *("19.9 s", "50.0%", "0.99 times its time", "100% on them", "1.01 times its time", "100% not on them"),
        *("1 of 2", "different by up to 0.5", "3 passed"),
    ]
    slow = results | {"recipe": {"seconds": 20.1}, f"{GPT2}, bf16": fast | {"mfu": 0.49}}
    assert [row["is_met"] for row in gpu.goals(slow)][:2] == [False, False]


def test_library_kernels_leave_it_open_whether_they_use_tensor_cores() -> None:
    goal = f"{GPT2}, int8 mixed: int8 products on int8 tensor cores"
    both = [*products(True), *products(None)]
    assert met({f"{GPT2}, int8 mixed": STEPS | {"products": both}})[goal] is None
    assert met({f"{GPT2}, int8 mixed": STEPS | {"products": [*both, *products(False)]}})[goal] is False
    assert met({f"{GPT2}, int8 mixed": STEPS | {"products": products(True)[:1]}})[goal] is False, "none are int8"


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_page_shows_what_was_measured_beside_the_goals(report: dict[str, Any]) -> None:
    page = gpu_page.page(report)
    assert gpu_page.MARK in page[:1000]
    headings = ["Goals", "Training steps", "Kernels", "Logits", "The Shakespeare recipe", "Tests", "Parts"]
    assert re.findall(r"<h2[^>]*>([^<]*)</h2>", page) == headings
    for row in report["goals"]:
        assert row["goal"].replace("'", "&#x27;") in page
    steps = report["parts"][f"{GPT2}, int8 integer"]["result"]
    assert f"<td>{steps['step_time_ms']:.2f}</td>" in page
    assert page.count("equal in every bit") == len(FORWARDS) + 1
    assert "<pre>FAILED tests/a.py::test_b - assert 1 == 2\n" in page
    assert not re.search(r"<script|src=|href=", page)
    used = {name for value in re.findall(r'class="([^"]*)"', page) for name in value.split()} - {"numbers"}
    assert not {name for name in used if f".{name}" not in STYLE}


def test_the_page_escapes_names_and_holds_an_unfinished_report() -> None:
    steps = STEPS | {"products": products(None)}
    part = {"what": "", "budget_seconds": 60.0, "seconds": 1.0}
    parts = {f"{GPT2}, int8 mixed": part | {"result": steps}, "device": part | {"error": "<no> GPU"}}
    plan = {f"plan, {name}": part | {"result": {"bytes_per_chip": 5 << 30}} for name in gpu.CONTENDERS}
    unfinished = {"date": "today", "seconds": 2.0, "goals": gpu.goals({}), "parts": parts | plan}
    page = gpu_page.page(unfinished)
    assert "On a GPU: not recognised" in page
    assert "<td>&lt;no&gt; GPU, 1 of 60 s</td>" in page
    assert '<th scope="row">sm90_xmma_gemm_i8i32_&lt;gmma&gt;</th>' in page
    row = re.search(r'<th scope="row">int8 mixed</th>(.*?)</tr>', page)
    assert row
    figures = ["100.00", "99.00", "", "327,680", "28.0%", "20.00", "19.00", "5.00", "30.0", "cudnn"]
    assert re.findall(r"<td>([^<]*)</td>", row[1]) == figures


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(has_gpu(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_it_would_do(run_script: RunScript) -> None:
    done = run_script("scripts/benchmark.py", "gpu")
    assert done.returncode == 2
    assert re.fullmatch(r"error: the system shows no GPU \(/dev/nvidia\*\); run this on .*\n", done.stderr)
    lines = done.stdout.splitlines()
    assert lines[0] == "On a GPU this would measure, in 8 minutes at most:"
    assert len(lines) == 15
    assert all("at most" in line for line in lines[1:])


def test_the_tests_for_a_gpu_are_there() -> None:
    """Every name that is asked for is that of a test in one of the files."""
    sources = [(ROOT / name).read_text(encoding="utf-8") for files in gpu.GPU_TESTS for name in files]
    tests = [test for source in sources for test in re.findall(r"^def (test_\w+)", source, re.MULTILINE)]
    for name in gpu.GPU_TEST_NAMES.split(" or "):
        assert any(name in test for test in tests), name
    assert all(any(name in source for name in gpu.GPU_TEST_NAMES.split(" or ")) for source in sources)
