"""Which number of threads a call gets, calls side by side, and what does not depend on either."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_int8_model import random_model
from test_numpy_model import assert_same_logits

from picogpt_jax.devices import cpu
from picogpt_jax.errors import UserError
from picogpt_jax.formats.onnx_export import onnx_model
from picogpt_jax.runtimes import onnx_session
from picogpt_jax.runtimes.onnx_model import OnnxGPT
from picogpt_jax.runtimes.onnx_session import ALONE, PER_CORE, Feeds, Session

TOKEN = {"input_ids": np.zeros((1, 1), np.int64)}


class Machine:
    """Four cores; sessions return what they are given as outputs, with the number of threads and the first id.

    Attributes:
        opened: the numbers of threads of the sessions, in order, with the model.
        together: how many calls must be under way at once for any to end.
    """

    def __init__(self) -> None:
        self.opened: list[tuple[int, object]] = []
        self.together = threading.Barrier(1)

    def open(self, model: object, threads: int) -> Any:
        machine = self
        machine.opened.append((threads, model))

        class Opened:
            def run(self, outputs: list[str], feeds: Feeds) -> list[Any]:
                first = int(feeds["input_ids"].flat[0])
                machine.together.wait(timeout=20)
                if first < 0:
                    raise RuntimeError(f"call {first}")
                return [*outputs, threads, first]

        return Opened()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(onnx_session, "open_session", machine.open)
    monkeypatch.setattr(onnx_session, "cores", lambda: 4)
    return machine


@pytest.mark.parametrize(
    ("threads", "limits", "opened", "side_by_side"),
    [
        (None, {}, [ALONE], 4),
        (3, {}, [3], 1),
        (None, {"SMALL_MODEL": 4}, [PER_CORE], 1),
        (None, {"SMALL_CALL": 4}, [ALONE, PER_CORE], 4),
        (None, {"cores": lambda: 1}, [ALONE], 1),
    ],
    ids=["a small model", "a number given", "a large model", "a large call", "one core"],
)
def test_small_calls_of_small_models_have_one_thread(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    threads: int | None,
    limits: dict[str, Any],
    opened: list[int],
    side_by_side: int,
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(cpu if name == "SMALL_CALL" else onnx_session, name, value)
    session = Session(b"model", threads)
    for _ in range(2):
        assert session.run(["logits"], TOKEN) == ["logits", opened[-1], 0]
    assert machine.opened == [(number, b"model") for number in opened]
    assert session.side_by_side == side_by_side


def test_calls_side_by_side_come_back_in_order(machine: Machine) -> None:
    machine.together = threading.Barrier(4)
    session = Session(b"model", None)
    feeds = [lambda index=index: {"input_ids": np.full((1, 1), index)} for index in range(8)]
    assert session.run_all(["logits"], feeds) == [["logits", ALONE, index] for index in range(8)]
    machine.together = threading.Barrier(1)
    assert Session(b"model", 3).run_all(["logits"], feeds[:2]) == [["logits", 3, 0], ["logits", 3, 1]]


def test_a_call_that_fails_raises_and_the_threads_live_on(machine: Machine) -> None:
    session = Session(b"model", None)
    feeds = [lambda first=first: {"input_ids": np.full((1, 1), first)} for first in (0, -1, 0)]
    with pytest.raises(UserError, match=r"cannot be computed .call -1.; export it again"):
        session.run_all(["logits"], feeds)
    assert session.run_all(["logits"], [lambda: TOKEN] * 9) == [["logits", ALONE, 0]] * 9


def test_a_window_that_is_large_has_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = onnx_model(random_model()).SerializeToString()
    monkeypatch.setattr(onnx_session, "cores", lambda: 4)
    assert OnnxGPT(contents).windows_at_once == 4
    monkeypatch.setattr(cpu, "SMALL_CALL", 15 * len(contents))
    model = OnnxGPT(contents)
    assert model.windows_at_once == 1
    assert model.forward(np.zeros((3, 16), np.int64)).shape == (3, 16, 11)


def test_a_file_that_changes_later_does_not_matter(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu, "SMALL_CALL", 4)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"first")
    session = Session(path, None)
    path.write_bytes(b"second")
    session.run(["logits"], TOKEN)
    assert machine.opened == [(ALONE, b"first"), (PER_CORE, b"first")]
    with pytest.raises(UserError, match="cannot be read: No such file or directory; see that"):
        Session(tmp_path / "nothing.onnx", None)


def test_the_number_of_threads_does_not_change_the_logits() -> None:
    """Large enough for ONNX Runtime to split the work, and for several parts side by side."""
    model = random_model(n_layer=2, n_head=4, n_embd=192, block_size=128)
    contents = onnx_model(model).SerializeToString()
    alone, *others = (OnnxGPT(contents, threads) for threads in (1, 2, 3, None))
    for batch, time in ((1, 1), (1, 128), (5, 33), (7, 128)):
        tokens_BT = np.random.default_rng(time).integers(0, 11, (batch, time))
        for other in others:
            assert_same_logits(other.forward(tokens_BT), alone.forward(tokens_BT))
