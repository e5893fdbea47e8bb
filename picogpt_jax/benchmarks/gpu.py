"""All that is open on a real GPU, in at most eight minutes: `python scripts/benchmark.py gpu`.

The parts run one after another, each in processes of its own (`gpu_parts`, `scripts/train.py`, pytest) that are ended
when its time is up. A part that fails is written down with its reason, and the next one runs. This process leaves the
GPU alone: the others need all of its memory.
"""

import dataclasses
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from picogpt_jax.config import Arithmetic, Config
from picogpt_jax.devices.accelerators import has_gpu
from picogpt_jax.errors import UserError, reason

TOTAL_SECONDS = 480.0
LEAST_SECONDS = 5.0  # with less than that left no part begins
DEFAULT, GPT2 = "default model", "GPT-2 124M"
PLATFORMS = {"gpu": "cuda,cpu", "cpu": "cpu"}  # the logits are computed on both
CONTENDERS: dict[str, Arithmetic | None] = {"bf16": None, "int8 mixed": "mixed", "int8 integer": "integer"}
# The tests that compute on a GPU, unchanged: those of exact integers, and PyTorch's on CUDA. A process for each row.
GPU_TESTS = [
    ["tests/runtimes/test_torch_linear.py", "tests/runtimes/test_torch_model.py"],
    ["tests/kernels/test_int8_product.py", "tests/runtimes/test_jax_draws.py"],
    ["tests/model/test_integer.py"],
]
# Of those: what names CUDA, and what needs neither several devices nor a CPU's kernels.
GPU_TEST_NAMES = (
    "cuda or gives_the_integers or wrap_around or tokens_are_those or high_word or same_bits or stay_within "
    "or do_not_depend or scan_and_remat or square_root or shift_rounds"
)
RECIPE_SECONDS, MFU, RATIO = 20.0, 0.5, 1.0  # the goals


class PartError(Exception):
    """Why a part has no result, in one line."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Something to measure.

    Attributes:
        what: what it measures, for people.
        seconds: how long it may take.
        work: (seconds that are left for it, results of earlier parts) -> its result, a JSON value; a `PartError` or
            `UserError` says why there is none.
    """

    name: str
    what: str
    seconds: float
    work: Callable[[float, Mapping[str, Any]], Any]


def run_parts(
    parts: Sequence[Part], save: Callable[[dict[str, Any]], None], total_seconds: float = TOTAL_SECONDS
) -> dict[str, Any]:
    """Runs the parts one after another.

    Args:
        save: gets the report after every part, so that a cut loses one of them.

    Returns:
        The report: a JSON value, see `picogpt_jax.benchmarks.gpu_page`.

    Raises:
        UserError: the first part failed.
    """
    now = datetime.datetime.now(datetime.UTC)
    began = time.monotonic()
    report: dict[str, Any] = {"benchmark": "gpu", "date": now.strftime("%Y-%m-%d %H:%M UTC"), "parts": {}}
    results: dict[str, Any] = {}
    for part in parts:
        start = time.monotonic()
        left = min(part.seconds, total_seconds - (start - began))
        entry: dict[str, Any] = {"what": part.what, "budget_seconds": part.seconds}
        try:
            if left < LEAST_SECONDS:
                raise PartError(f"the {total_seconds:.0f} s of all parts were over")
            entry["result"] = results[part.name] = part.work(left, results)
        except (PartError, UserError) as error:
            if part is parts[0]:  # there is no GPU, or it does not work
                raise UserError(error) from None
            entry["error"] = str(error)
        except Exception as error:  # a defect of this part's is no reason to lose the others
            entry["error"] = f"{type(error).__name__}: {reason(error)}"
        entry["seconds"] = time.monotonic() - start
        print(f"{part.name}: {entry.get('error', 'done')} ({entry['seconds']:.0f} s)", file=sys.stderr, flush=True)
        report["parts"][part.name] = entry
        report |= {"goals": goals(results), "seconds": time.monotonic() - began}
        save(report)
    return report


def check_gpu(parts: Sequence[Part]) -> None:
    """Where there is no GPU, prints what the parts would do.

    Raises:
        UserError: there is none.
    """
    if has_gpu():
        return
    print(f"On a GPU this would measure, in {TOTAL_SECONDS / 60:.0f} minutes at most:")
    for part in parts:
        print(f"  {part.name:<28} at most {part.seconds:.0f} s: {part.what}")
    raise UserError(
        "the system shows no GPU (/dev/nvidia*); run this on a machine with an NVIDIA GPU, where "
        "pip install 'picogpt_jax[cuda]' has been done"
    )


class Processes:
    """Starts the processes of the parts, each with an empty compilation cache: what they compile counts.

    Args:
        root: of scripts/ and tests/.
        folder: for caches and what the parts pass on.
        platform: gpu, or cpu for tests.
    """

    def __init__(self, root: Path, folder: Path, platform: str = "gpu") -> None:
        self.root, self.folder, self.platform = root, folder, platform

    def run(self, arguments: Sequence[object], seconds: float, text: str = "", **environment: str) -> str:
        """The output of Python with these arguments.

        Raises:
            PartError: it failed, or took longer than `seconds`; all that it started is ended.
        """
        search_path = os.pathsep.join(filter(None, [str(self.root), os.environ.get("PYTHONPATH")]))
        cache = tempfile.mkdtemp(prefix="cache_", dir=self.folder)
        ours = {"PYTHONPATH": search_path, "JAX_COMPILATION_CACHE_DIR": cache}
        ours |= {"JAX_PLATFORMS": PLATFORMS[self.platform]} | environment
        try:
            with subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                cwd=self.root,
                env={"CUDA_VISIBLE_DEVICES": "0", **os.environ, **ours},  # one GPU
                start_new_session=True,
            ) as process:
                try:
                    output, errors = process.communicate(text, timeout=seconds)
                finally:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
        except subprocess.TimeoutExpired:
            raise PartError(f"it was ended after {seconds:.0f} s") from None
        finally:
            shutil.rmtree(cache, ignore_errors=True)
        if process.returncode:
            raise PartError(why(errors or output) or f"it ended with status {process.returncode}")
        return output

    def ask(self, seconds: float, part: str, platform: str | None = None, **arguments: Any) -> Any:
        """The answer of `gpu_parts` to a question."""
        platforms = PLATFORMS[platform or self.platform]
        question = json.dumps({"part": part, **arguments})
        output = self.run(["-m", "picogpt_jax.benchmarks.gpu_parts"], seconds, question, JAX_PLATFORMS=platforms)
        return json.loads(output.splitlines()[-1])


def why(output: str) -> str:
    """The line in what a program printed that says why it failed: a message of ours, an exception, or the last one."""
    lines = [line for line in output.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception|Interrupt)\b", line)]
    return reason(PartError((named or lines or [""])[-1].removeprefix("error: "))) if lines else ""


def all_parts(processes: Processes, data_dir: str, models: Mapping[str, Config], recipe: Sequence[str]) -> list[Part]:
    """The parts, the most important first: what is last may find no time.

    Args:
        data_dir: tiny Shakespeare by characters.
        models: `DEFAULT` and `GPT2`, with a batch that suits a GPU.
        recipe: arguments of scripts/train.py that make the Shakespeare recipe.
    """
    ask, workdir, int8 = processes.ask, processes.folder / "run", processes.folder / "int8"

    def steps(model: str, name: str) -> Part:
        arguments: dict[str, Any] = dict(config=models[model].to_dict(), arithmetic=CONTENDERS[name])
        what = "training steps: time, MFU, memory, kernels"
        work = lambda seconds, _: ask(seconds, "steps", **arguments)  # noqa: E731
        return Part(f"{model}, {name}", what, 75.0 if model == GPT2 else 30.0, work)

    def plan(name: str) -> Part:
        def work(seconds: float, results: Mapping[str, Any]) -> Any:
            kind = found(results, "device")["device_kind"]
            config, arithmetic = models[GPT2].to_dict(), CONTENDERS[name]
            return ask(seconds, "plan", "cpu", config=config, arithmetic=arithmetic, device_kind=kind)

        return Part(f"plan, {name}", f"memory of {GPT2}, {name}, as planned without a GPU", 60.0, work)

    def folder(seconds: float, results: Mapping[str, Any]) -> Any:
        found(results, "recipe")
        until = time.monotonic() + seconds
        processes.run(["scripts/quantize.py", f"--workdir={workdir}", f"--output={int8}"], seconds, JAX_PLATFORMS="cpu")
        return ask(until - time.monotonic(), "folder", folder=str(int8), data_dir=data_dir)

    return [
        Part("device", "the GPU, and the versions of what runs on it", 30.0, lambda seconds, _: ask(seconds, "device")),
        Part(
            *("logits", "logits of the integer forward pass on the GPU and on the CPU, bit for bit", 75.0),
            lambda seconds, _: ask(seconds, "logits", config=models[DEFAULT].to_dict()),
        ),
        *(steps(GPT2, name) for name in CONTENDERS),
        Part(
            *("recipe", "the Shakespeare recipe, scripts/train.py from start to end", 75.0),
            lambda seconds, _: train(processes, [*recipe, f"--config.data.dir={data_dir}"], workdir, seconds),
        ),
        Part("recipe's int8 model", "its logits on the GPU and on the CPU, bit for bit", 40.0, folder),
        *(steps(DEFAULT, name) for name in CONTENDERS),
        Part("tests", "the tests that run on a GPU", 110.0, lambda seconds, _: run_tests(processes, seconds)),
        *map(plan, CONTENDERS),
    ]


def found(results: Mapping[str, Any], name: str) -> Any:
    """The result of an earlier part, which a later one needs."""
    if name not in results:
        raise PartError(f'it needs the part "{name}", which has no result')
    return results[name]


def train(processes: Processes, recipe: Sequence[str], workdir: Path, seconds: float) -> dict[str, Any]:
    """Trains in a process, as a user does; the seconds are those of the process, from start to end."""
    began = time.monotonic()
    arguments = ["scripts/train.py", *recipe, f"--workdir={workdir}", f"--device={processes.platform}"]
    output = processes.run(arguments, seconds)
    total = time.monotonic() - began
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line.get("split") == "train"]
    losses = [line["loss"] for line in lines if line.get("split") == "val"]
    best = re.search(r"best validation loss ([\d.]+)", output)
    return {
        "seconds": total,
        "steps": steps[-1]["step"],
        "step_time_ms": sorted(line["step_time_ms"] for line in steps)[len(steps) // 2],
        "val_loss": losses[-1],
        "best_val_loss": float(best[1]) if best else None,
    }


def run_tests(processes: Processes, seconds: float) -> dict[str, Any]:
    """Runs `GPU_TESTS` with pytest. Tests that fail are a result, not an error, and so are those that find no time."""
    script = "import pytest, sys; code = pytest.main(sys.argv[1:]); sys.exit(0 if code in (0, 1) else code)"
    until = time.monotonic() + seconds
    counts: Counter[str] = Counter()
    failures: list[str] = []
    for files in GPU_TESTS:
        arguments = ["-q", "-rfE", "-p", "no:cacheprovider", "-k", GPU_TEST_NAMES, *files]
        try:
            output = processes.run(["-c", script, *arguments], max(until - time.monotonic(), 0.0))
        except PartError as error:
            failures.append(f"{' '.join(files)}: {error}")
            continue
        *_, summary = output.strip().splitlines()
        for count, name in re.findall(r"(\d+) (passed|failed|error|skipped)", summary):
            counts[name] += int(count)
        failures += [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    every = [file for files in GPU_TESTS for file in files]
    return {"files": every, "names": GPU_TEST_NAMES, "counts": counts, "failures": failures}


# --- goals --------------------------------------------------------------------------------------------------------


def goals(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What should come out, beside what did; `is_met` is None where it was not measured, or cannot be told."""
    rows: list[dict[str, Any]] = []

    def add(goal: str, value: str | None, is_met: bool | None) -> None:
        rows.append({"goal": goal, "found": value or "not measured", "is_met": is_met if value else None})

    seconds = results["recipe"]["seconds"] if "recipe" in results else None
    add(
        f"the Shakespeare recipe in less than {RECIPE_SECONDS:.0f} s, compilation included",
        seconds and f"{seconds:.1f} s",
        seconds and seconds < RECIPE_SECONDS,
    )
    float_steps = results.get(f"{GPT2}, bf16")
    mfu = float_steps and float_steps["mfu"]
    add(f"{GPT2} in bf16: an MFU of {MFU:.0%}", mfu and f"{mfu:.1%}", mfu and mfu >= MFU)
    for name in CONTENDERS:
        steps = results.get(f"{GPT2}, {name}")
        if CONTENDERS[name] is None:
            continue
        ratio = steps and float_steps and steps["step_time_ms"] / float_steps["step_time_ms"]
        text = ratio and f"{ratio:.2f} times its time"
        add(f"{GPT2}, {name}: a step no slower than bf16", text, ratio and ratio <= RATIO)
        rows.append(_tensor_cores(f"{GPT2}, {name}: int8 products on int8 tensor cores", steps))
    compared = results.get("logits")
    equal = compared and sum(row["equal"] for row in compared)
    text = compared and f"{equal} of {len(compared)}"
    add("logits in integers equal on GPU and CPU, in every bit", text, compared and equal == len(compared))
    model = results.get("recipe's int8 model")
    text = model and ("equal" if model["equal"] else f"different by up to {model['largest_difference']:g}")
    add("those of the recipe's int8 model, too", text, model and model["equal"])
    tests = results.get("tests")
    text = tests and ", ".join(f"{count} {name}" for name, count in (tests["counts"] or {"passed": 0}).items())
    add("the GPU's tests pass", text, tests and not tests["failures"] and tests["counts"].get("passed", 0) > 0)
    return rows


def _tensor_cores(goal: str, steps: Mapping[str, Any] | None) -> dict[str, Any]:
    """By share of the FLOPs; not told where part of them is computed by a library, unless a loop does the rest."""
    if steps is None:
        return {"goal": goal, "found": "not measured", "is_met": None}
    rows = [row for row in steps["products"] if row["precision"] == "int8"]
    total = sum(row["flops"] for row in rows)
    share = {kind: sum(row["flops"] for row in rows if row["tensor_cores"] is kind) for kind in (True, False, None)}
    if not total:
        return {"goal": goal, "found": "no int8 products", "is_met": False}
    parts = {True: "on them", False: "not on them", None: "by library kernels, see their names"}
    text = ", ".join(f"{share[kind] / total:.0%} {words}" for kind, words in parts.items() if share[kind])
    return {"goal": goal, "found": text, "is_met": False if share[False] else None if share[None] else True}
