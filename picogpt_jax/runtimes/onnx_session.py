"""ONNX Runtime with the number of threads that is fast for a small model (extra: onnx).

A node of a small model takes microseconds. Two threads that share it wait for each other at its end, and read from the
other one's cache what the node before left there. A token of the default model took them 0.8 to 1.8 times as long as
one thread. So each call of a small model has one thread, and several windows are computed side by side, each by one
thread from its first node to its last: 32 windows took 0.57 to 0.75 of the time that two threads took together. Large
calls, and those of large models, have a thread per core. The results are the same bits with any number of threads
(tested): ONNX Runtime splits rows and heads, never a sum.

Keys that a query may not see have weights of about 1e-38. These are denormal numbers, on which Intel's processors spend
most of attention's time. So they are set to zero: in ONNX Runtime's threads by the session option
`session.set_denormal_as_zero`, in the calling one by `devices.cpu.denormals_flushed`, for calls with several queries.
"""

import collections
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import onnxruntime
except ImportError as error:
    raise ImportError("this needs onnxruntime; install it with: pip install 'picogpt_jax[onnx]'") from error

from picogpt_jax.devices.cpu import can_flush_denormals, cores, denormals_flushed, has_vnni, is_small_call
from picogpt_jax.errors import UserError, reason

LOGS_ERRORS = 3  # not warnings: of a file of an earlier release, one is about an optional input
PER_CORE, ALONE = 0, 1  # threads; ONNX Runtime's 0 is one per core
SMALL_MODEL = 16 << 20  # bytes of a model that may be opened twice

Feeds = dict[str, npt.NDArray[Any]]
Results = list[npt.NDArray[np.float32]]


class Session:
    """An opened model.

    Attributes:
        onnx: ONNX Runtime's session.
        side_by_side: calls that `run_all` computes at a time.

    Args:
        model: the file, or its contents.
        threads: of one operation; None for what is fast.

    Raises:
        UserError: ONNX Runtime cannot read it.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes, threads: int | None) -> None:
        try:
            self._bytes = len(model) if isinstance(model, bytes) else os.path.getsize(model)
            is_small = threads is None and self._bytes <= SMALL_MODEL
            if is_small and not isinstance(model, bytes):
                model = Path(model).read_bytes()  # by the time it is opened again, the file may be another one
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}; see that the file is there and readable") from None
        self.onnx = open_session(model, ALONE if is_small else threads or PER_CORE)
        self.side_by_side = cores() if is_small else 1
        self._model, self._lock = model, threading.Lock()
        self._shared: onnxruntime.InferenceSession | None = None  # by all cores
        self._others: ThreadPoolExecutor | None = None  # threads beside the one that calls

    def is_large(self, tokens: int) -> bool:
        """Whether a call with so many tokens is worth the work of all cores."""
        return not is_small_call(tokens, self._bytes)

    def run(self, outputs: list[str], feeds: Feeds) -> Results:
        """The outputs named; `feeds` holds `input_ids` and the other inputs."""
        session = self.onnx
        if self.side_by_side > 1 and self.is_large(feeds["input_ids"].size):
            with self._lock:
                if self._shared is None:
                    self._shared = open_session(self._model, PER_CORE)
            session = self._shared
        if feeds["input_ids"].shape[1] == 1:  # it sees every key
            return _run(session, outputs, feeds)
        with denormals_flushed():
            return _run(session, outputs, feeds)

    def run_all(self, outputs: list[str], feeds: Sequence[Callable[[], Feeds]]) -> list[Results]:
        """`run` for each of `feeds`, made just before; `side_by_side` at a time with a thread each, however large."""
        if self.side_by_side == 1:
            return [self.run(outputs, feed()) for feed in feeds]
        with self._lock:
            if self._others is None:
                self._others = ThreadPoolExecutor(self.side_by_side - 1, "onnxruntime")
        left = collections.deque(enumerate(feeds))
        results: dict[int, Results] = {}

        def work() -> None:
            with denormals_flushed():
                while True:
                    try:
                        index, feed = left.popleft()
                    except IndexError:
                        return
                    try:
                        results[index] = _run(self.onnx, outputs, feed())
                    except BaseException:
                        left.clear()
                        raise

        others: list[Future[None]] = []
        try:
            for _ in range(min(self.side_by_side, len(feeds)) - 1):
                others.append(self._others.submit(work))
            work()
        finally:
            left.clear()
            wait(others)
        for other in others:
            other.result()
        return [results[index] for index in range(len(feeds))]


def _run(session: onnxruntime.InferenceSession, outputs: list[str], feeds: Feeds) -> Results:
    try:
        return session.run(outputs, feeds)
    except Exception as error:  # onnxruntime has no class of its own above its exceptions
        raise UserError(f"the ONNX model cannot be computed ({reason(error)}); export it again") from error


def open_session(model: str | os.PathLike[str] | bytes, threads: int) -> onnxruntime.InferenceSession:
    """ONNX Runtime's session of a model on the CPU; raises a UserError where it cannot read that."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = LOGS_ERRORS
    options.intra_op_num_threads = threads
    if can_flush_denormals():
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if not has_vnni():
        # On x86 the kernel for unsigned times signed bytes can then saturate: take the exact one, which is slower.
        options.add_session_config_entry("session.x64quantprecision", "1")
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        with denormals_flushed():  # the first session of a process would set this thread for good
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no class of its own above its exceptions
        raise UserError(
            f"is no ONNX model that onnxruntime {onnxruntime.__version__} can read ({reason(error)}); export it again, "
            "or update onnxruntime: a --noexact export needs 1.24"
        ) from None
