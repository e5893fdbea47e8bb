"""Writes a run's metrics: a JSON line for each event in `metrics.jsonl`, copies for other tools, a progress bar.

An event is `{"step": 250, "split": "val", "loss": 1.9, ...}`. JSON has neither NaN nor infinity: such a value is null.
"""

import contextlib
import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from picogpt_jax.config import LogConfig
from picogpt_jax.errors import UserError
from picogpt_jax.files import atomic_path
from picogpt_jax.progress import IS_WIDGET, tqdm

Event = dict[str, Any]
Write = Callable[[int, str, Mapping[str, float]], None]

METRICS_FILE = "metrics.jsonl"
WANDB_SECONDS = 20  # to reach W&B's server, where WANDB_INIT_TIMEOUT does not say it
SECONDS_BETWEEN_LINES = 10.0  # of progress, where stderr is a file or a pipe
# name -> its label and format on the console; a metric that is not named here is shown as `name 1.234`
CONSOLE = {
    "loss": ("loss", ".4f"),
    "bits_per_char": ("bits/char", ".3f"),
    "bits_per_token": ("bits/token", ".3f"),
    "step_time_ms": ("ms/step", ".1f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "learning_rate": ("lr", ".2e"),
    "grad_norm": ("grad norm", ".3f"),
    "mfu": ("MFU", ".1%"),
}


@contextlib.contextmanager
def metrics_writer(
    workdir: Path,
    log: LogConfig,
    config_dict: Mapping[str, Any],
    resume_step: int | None = None,
    changes: str = "",
    *,
    enabled: bool = True,
) -> Iterator[Write]:
    """Yields what writes the events of one run: `write(step, split, values)`, after `step` optimizer steps.

    A run resumed from the checkpoint of `resume_step` leaves the same file as one that was never interrupted: the lines
    of later steps are dropped first. So write what belongs to a step before you save its checkpoint.

    Args:
        workdir: the run's folder.
        log: which mirrors to write beside `metrics.jsonl`.
        config_dict: `Config.to_dict()`; W&B shows it.
        resume_step: the step of the restored checkpoint; None for a new run, which starts an empty file.
        changes: what the resumed run changes of what it learns; an event of the split "resume" says it.
        enabled: False writes nothing, for the processes of a multi-host run that are not the first.

    Raises:
        UserError: on entering: a mirror's package is missing, or the file is damaged or cannot be written.
    """
    with contextlib.ExitStack() as stack:  # closes what is open already if a later one fails
        writers: list[Write] = []
        if enabled and log.tensorboard:
            writers.append(stack.enter_context(_tensorboard(workdir, resume_step)))
        if enabled and log.wandb:
            writers.append(stack.enter_context(_wandb(workdir, log.wandb_project, config_dict, resume_step)))
        if enabled:
            writers.append(stack.enter_context(_json_lines(workdir / METRICS_FILE, resume_step, changes)))
            writers.append(_console(config_dict["train"]["max_iters"]))

        def write(step: int, split: str, values: Mapping[str, float]) -> None:
            numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
            for one in writers:
                one(step, split, numbers)

        yield write


def read_metrics(path: str | os.PathLike[str]) -> list[Event]:
    """Reads a `metrics.jsonl`, in the order of the file; what follows the last line break is unfinished and left out.

    Raises:
        UserError: the file cannot be read, or a line is not an event; the message names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected the {METRICS_FILE} of a workdir") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text; expected the {METRICS_FILE} of a workdir") from None
    return [_parse_event(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parse_event(line: str, where: str) -> Event:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        event = None
    if not _is_event(event):
        raise UserError(
            f'{where}: found {line!r:.80}, expected an event such as {{"step": 250, "split": "val", "loss": 1.9}}; '
            "remove the line, or move the file away"
        )
    return event


def _is_event(event: Any) -> bool:
    if not isinstance(event, dict):
        return False
    values = dict(event)
    step, split, changes = values.pop("step", None), values.pop("split", None), values.pop("changes", "")
    has_names = type(step) is int and step >= 0 and isinstance(split, str) and isinstance(changes, str)
    return has_names and all(map(_is_number_or_null, values.values()))


def _is_number_or_null(value: Any) -> bool:
    return value is None or type(value) is int or (type(value) is float and math.isfinite(value))


@contextlib.contextmanager
def _json_lines(path: Path, resume_step: int | None, changes: str) -> Iterator[Write]:
    resumed = resume_step is not None and path.exists()
    kept = [event for event in read_metrics(path) if event["step"] <= resume_step] if resumed else []
    kept += [{"step": resume_step, "split": "resume", "changes": changes}] if changes else []
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(event) + "\n" for event in kept), encoding="utf-8")
    with path.open("a", encoding="utf-8", buffering=1) as file:  # a line is on its way to the disk once it is complete

        def write(step: int, split: str, values: Mapping[str, float]) -> None:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")

        yield write


def _console(max_iters: int) -> Write:
    """Evaluations go to stdout; training steps, which the progress bar shows, to the log (`--verbosity=0`)."""

    def write(step: int, split: str, values: Mapping[str, float]) -> None:
        labelled = [(*CONSOLE.get(name, (name, ".4g")), value) for name, value in values.items()]
        numbers = "  ".join(f"{label} {value:{form}}" for label, form, value in labelled)
        line = f"step {step}/{max_iters}  {split} {numbers}"
        if split == "train":
            logging.info("%s", line)
        else:
            tqdm.write(line)  # print, but above the progress bar
            sys.stdout.flush()

    return write


@contextlib.contextmanager
def _tensorboard(workdir: Path, resume_step: int | None) -> Iterator[Write]:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise _missing("tensorboard", "tensorboardX") from None
    purge_step = 0 if resume_step is None else resume_step + 1  # TensorBoard hides what was written from there on
    with SummaryWriter(str(workdir / "tensorboard"), purge_step=purge_step) as writer:

        def write(step: int, split: str, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(f"{split}/{name}", value, step)

        yield write


@contextlib.contextmanager
def _wandb(workdir: Path, project: str, config_dict: Mapping[str, Any], resume_step: int | None) -> Iterator[Write]:
    try:
        import wandb
    except ImportError:
        raise _missing("wandb", "wandb") from None
    id_file = workdir / "wandb_run_id"  # a resumed run goes on with its curves
    if resume_step is None or not id_file.exists():
        with atomic_path(id_file) as temporary:
            temporary.write_text(secrets.token_hex(8), encoding="utf-8")
    run_id = id_file.read_text(encoding="utf-8")
    settings = dict(project=project, name=workdir.resolve().name, dir=str(workdir), config=dict(config_dict))
    os.environ.setdefault("WANDB_INIT_TIMEOUT", str(WANDB_SECONDS))
    try:
        run = wandb.init(id=run_id, resume="allow", **settings)
    except Exception as error:  # of wandb's own kinds, and of what it asks
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"log.wandb=True: W&B does not take the run: {reason}; set WANDB_API_KEY, or WANDB_MODE=offline, or "
            f"--config.log.wandb_project (now {project!r}), or --config.log.wandb=False"
        ) from error
    with run:
        # W&B's own step may not go back, and a resumed run repeats steps: so the step is a metric, the others' axis.
        run.define_metric("*", step_metric="step")

        def write(step: int, split: str, values: Mapping[str, float]) -> None:
            run.log({"step": step, **{f"{split}/{name}": value for name, value in values.items()}})

        yield write


def _missing(extra: str, package: str) -> UserError:
    return UserError(
        f"log.{extra}=True needs {package}, which is not installed; pip install 'picogpt_jax[{extra}]', "
        f"or --config.log.{extra}=False"
    )


class ProgressBar(contextlib.AbstractContextManager["ProgressBar"]):
    """The progress of a training run on stderr: loss, tokens per second, time left; a context manager.

    On a terminal and in a notebook it is a bar. Anywhere else (a file, CI) it is a line every ten seconds.

    Args:
        max_iters: the step at which the run ends.
        step: the step at which it starts; a resumed run's time left counts from there.
        enabled: False shows nothing.
    """

    def __init__(self, max_iters: int, step: int = 0, *, enabled: bool = True) -> None:
        is_bar = IS_WIDGET or sys.stderr.isatty()
        bar = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        line = "{n_fmt}/{total_fmt} steps, {elapsed} passed, {remaining} left{postfix}"
        self._bar = tqdm(
            total=max_iters,
            initial=step,
            disable=not enabled,
            bar_format=bar if is_bar else line,
            file=sys.stderr if is_bar else _Lines(),
            mininterval=0.1 if is_bar else SECONDS_BETWEEN_LINES,
            miniters=1,
            smoothing=0.05,  # a short average would take an evaluation for a slow-down
            dynamic_ncols=is_bar,
        )

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows that `step` optimizer steps are done, and what the last of them measured."""
        self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        self._bar.update(step - self._bar.n)


class _Lines:
    """A stream for tqdm that turns its carriage returns into lines."""

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
