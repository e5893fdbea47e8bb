"""Which number of threads is taken, on a clock of the test's own, and what does not depend on it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_int8_model import random_model

from picogpt_jax import onnx_session
from picogpt_jax.errors import UserError
from picogpt_jax.onnx_export import onnx_model
from picogpt_jax.onnx_model import OnnxGPT
from picogpt_jax.onnx_session import ALONE, FIRST_TRIAL, LATEST, PER_CORE, TRIAL_EVERY, Session

TOKEN = {"input_ids": np.zeros((1, 1), np.int64)}


class Machine:
    """Sessions whose calls take the seconds given for their number of threads.

    Attributes:
        opened: the numbers of threads of the sessions, in order, with the model.
        calls: the numbers of threads of all calls.
        fails: whether calls end in an error.
    """

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds, self.now = seconds, 100.0
        self.opened: list[tuple[int, object]] = []
        self.calls: list[int] = []
        self.fails = False

    def open(self, model: object, threads: int) -> Any:
        machine = self
        machine.opened.append((threads, model))

        class Opened:
            def run(self, outputs: list[str], feeds: object) -> list[str]:
                if machine.fails:
                    raise KeyboardInterrupt
                machine.calls.append(threads)
                machine.now += machine.seconds[threads]
                return outputs

        return Opened()

    def work(self, session: Session, seconds: float) -> list[int]:
        """The numbers of threads of the calls during so much time."""
        begin, end = len(self.calls), self.now + seconds
        while self.now < end:
            assert session.run(["logits"], TOKEN) == ["logits"]
        return self.calls[begin:]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine({PER_CORE: 0.003, ALONE: 0.001})
    monkeypatch.setattr(onnx_session, "open_session", machine.open)
    monkeypatch.setattr(onnx_session, "cores", lambda: 4)
    monkeypatch.setattr(onnx_session.time, "perf_counter", lambda: machine.now)
    return machine


def test_the_faster_number_of_threads_is_taken_and_changes_with_the_machine(machine: Machine) -> None:
    session = Session(b"model", None)
    assert set(machine.work(session, FIRST_TRIAL)) == {PER_CORE}
    assert set(machine.work(session, TRIAL_EVERY - 0.02)) == {ALONE}
    machine.seconds[PER_CORE] = 0.0005
    calls = machine.work(session, 2 * TRIAL_EVERY)
    first = calls.index(PER_CORE)
    assert first < 0.03 / 0.001, "tried when the time had come"
    trials = [number for number in calls[first:] if number == ALONE]
    assert len(trials) == 2, "the other number is tried once more, the first call waking it"
    machine.seconds[PER_CORE] = 0.003
    machine.work(session, 0.003)
    assert machine.work(session, 0.003 * (LATEST - 1)) == [PER_CORE] * (LATEST - 1), "one slow call is no reason"
    assert set(machine.work(session, 0.01)) == {ALONE}
    assert machine.opened == [(PER_CORE, b"model"), (ALONE, b"model")]


def test_calls_that_are_far_apart_are_no_trials(machine: Machine) -> None:
    session = Session(b"model", None)
    for _ in range(30):
        session.run(["logits"], TOKEN)
        machine.now += 60
    assert machine.calls.count(PER_CORE) == 4, "until the first trial"
    assert machine.calls.count(ALONE) == 26 + 1, "the first call wakes the other threads"


def test_a_trial_that_is_interrupted_leaves_no_trace(machine: Machine) -> None:
    session = Session(b"model", None)
    machine.work(session, FIRST_TRIAL)
    machine.fails = True
    with pytest.raises(KeyboardInterrupt):
        session.run(["logits"], TOKEN)
    machine.fails = False
    assert set(machine.work(session, TRIAL_EVERY - 0.05)) == {PER_CORE}
    assert ALONE in machine.work(session, 0.1)


@pytest.mark.parametrize(
    ("threads", "limits", "opened"),
    [
        (3, {}, [3]),
        (None, {"SMALL_MODEL": 4}, [PER_CORE]),
        (None, {"SMALL_WORK": 4}, [PER_CORE]),
        (None, {"cores": lambda: 1}, [PER_CORE]),
    ],
    ids=["a number given", "a large model", "much work", "one core"],
)
def test_nothing_is_tried(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, threads: int | None, limits: dict[str, Any], opened: list[int]
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(onnx_session, name, value)
    machine.seconds[3] = 0.003
    machine.work(Session(b"model", threads), 3 * TRIAL_EVERY)
    assert [threads for threads, _ in machine.opened] == opened
    assert len(set(machine.calls)) == 1


def test_a_file_that_changes_later_does_not_matter(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"first")
    session = Session(path, None)
    path.write_bytes(b"second")
    machine.work(session, TRIAL_EVERY)
    assert machine.opened == [(PER_CORE, b"first"), (ALONE, b"first")]
    with pytest.raises(UserError, match="cannot be read: No such file or directory; see that"):
        Session(tmp_path / "nothing.onnx", None)


@pytest.mark.parametrize("exact", [True, False])
def test_the_number_of_threads_does_not_change_a_bit(exact: bool) -> None:
    """Large enough for ONNX Runtime to split the work."""
    model = random_model(n_layer=2, n_head=4, n_embd=192, block_size=128)
    contents = onnx_model(model, exact=exact).SerializeToString()
    alone, *others = (OnnxGPT(contents, threads) for threads in (1, 2, 3))
    for batch, time in ((1, 1), (1, 128), (5, 33)):
        tokens_BT = np.random.default_rng(time).integers(0, 11, (batch, time))
        for other in others:
            np.testing.assert_array_equal(other.forward(tokens_BT), alone.forward(tokens_BT))
