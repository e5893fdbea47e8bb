"""The training loop, to be read from top to bottom: restore; then batch, step, log, evaluate, save."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from picogpt_jax.config import Config
from picogpt_jax.devices import distributed
from picogpt_jax.devices.chips import model_flops_utilization
from picogpt_jax.errors import UserError
from picogpt_jax.files import locked, write_json
from picogpt_jax.model.numerics import Mode
from picogpt_jax.text.batches import Split, Tokens
from picogpt_jax.text.vocabulary import Vocabulary
from picogpt_jax.training import checkpoint
from picogpt_jax.training.evaluate import Evaluator
from picogpt_jax.training.metrics import ProgressBar, Write, metrics_writer
from picogpt_jax.training.optimizer import learning_rate_schedule
from picogpt_jax.training.resume import begin, check_resumable
from picogpt_jax.training.trainer import Batches, StepMetrics, Trainer, compute_dtype

TOKENS_COUNTED = 1 << 20  # tokens of the validation split that tell how many characters one has


def dispatches(config: Config, first: int) -> Iterator[tuple[int, int]]:
    """Splits the steps from `first` on into runs that end where something is logged, evaluated or changed."""
    train = config.train
    while first < train.max_iters:
        ends = [(first // every + 1) * every for every in (train.log_interval, train.eval_interval)]
        ends += [end for end in (config.quant.start_step, train.max_iters) if end > first]
        yield first, min(ends)
        first = min(ends)


class StopSignal:
    """Notes SIGINT and SIGTERM, so that the loop can save before it leaves; a second one ends the program at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number


@dataclasses.dataclass(frozen=True)
class Result:
    """How a training ended."""

    step: int
    val_loss: float | None  # nats per token, of the last evaluation
    best_val_loss: float
    stopped_by: int | None  # the signal that ended it


def train(
    config: Config, vocabulary: Vocabulary, workdir: str | os.PathLike[str], resume: bool | None = None
) -> Result:
    """Trains until `train.max_iters`; evaluates and saves every `train.eval_interval` steps.

    Args:
        config: the run; `model.vocab_size` is the vocabulary's, or larger: the rows beyond it are of training alone.
        vocabulary: of the data in `data.dir`.
        workdir: gets checkpoints/, config.json, vocab.json and metrics.jsonl.
        resume: True: there must be something to resume; False: there must not be; None: resume where there is.

    Raises:
        UserError: data, workdir or configuration do not fit, or the loss stopped being finite.
    """
    workdir = Path(workdir)
    distributed.require_same("configuration", json.dumps([config.to_dict(), vocabulary.to_json()]))
    with distributed.together():  # a mistake of the configuration's is every process's
        if vocabulary.size > config.model.vocab_size:
            raise UserError(
                f"{config.data.dir} has a vocabulary of {vocabulary.size} tokens, for which model.vocab_size="
                f"{config.model.vocab_size} has no room; leave model.vocab_size out, or give at least {vocabulary.size}"
            )
        trainer = Trainer(config, vocabulary_size=vocabulary.size)
        distributed.check_mesh(trainer.mesh)
    with contextlib.ExitStack() as stack:
        with distributed.together():
            tokens: dict[Split, Tokens] = {
                split: Tokens.open(
                    config.data.dir, split, config.model.block_size, vocabulary.size, distributed.is_first()
                )
                for split in typing.get_args(Split)
            }
            fingerprints = [split.fingerprint() for split in tokens.values()]
            changes = check_resumable(workdir, config, vocabulary, resume, fingerprints)
            if distributed.is_first():
                stack.enter_context(locked(workdir, "training in"))
        distributed.require_same("data set", json.dumps(fingerprints))
        return _train(config, vocabulary, workdir, trainer, tokens, changes)


def _train(
    config: Config, vocabulary: Vocabulary, workdir: Path, trainer: Trainer, tokens: dict[Split, Tokens], changes: str
) -> Result:
    with (
        checkpoint.Checkpoints(workdir, config.checkpoint.keep) as checkpoints,
        _disk_errors(workdir, checkpoints),
        StopSignal() as stop,
        contextlib.ExitStack() as stack,
    ):
        state, first, best, resume_step = begin(trainer, checkpoints, workdir)
        val_loss, stopped_by = None, 0
        with distributed.together():
            is_first = distributed.is_first()
            write = stack.enter_context(
                metrics_writer(workdir, config.log, config.to_dict(), resume_step, changes, enabled=is_first)
            )
            if is_first:
                write_json(workdir / "config.json", config.to_dict())
                vocabulary.save(workdir / "vocab.json")

        def save(step: int, val_loss: float | None, ranked: bool = False) -> None:
            meta = {
                "config": config.to_dict(),
                "vocab": vocabulary.to_json(),
                "data": [split.fingerprint() for split in tokens.values()],
                "val_loss": val_loss,
                "best_val_loss": best,
            }
            checkpoints.save(step, state, meta, val_loss if ranked else None)

        evaluators: dict[Mode, Evaluator] = {}
        max_windows = config.train.eval_iters * config.train.batch_size
        unit, tokens_a_unit = vocabulary.bits_unit(tokens["val"].ids[:TOKENS_COUNTED])

        def evaluate(step: int) -> float:
            """Writes the loss of the forward pass that the step before had, an untrained model's float one; saves."""
            nonlocal best
            mode = trainer.mode_at(step - 1)
            evaluator = evaluators.setdefault(mode, trainer.evaluator(mode))
            val_loss = evaluator.loss(state.params, tokens["val"].ids, max_windows)
            if not math.isfinite(val_loss):
                _stop_not_finite(f"the validation loss of step {step}", config, workdir, checkpoints)
            write(step, "val", {"loss": val_loss, unit: val_loss / math.log(2) * tokens_a_unit})
            # Before quant.start_step nothing is quantized yet: such a checkpoint is never the best one.
            ranked = mode == trainer.mode_at(config.train.max_iters - 1)
            best = min(best, val_loss) if ranked else best
            save(step, val_loss, ranked)
            return val_loss

        batches = Batches(config, tokens["train"], trainer.mesh)
        with ProgressBar(config.train.max_iters, first, enabled=is_first) as progress:
            log = TrainLog(config, write, progress, trainer.mesh)
            signals = distributed.Largest()  # one process's signal stops all of them after the same step
            step = first
            for start, step in dispatches(config, first):
                state, metrics = trainer.steps(state, batches.corpus, batches(start, step), trainer.mode_at(start))
                is_evaluated = step % config.train.eval_interval == 0 or step == config.train.max_iters
                stopped_by = signals(stop.received or 0)  # asked once: a signal after this ends the next dispatch
                log.enqueue(start, step, metrics, flush=is_evaluated or bool(stopped_by))
                checkpoints.check()
                if log.failed_step is not None:
                    _stop_not_finite(f"the loss of step {log.failed_step}", config, workdir, checkpoints)
                if is_evaluated:
                    began = time.perf_counter()
                    val_loss = evaluate(step)
                    log.exclude(time.perf_counter() - began)
                if stopped_by:
                    save(step, None)  # unless the evaluation has just saved it
                    break
            if config.train.max_iters == 0 and resume_step is None:
                val_loss = evaluate(0)
    finished = step >= config.train.max_iters
    return Result(step=step, val_loss=val_loss, best_val_loss=best, stopped_by=None if finished else stopped_by)


@contextlib.contextmanager
def _disk_errors(workdir: Path, checkpoints: checkpoint.Checkpoints) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if distributed.is_lost(error):
            raise
        if jax.process_count() == 1:  # else another process may be gone, and it would be waited for
            checkpoints.wait()
        raise checkpoints.failure(f"write to {workdir}", error) from error


class TrainLog:
    """Turns metrics into log lines, at most one dispatch late, so that the device never waits for the host."""

    def __init__(self, config: Config, write: Write, progress: ProgressBar, mesh: Mesh) -> None:
        self.config, self.write, self.progress, self.mesh = config, write, progress, mesh
        self.schedule = learning_rate_schedule(config.optimizer)
        self.failed_step: int | None = None
        self._pending: list[tuple[int, int, StepMetrics]] = []
        self._losses: list[float] = []  # of the steps since the last line
        self._seconds = 0.0  # that they took
        self._began = time.perf_counter()

    def enqueue(self, start: int, stop: int, metrics: StepMetrics, flush: bool) -> None:
        """Takes the metrics of steps start .. stop-1; reads those of the dispatch before, and these if ready.

        Of several processes each would find others ready, and end at another step when a loss is not finite: they read
        those of the dispatch before, and no more.
        """
        self._pending.append((start, stop, metrics))
        n_read = len(self._pending) - (not flush and not _is_ready(metrics.loss))
        read, self._pending = self._pending[:n_read], self._pending[n_read:]
        if not read:
            return
        losses = [np.asarray(item[2].loss) for item in read]  # waits for the device
        now = time.perf_counter()
        step_seconds = (now - self._began) / (read[-1][1] - read[0][0])
        self._began = now
        for (first, last, item), values in zip(read, losses, strict=True):
            self._record(first, last, values, item, step_seconds)

    def exclude(self, seconds: float) -> None:
        """Leaves time that was not spent on training out of the step time."""
        self._began += seconds

    def _record(
        self, start: int, stop: int, losses: npt.NDArray[np.float32], metrics: StepMetrics, step_seconds: float
    ) -> None:
        if not np.isfinite(losses).all():
            self.failed_step = self.failed_step or start + int(np.argmin(np.isfinite(losses))) + 1
            return
        self._losses += losses.tolist()
        self._seconds += step_seconds * (stop - start)
        train = self.config.train
        if stop % train.log_interval and stop != train.max_iters:
            return
        step_seconds = self._seconds / len(self._losses)
        tokens_per_second = train.batch_size * self.config.model.block_size / step_seconds
        values = {
            "loss": float(np.mean(self._losses)),
            "step_time_ms": 1e3 * step_seconds,
            "tokens_per_second": tokens_per_second,
            "learning_rate": float(self.schedule(stop - 1)),
            "grad_norm": float(np.asarray(metrics.grad_norm)[-1]),
        }
        flops_per_second = tokens_per_second * self.config.model.flops_per_token
        mfu = model_flops_utilization(flops_per_second, self.mesh.devices.flat[0].device_kind, self.mesh.size)
        values |= {} if mfu is None else {"mfu": mfu}
        self.write(stop, "train", values)
        self.progress.update(stop, values["loss"], tokens_per_second)
        self._losses, self._seconds = [], 0.0


def _is_ready(array: Any) -> bool:
    return jax.process_count() == 1 and bool(array.is_ready())  # jax.Array has it; its type stub has not


def _stop_not_finite(what: str, config: Config, workdir: Path, checkpoints: checkpoint.Checkpoints) -> NoReturn:
    checkpoints.wait()
    steps = checkpoints.steps
    last = f"the last good checkpoint is step {steps[-1]} in {workdir}" if steps else "no checkpoint had been written"
    raise distributed.AgreedError(f"{what} is not finite; {last}. {_calmer(config)}")


def _calmer(config: Config) -> str:
    """The flags with which to start again: `training.resume` lets them change."""
    rate, floor = config.optimizer.learning_rate, config.optimizer.min_lr
    flags = [f"--config.optimizer.learning_rate={rate / 2:g}"]
    flags += [f"--config.optimizer.min_lr={rate / 2:g}"] if rate / 2 < floor else []
    text = f"Start again with the same command and {' '.join(flags)}"
    if not config.optimizer.grad_clip:
        text += ", or --config.optimizer.grad_clip=1"
    if compute_dtype(config.train.dtype) != "float32":
        text += ", or --config.train.dtype=float32"
    return text
