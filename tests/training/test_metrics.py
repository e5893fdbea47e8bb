import io
import json
import logging
import math
import os
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picogpt_jax.config import LogConfig
from picogpt_jax.errors import UserError
from picogpt_jax.training import metrics
from picogpt_jax.training.metrics import ProgressBar, metrics_writer, read_metrics

PLAIN = LogConfig(tensorboard=False, wandb=False, wandb_project="test")
TENSORBOARD = LogConfig(tensorboard=True, wandb=False, wandb_project="test")
WANDB = LogConfig(tensorboard=False, wandb=True, wandb_project="test")
CONFIG = {"train": {"max_iters": 30}}


def write_steps(workdir: Path, steps: range, resume_step: int | None = None, log: LogConfig = PLAIN) -> None:
    with metrics_writer(workdir, log, CONFIG, resume_step) as write:
        for step in steps:
            write(step, "train", {"loss": 4.0 / (step + 1)})
            if step % 10 == 0:
                write(step, "val", {"loss": 5.0 / (step + 1), "bits_per_char": 1 / 3})


def test_the_file_has_one_json_line_an_event(tmp_path: Path) -> None:
    with metrics_writer(tmp_path, PLAIN, CONFIG) as write:
        write(0, "val", {"loss": 4.25, "bits_per_char": 6.5})
        write(10, "train", {"loss": np.float32(2.5), "tokens": 4096})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "split": "val", "loss": 4.25, "bits_per_char": 6.5},
        {"step": 10, "split": "train", "loss": 2.5, "tokens": 4096},
    ]
    assert read_metrics(tmp_path / "metrics.jsonl") == [json.loads(line) for line in lines]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with metrics_writer(tmp_path, PLAIN, CONFIG) as write:
        write(1, "train", {"loss": 1.0})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "split": "train", "loss": 1.0}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_becomes_null(tmp_path: Path, value: float) -> None:
    with metrics_writer(tmp_path, PLAIN, CONFIG) as write:
        write(1, "train", {"loss": value})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "split": "train", "loss": null}\n'
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] is None


def test_a_resumed_run_leaves_the_same_file_as_an_uninterrupted_one(tmp_path: Path) -> None:
    write_steps(tmp_path / "straight", range(31))
    write_steps(tmp_path / "resumed", range(27))
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 27, "split": "tr')  # the kill came in the middle of a line
    write_steps(tmp_path / "resumed", range(21, 31), resume_step=20)
    straight, resumed = ((tmp_path / run / "metrics.jsonl").read_bytes() for run in ("straight", "resumed"))
    assert resumed == straight


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    write_steps(tmp_path, range(5))
    write_steps(tmp_path, range(2))
    assert [event["step"] for event in read_metrics(tmp_path / "metrics.jsonl")] == [0, 0, 1]


def test_a_resumed_run_that_learns_otherwise_says_so(tmp_path: Path) -> None:
    write_steps(tmp_path, range(27))
    with metrics_writer(tmp_path, PLAIN, CONFIG, 20, "optimizer.learning_rate 0.03 -> 0.01"):
        pass
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last == {"step": 20, "split": "resume", "changes": "optimizer.learning_rate 0.03 -> 0.01"}


def test_resuming_refuses_a_damaged_file_and_leaves_it_alone(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("not json\n")
    with (
        pytest.raises(UserError, match=r"line 1: found 'not json'.*move the file away"),
        metrics_writer(tmp_path, PLAIN, CONFIG, resume_step=3),
    ):
        pass
    assert file.read_text() == "not json\n"


def test_a_writer_that_is_not_enabled_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with metrics_writer(tmp_path, TENSORBOARD, CONFIG, enabled=False) as write:
        write(1, "val", {"loss": 1.0})
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        '{"split": "val", "loss": 1.0}',
        '{"step": 1, "loss": 1.0}',
        '{"step": -1, "split": "val"}',
        '{"step": true, "split": "val"}',
        '{"step": 1.0, "split": "val"}',
        '{"step": 1, "split": "val", "loss": "low"}',
        '{"step": 1, "split": "val", "loss": NaN}',
        '{"step": 1, "split": "val", "loss": false}',
        "",
    ],
)
def test_reading_names_the_line_that_is_not_an_event(tmp_path: Path, line: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 0, "split": "val", "loss": 1}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: found .*expected an event such as"):
        read_metrics(file)


def test_reading_leaves_out_an_unfinished_last_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "split": "val", "loss": 1.5}\n{"step": 1, "spl')
    assert read_metrics(file) == [{"step": 0, "split": "val", "loss": 1.5}]


def test_reading_what_is_no_metrics_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*No such file.*expected the metrics\.jsonl of a workdir"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "model").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not text"):
        read_metrics(tmp_path / "model")


def test_an_evaluation_is_printed_and_a_training_step_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="absl"), metrics_writer(tmp_path, PLAIN, CONFIG) as write:
        write(20, "val", {"loss": 1.9012, "bits_per_char": 2.7428})
        write(20, "train", {"loss": 1.8, "learning_rate": 3e-3, "tokens_per_second": 31234.4, "z": 0.5})
    assert capsys.readouterr().out == "step 20/30  val loss 1.9012  bits/char 2.743\n"
    assert caplog.messages == ["step 20/30  train loss 1.8000  lr 3.00e-03  tokens/s 31,234  z 0.5"]


def tensorboard_scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Reads the event files, TFRecords: length, its checksum, record, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    scalars = []
    for file in sorted(folder.iterdir()):
        content, position = file.read_bytes(), 0
        while position < len(content):
            (length,) = struct.unpack_from("<Q", content, position)
            event = Event.FromString(content[position + 12 : position + 12 + length])
            scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            position += length + 16
    return scalars


def test_tensorboard_gets_every_value(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with metrics_writer(tmp_path, TENSORBOARD, CONFIG) as write:
        write(10, "val", {"loss": 1.5, "bits_per_char": 2.25})
        write(11, "train", {"loss": 1.25})
    assert tensorboard_scalars(tmp_path / "tensorboard") == [
        ("val/loss", 10, 1.5),
        ("val/bits_per_char", 10, 2.25),
        ("train/loss", 11, 1.25),
    ]


class FakeRun:
    """Records what the writer asks of a W&B run."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.axes, self.rows, self.finished = settings, [], [], False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes.append((name, step_metric))

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def __enter__(self) -> "FakeRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.finished = True


def test_wandb_goes_on_with_the_same_run_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[FakeRun] = []
    fake = types.SimpleNamespace(init=lambda **settings: runs.append(FakeRun(**settings)) or runs[-1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume_step in (None, 20, None):
        write_steps(tmp_path, range(20, 22), resume_step, WANDB)
    first, resumed, new = runs
    assert first.settings["project"] == "test"
    assert first.settings["config"] == CONFIG
    assert first.settings["id"] == resumed.settings["id"] != new.settings["id"]
    assert first.axes == [("*", "step")]
    assert first.rows[1] == {"step": 20, "val/loss": 5.0 / 21, "val/bits_per_char": 1 / 3}
    assert first.finished


@pytest.mark.parametrize("seconds", ["20", "90"])
def test_a_run_that_wandb_refuses_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: str
) -> None:
    """Without a key or a network, or for its name; of the user's patience where that is said."""

    def refuse(**_: Any) -> None:
        raise RuntimeError(f"no reply after {os.environ['WANDB_INIT_TIMEOUT']} s\n" + "and much more " * 99)

    monkeypatch.setenv("WANDB_INIT_TIMEOUT", seconds)  # put back afterwards
    if seconds == "20":
        monkeypatch.delenv("WANDB_INIT_TIMEOUT")
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    with pytest.raises(UserError) as caught, metrics_writer(tmp_path, WANDB, CONFIG):
        pass
    message = str(caught.value)
    assert message.startswith(f"log.wandb=True: W&B does not take the run: no reply after {seconds} s and much more")
    assert all(name in message for name in ("WANDB_API_KEY", "WANDB_MODE=offline", "log.wandb_project (now 'test')"))
    assert len(message) < 400
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("log", "package", "extra"), [(TENSORBOARD, "tensorboardX", "tensorboard"), (WANDB, "wandb", "wandb")]
)
def test_a_missing_package_names_its_extra_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: LogConfig, package: str, extra: str
) -> None:
    write_steps(tmp_path, range(2))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"needs {package}.*picogpt_jax\[{extra}\].*--config\.log\.{extra}=False"
    with pytest.raises(UserError, match=message), metrics_writer(tmp_path, log, CONFIG):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_progress_away_from_a_terminal_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(metrics, "SECONDS_BETWEEN_LINES", 0.0)
    with ProgressBar(30, step=10) as progress:
        progress.update(20, loss=1.9, tokens_per_second=31234.0)
    assert "\r" not in stderr.getvalue()
    assert [line.split()[0] for line in stderr.getvalue().splitlines()] == ["10/30", "20/30", "20/30"]
    assert stderr.getvalue().endswith("left, loss 1.9000, 31,234 tokens/s\n")


@pytest.mark.parametrize("place", ["terminal", "notebook"])
def test_progress_on_a_terminal_and_in_a_notebook_is_a_bar(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: place == "terminal")
    monkeypatch.setattr(metrics, "IS_WIDGET", place == "notebook")
    monkeypatch.setattr(sys, "stderr", stderr)
    with ProgressBar(30) as progress:
        progress.update(15, loss=1.9, tokens_per_second=31234.0)
    last = stderr.getvalue().rstrip("\n").split("\r")[-1]
    assert last.startswith(" 50%|")
    assert "| 15/30 [" in last
    assert last.endswith(", loss 1.9000, 31,234 tokens/s]")


def test_progress_that_is_not_enabled_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(30, enabled=False) as progress:
        progress.update(15, loss=1.9, tokens_per_second=31234.0)
    assert capsys.readouterr().err == ""
