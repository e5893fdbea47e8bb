import contextlib
import dataclasses
import errno
import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from tiny import TRAIN_BIN, VOCABULARY, same, tiny_config, write_data

from picogpt_jax.config import Config
from picogpt_jax.errors import UserError
from picogpt_jax.formats.sources import load_float
from picogpt_jax.int8.convert import int8_model
from picogpt_jax.runtimes.torch_model import Int8GPT
from picogpt_jax.text.reading import load_vocabulary
from picogpt_jax.text.vocabulary import TokenIds
from picogpt_jax.training import loop as train_module
from picogpt_jax.training import trainer as trainer_module
from picogpt_jax.training.checkpoint import Checkpoints
from picogpt_jax.training.evaluate import Evaluator
from picogpt_jax.training.loop import Result, dispatches, train
from picogpt_jax.training.metrics import metrics_writer, read_metrics
from picogpt_jax.training.resume import NOTED_ON_RESUME
from picogpt_jax.training.trainer import StepMetrics, Trainer, TrainState

pytestmark = pytest.mark.usefixtures("compile_quickly_and_once")


def test_dispatches_end_where_something_happens() -> None:
    config = tiny_config(train__max_iters=25, train__eval_interval=10, train__log_interval=4, quant__start_step=13)
    runs = list(dispatches(config, 0))
    assert runs == [(0, 4), (4, 8), (8, 10), (10, 12), (12, 13), (13, 16), (16, 20), (20, 24), (24, 25)]
    assert list(dispatches(config, 16)) == runs[6:]
    assert list(dispatches(config, 25)) == []


# ----------------------------------------------------------------------------------------------------------- whole runs


def events(workdir: Path, split: str) -> dict[int, float]:
    """step -> loss"""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["split"] == split}


def restored(workdir: Path, step: int, config: Config) -> TrainState:
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(Trainer(config).abstract_state, step).state


@dataclasses.dataclass(frozen=True)
class Run:
    config: Config
    workdir: Path
    result: Result


@pytest.fixture(scope="module")
def finished(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Eight steps without a break."""
    config = tiny_config(data_dir)
    workdir = tmp_path_factory.mktemp("straight")
    return Run(config, workdir, train(config, VOCABULARY, workdir))


@pytest.fixture
def workdir(finished: Run, tmp_path: Path) -> Path:
    """A copy of the finished run's folder."""
    return shutil.copytree(finished.workdir, tmp_path / "run")


def longer(config: Config, max_iters: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, max_iters=max_iters))


def test_a_run_leaves_what_the_contract_says(finished: Run) -> None:
    assert sorted(path.name for path in finished.workdir.iterdir()) == [
        ".lock", "checkpoints", "config.json", "metrics.jsonl", "vocab.json"
    ]  # fmt: skip
    assert Config.from_dict(json.loads((finished.workdir / "config.json").read_text())) == finished.config
    assert load_vocabulary(finished.workdir / "vocab.json") == VOCABULARY
    lines = [json.loads(line) for line in (finished.workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [
        (2, "train"), (4, "train"), (4, "val"), (6, "train"), (8, "train"), (8, "val")
    ]  # fmt: skip
    assert {key for line in lines if line["split"] == "train" for key in line} == {
        "step", "split", "loss", "step_time_ms", "tokens_per_second", "learning_rate", "grad_norm"
    }  # fmt: skip
    assert [line["learning_rate"] for line in lines if line["split"] == "train"][:1] == [pytest.approx(2 / 3 * 3e-2)]
    val = [line for line in lines if line["split"] == "val"]
    assert val[1]["bits_per_char"] == pytest.approx(val[1]["loss"] / np.log(2))
    assert finished.result == Result(
        step=8, val_loss=val[1]["loss"], best_val_loss=min(line["loss"] for line in val), stopped_by=None
    )
    with Checkpoints(finished.workdir) as checkpoints:
        assert checkpoints.steps == [4, 8]
        meta = checkpoints.meta(8)
    assert meta["val_loss"] == val[1]["loss"]
    assert meta["config"] == finished.config.to_dict()
    assert meta["vocab"] == VOCABULARY.to_json()


def test_where_there_is_no_text_bits_are_those_of_a_token(
    data_dir: Path, tmp_path: Path, run_script: Callable[..., Any]
) -> None:
    config = tiny_config(data_dir, train__max_iters=4)
    train(config, TokenIds.of_size(VOCABULARY.size, "a test"), tmp_path / "run")
    event = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert event == {"step": 4, "split": "val", "loss": event["loss"], "bits_per_token": event["loss"] / math.log(2)}
    done = run_script("scripts/evaluate.py", "--model=run", f"--data={data_dir}", "--json=loss.json")
    assert re.match(r"loss \d\.\d+ nats, \d\.\d+ bits per token, 399 tokens", done.stdout), done.stderr
    result = json.loads((tmp_path / "loss.json").read_text())
    assert list(result) == ["loss", "bits_per_token", "tokens", "runtime", "model"]
    assert result["bits_per_token"] == pytest.approx(result["loss"] / math.log(2))


def test_a_padded_table_is_trained_and_resumed_and_not_served(data_dir: Path, tmp_path: Path) -> None:
    """The loss that is reported is that of the model without padding, in another runtime."""
    changes: dict[str, Any] = dict(model__vocab_size=16, quant__weight_granularity="per_tensor")
    config = tiny_config(data_dir, train__eval_iters=1 << 20, train__backward_dtype="same", **changes)
    train(longer(config, 4), VOCABULARY, tmp_path)
    result = train(config, VOCABULARY, tmp_path)
    assert Config.from_dict(json.loads((tmp_path / "config.json").read_text())) == config
    assert load_vocabulary(tmp_path / "vocab.json") == VOCABULARY
    source = load_float(tmp_path)
    assert (source.step, source.config.vocab_size, source.left_out) == (8, 12, 4)
    model = int8_model(source.config, source.quant, source.params, source.vocabulary, {})
    assert Int8GPT(model).evaluate(TRAIN_BIN, config.model.block_size) == pytest.approx(result.val_loss, rel=1e-5)


def test_a_vocabulary_must_fit_into_the_table(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has a vocabulary of 12 tokens, for which model.vocab_size=11 has no room; "):
        train(tiny_config(data_dir, model__vocab_size=11), VOCABULARY, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_id_that_is_no_token_is_refused_in_training(tmp_path: Path) -> None:
    """There is a row for it, but its loss would be that of the lowest number."""
    data = write_data(tmp_path / "data", "abc" * 20)
    np.full(100, 13, "<u2").tofile(data / "train.bin")
    with pytest.raises(UserError, match=r"train.bin holds token id 13; the vocabulary has 12"):
        train(tiny_config(data, model__vocab_size=16), VOCABULARY, tmp_path / "run")


def test_a_resumed_run_equals_one_without_a_break(finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = train(longer(finished.config, 4), VOCABULARY, tmp_path)
    assert first.step == 4
    second = train(finished.config, VOCABULARY, tmp_path, resume=True)
    assert f"resumed {tmp_path} at step 4" in capsys.readouterr().out
    assert second == finished.result
    for split in ("train", "val"):
        assert events(tmp_path, split) == events(finished.workdir, split)
    one, other = (restored(folder, 8, finished.config) for folder in (tmp_path, finished.workdir))
    assert same(one, other), "parameters, optimizer state, step and loss scale, bit for bit"
    assert int(one.step) == 8


def test_nothing_happens_when_there_is_nothing_left_to_do(finished: Run, workdir: Path) -> None:
    before = (workdir / "metrics.jsonl").read_text()
    result = train(finished.config, VOCABULARY, workdir)
    assert result == Result(step=8, val_loss=None, best_val_loss=finished.result.best_val_loss, stopped_by=None)
    assert (workdir / "metrics.jsonl").read_text() == before


def test_no_steps_are_an_evaluation_and_a_checkpoint(finished: Run, tmp_path: Path) -> None:
    result = train(longer(finished.config, 0), VOCABULARY, tmp_path)
    assert result.val_loss == result.best_val_loss == events(tmp_path, "val")[0]
    assert result.val_loss == pytest.approx(np.log(VOCABULARY.size), rel=0.2)
    source = load_float(tmp_path)
    assert (source.step, source.val_loss, source.qat) == (0, result.val_loss, False), "nothing is trained yet"
    before = (tmp_path / "metrics.jsonl").read_text()
    assert train(longer(finished.config, 0), VOCABULARY, tmp_path).best_val_loss == result.val_loss
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert train(longer(finished.config, 4), VOCABULARY, tmp_path).step == 4
    assert events(tmp_path, "train") == {
        step: loss for step, loss in events(finished.workdir, "train").items() if step < 5
    }


def test_fewer_steps_than_were_made_are_refused_and_nothing_changes(finished: Run, workdir: Path) -> None:
    stored = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"holds step 8 already, train\.max_iters=6 is less; give at least --con"):
        train(longer(finished.config, 6), VOCABULARY, workdir)
    assert (workdir / "config.json").read_bytes() == stored


def test_a_text_too_large_for_the_device_gives_the_same_parameters(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "RESIDENT_BYTES", 0)
    config = longer(finished.config, 4)
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, log_interval=4)), VOCABULARY, tmp_path)
    one, other = (restored(folder, 4, finished.config) for folder in (tmp_path, finished.workdir))
    assert same(one, other)


def test_a_run_can_begin_in_float(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which steps and evaluations are computed in which mode; nothing is computed here."""
    done = []
    construct = Trainer.__init__

    def without_steps(self: Trainer, *arguments: Any, **named: Any) -> None:
        construct(self, *arguments, **named)

        def steps(state: TrainState, _: Any, batches: Any, mode: str) -> tuple[TrainState, StepMetrics]:
            done.append((mode, len(batches)))
            return state, StepMetrics(loss=jnp.ones(len(batches)), grad_norm=jnp.ones(len(batches)))

        self.steps = steps

    monkeypatch.setattr(Trainer, "__init__", without_steps)
    monkeypatch.setattr(Evaluator, "loss", lambda *_: 1.0)
    evaluator = Trainer.evaluator
    monkeypatch.setattr(Trainer, "evaluator", lambda self, mode: done.append((mode, "val")) or evaluator(self, mode))
    train(tiny_config(data_dir, quant__start_step=5), VOCABULARY, tmp_path)
    assert done == [
        ("float", 2), ("float", 2), ("float", "val"), ("float", 1), ("train", 1), ("train", 2), ("train", "val")
    ]  # fmt: skip


def test_the_best_checkpoint_is_a_quantized_one(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(Evaluator, "loss", lambda *_: next(losses))
    config = tiny_config(data_dir, quant__start_step=2, train__eval_interval=2, train__max_iters=6, checkpoint__keep=3)
    assert train(config, VOCABULARY, tmp_path).best_val_loss == 2.0
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [2, 4, 6]
        assert checkpoints.best_step() == 6


def test_a_small_model_learns_a_repeated_text(finished: Run, tmp_path: Path) -> None:
    config = longer(finished.config, 120)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_interval=120))
    result = train(config, VOCABULARY, tmp_path)
    untrained = np.log(VOCABULARY.size)
    assert result.val_loss is not None
    assert result.val_loss < 0.1 * untrained, "every character but the first of a window follows from the one before"


# -------------------------------------------------------------------------------------------------------- what can fail


def poison(monkeypatch: pytest.MonkeyPatch, before: int | None = None, after: int | None = None) -> None:
    """Makes the parameters NaN when the steps are at `before` or `after`."""
    construct = Trainer.__init__

    def nan(state: TrainState) -> TrainState:
        return state.replace(params=jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), state.params))

    def poisoned(self: Trainer, *arguments: Any, **named: Any) -> None:
        construct(self, *arguments, **named)
        steps = self.steps

        def bad_steps(state: TrainState, *rest: Any) -> Any:
            state, metrics = steps(nan(state) if int(state.step) == before else state, *rest)
            return nan(state) if int(state.step) == after else state, metrics

        self.steps = bad_steps

    monkeypatch.setattr(Trainer, "__init__", poisoned)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            dict(before=4),
            r"the loss of step 5 is not finite; the last good checkpoint is step 4 in .*\. Start again with the same",
        ),
        (dict(after=8), r"the validation loss of step 8 is not finite; the last good checkpoint is step 4 in "),
        (dict(before=0), r"the loss of step 1 is not finite; no checkpoint had been written\. Start again with "),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_run(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: dict[str, int], message: str
) -> None:
    poison(monkeypatch, **where)
    with pytest.raises(UserError, match=message):
        train(finished.config, VOCABULARY, tmp_path)
    kept = {step: loss for step, loss in events(finished.workdir, "val").items() if "step 4" in message and step == 4}
    assert events(tmp_path, "val") == kept, "no NaN counts as a validation"
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == list(kept)


def advised(message: str) -> list[dict[str, Any]]:
    """The alternatives of the message, as changes for `tiny_config`."""
    alternatives = message.split(" the same command and ")[1].split(", or ")
    pairs = [[flag.removeprefix("--config.").split("=") for flag in text.split()] for text in alternatives]
    return [
        {key.replace(".", "__"): value if key == "train.dtype" else float(value) for key, value in changes}
        for changes in pairs
    ]


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, [{"optimizer__learning_rate"}]),
        (dict(optimizer__min_lr=2e-2), [{"optimizer__learning_rate", "optimizer__min_lr"}]),
        (
            dict(optimizer__grad_clip=0.0, train__dtype="bfloat16"),
            [{"optimizer__learning_rate"}, {"optimizer__grad_clip"}, {"train__dtype"}],
        ),
    ],
)
def test_the_advice_after_a_loss_that_is_not_finite_is_a_configuration(
    changes: dict[str, Any], keys: list[set[str]]
) -> None:
    alternatives = advised(train_module._calmer(tiny_config(**changes)))
    assert [set(alternative) for alternative in alternatives] == keys
    for alternative in alternatives:
        assert tiny_config(**changes | alternative) != tiny_config(**changes)
        assert {key.replace("__", ".") for key in alternative} <= NOTED_ON_RESUME


def test_the_advice_after_a_loss_that_is_not_finite_can_be_followed(
    finished: Run, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        poison(patch, before=4)
        with pytest.raises(UserError, match="is not finite") as caught:
            train(finished.config, VOCABULARY, tmp_path)
    (changes,) = advised(str(caught.value))
    assert train(tiny_config(data_dir, **changes), VOCABULARY, tmp_path, resume=True).step == 8
    notes = [event for event in read_metrics(tmp_path / "metrics.jsonl") if event["split"] == "resume"]
    assert notes == [{"step": 4, "split": "resume", "changes": "optimizer.learning_rate 0.03 -> 0.015"}]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(
    finished: Run, workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in (workdir / "checkpoints" / "8").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    train(longer(finished.config, 8), VOCABULARY, workdir)
    assert "checkpoints/8 is damaged" in caplog.text
    assert "trying the one before it" in caplog.text
    assert events(workdir, "train") == events(finished.workdir, "train")
    one, other = (restored(folder, 8, finished.config) for folder in (workdir, finished.workdir))
    assert same(one, other), "the lost steps have been made again"
    gc.collect()  # Orbax leaves an unfinished coroutine behind a read that fails; its warning belongs to this test


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """This process gets SIGINT before the steps that end at `at`."""
    split = train_module.dispatches

    def interrupted(*arguments: Any) -> Iterator[tuple[int, int]]:
        for start, stop in split(*arguments):
            if stop == at:
                os.kill(os.getpid(), signal.SIGINT)
            yield start, stop

    monkeypatch.setattr(train_module, "dispatches", interrupted)


@pytest.mark.parametrize("last", [4, 6])
def test_a_signal_saves_and_the_run_goes_on(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """With an evaluation at the last step, and without."""
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt(patch, last)
        result = train(finished.config, VOCABULARY, tmp_path)
    assert (result.step, result.stopped_by) == (last, signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler, "put back"
    val_losses = events(finished.workdir, "val")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == sorted({4, last})
        assert checkpoints.meta(last)["val_loss"] == val_losses.get(last)
    assert train(finished.config, VOCABULARY, tmp_path) == finished.result
    for name in ("train", "val"):
        assert events(tmp_path, name) == events(finished.workdir, name)


def test_a_signal_during_the_last_steps_comes_too_late(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is complete then, and its program ends as one that is."""
    interrupt(monkeypatch, 8)
    assert train(finished.config, VOCABULARY, tmp_path) == finished.result


def test_a_full_disk_ends_the_run_with_what_it_has(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def full(*arguments: Any, **options: Any) -> Iterator[Any]:
        with metrics_writer(*arguments, **options) as write:

            def write_while_there_is_room(step: int, *rest: Any) -> None:
                if step > 4:
                    raise OSError(errno.ENOSPC, "No space left on device")
                write(step, *rest)

            yield write_while_there_is_room

    monkeypatch.setattr(train_module, "metrics_writer", full)
    message = r"cannot write to .*: No space left on device; the last checkpoint is step 4\. Make room or give"
    with pytest.raises(UserError, match=message):
        train(finished.config, VOCABULARY, tmp_path)
    monkeypatch.undo()
    assert train(finished.config, VOCABULARY, tmp_path) == finished.result
    assert events(tmp_path, "train") == events(finished.workdir, "train")


def test_a_failed_background_save_ends_the_run_at_the_next_dispatch(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, checked = Checkpoints.check, []

    def failing(self: Checkpoints) -> None:
        checked.append(self)
        if len(checked) == 3:  # the first dispatch, and save() itself, have asked before
            raise UserError("cannot save step 4")
        check(self)

    monkeypatch.setattr(Checkpoints, "check", failing)
    with pytest.raises(UserError, match="cannot save step 4"):
        train(longer(finished.config, 1000), VOCABULARY, tmp_path)
    assert list(events(tmp_path, "train")) in ([2, 4], [2, 4, 6])


# ----------------------------------------------------------------------------------------------------- scripts/train.py


def start(cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cwd / "compiled"),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    command = [
        sys.executable,
        str(ROOT / "scripts" / "train.py"),
        f"--config={ROOT / 'configs' / 'base.py'}",
        *arguments,
    ]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_sigterm_saves_and_the_run_goes_on(data_dir: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    config = tiny_config(data_dir, train__max_iters=1_000_000, train__eval_interval=1_000_000).to_dict()
    flags = [
        f"--config.{section}.{key}={value}"
        for section in ("model", "optimizer", "train", "mesh", "data")
        for key, value in config[section].items()
    ]
    process = start(tmp_path, f"--workdir={workdir}", *flags)
    try:
        metrics = workdir / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "no step was made"
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, err
    with Checkpoints(workdir) as checkpoints:
        (step,) = checkpoints.steps
    assert f"stopped by a signal and saved step {step}; go on with the same command" in out
    assert "Traceback" not in err
    stored = Config.from_dict(json.loads((workdir / "config.json").read_text()))
    assert stored.to_dict() == config, "every flag has arrived"

    result = train(longer(stored, step + 4), VOCABULARY, workdir, resume=True)
    assert result.step == step + 4
    assert list(events(workdir, "train")) == list(range(2, step + 5, 2)), "no line is missing, none is there twice"


MISTAKES = {  # what is given beside --config and --config.data.dir -> how the message begins
    "": "error: --config and --workdir are needed, e.g. --config=configs/debug.py --workdir=runs/debug",
    "--workdir=w --config.train.lr=1": "error: a --config flag does not fit: 'lr'; configs/base.py lists the keys",
    "--workdir=w --config.train.batch_size=-3": "error: train.batch_size=-3 is not between 1 and",
    "--workdir=w --config.data.dir=nowhere": "error: nowhere has no meta.json",
    "--workdir=w --config.data.dir=": "error: --config.data.dir is needed: a folder with train.bin",
}


@pytest.fixture(scope="module")
def answers(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """All the mistakes at once, because a program needs seconds to start: arguments -> status, stdout, stderr."""
    folder = tmp_path_factory.mktemp("mistakes")
    data = f"--config.data.dir={data_dir}"
    processes = {arguments: start(folder, data, *arguments.split()) for arguments in MISTAKES}
    outputs = {arguments: process.communicate(timeout=120) for arguments, process in processes.items()}
    return {arguments: (processes[arguments].returncode, *output) for arguments, output in outputs.items()}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(arguments: str, answers: dict[str, tuple[int, str, str]]) -> None:
    status, out, err = answers[arguments]
    assert (status, out) == (2, ""), err
    assert err.startswith(MISTAKES[arguments])
    assert err.count("\n") == 1
