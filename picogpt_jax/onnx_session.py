"""ONNX Runtime with a thread for each core or with a single one, whichever is faster at the time (extra: onnx).

A node of a small model takes microseconds, and at the end of each one the threads wait for each other. How long depends
on the machine, and on a shared one it changes within seconds: a token of the default model took two threads 0.8 to 1.8
times as long as one. So both are tried, again and again. The results were the same bits with every number of threads
(a test): ONNX Runtime splits rows and heads, no sum.
"""

import collections
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import onnxruntime
except ImportError as error:
    raise ImportError("this needs onnxruntime; install it with: pip install 'picogpt_jax[onnx]'") from error

from picogpt_jax.cpu import cores, has_vnni
from picogpt_jax.errors import UserError

LOGS_ERRORS = 3  # not warnings: one would say that the optional input is no constant
PER_CORE, ALONE = 0, 1  # threads; ONNX Runtime's 0 is one per core
SMALL_MODEL = 16 << 20  # bytes of a model that may be opened twice
SMALL_WORK = 1 << 30  # tokens times bytes of the model: a few milliseconds; what takes longer gets all cores
FIRST_TRIAL, TRIAL_EVERY = 0.01, 0.25  # seconds of work until the other number of threads is tried
LATEST = 3  # calls whose best time counts; one alone may have been interrupted


class Record:
    """The calls of one shape, and the number of threads for the next one.

    Calls of a shape are not all the same work: the past grows, and fewer logits may be wanted. But they come mixed.

    Attributes:
        threads: the faster number.
    """

    def __init__(self) -> None:
        self.threads = PER_CORE
        self._seconds: dict[int, collections.deque[float]] = {}
        self._until_trial = FIRST_TRIAL

    def next(self) -> int:
        """The number of threads for this call: the faster one, or in a trial the other one."""
        if self._until_trial > 0:
            return self.threads
        self._until_trial = TRIAL_EVERY
        return ALONE if self.threads == PER_CORE else PER_CORE

    def add(self, threads: int, seconds: float) -> None:
        """A call is done."""
        self._until_trial -= seconds
        latest = self._seconds.setdefault(threads, collections.deque(maxlen=LATEST))
        if threads != self.threads:
            latest.clear()
        latest.append(seconds)
        self.threads = min(self._seconds, key=lambda number: min(self._seconds[number]))


class Session:
    """An opened model.

    Attributes:
        onnx: ONNX Runtime's session.

    Args:
        model: the file, or its contents.
        threads: of one operation; None for one per core, or one where that is faster.

    Raises:
        UserError: ONNX Runtime cannot read it.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes, threads: int | None) -> None:
        self._model = model
        try:
            self._bytes = len(model) if isinstance(model, bytes) else os.path.getsize(model)
            self._is_fixed = threads is not None or self._bytes > SMALL_MODEL or cores() == 1
            if not (self._is_fixed or isinstance(model, bytes)):
                self._model = Path(model).read_bytes()  # by the time it is opened again, the file may be another one
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}; see that the file is there and readable") from None
        self.onnx = open_session(self._model, threads or PER_CORE)
        self._sessions = {PER_CORE: self.onnx}
        self._records: dict[tuple[int, ...], Record] = {}
        self._lock = threading.Lock()

    def run(self, outputs: list[str], feeds: dict[str, npt.NDArray[Any]]) -> list[npt.NDArray[np.float32]]:
        """The outputs named; `feeds` holds `input_ids` and the other inputs."""
        ids = feeds["input_ids"]
        if self._is_fixed or ids.size * self._bytes > SMALL_WORK:
            return self.onnx.run(outputs, feeds)
        with self._lock:
            record = self._records.setdefault(ids.shape, Record())
            threads = record.next()
            is_trial = threads != record.threads
            if threads not in self._sessions:
                self._sessions[threads] = open_session(self._model, threads)
            session = self._sessions[threads]
        if is_trial:
            session.run(outputs, feeds)  # wakes its threads
        began = time.perf_counter()
        results = session.run(outputs, feeds)
        with self._lock:
            record.add(threads, time.perf_counter() - began)
        return results


def open_session(model: str | os.PathLike[str] | bytes, threads: int) -> onnxruntime.InferenceSession:
    """ONNX Runtime's session of a model on the CPU; raises a UserError where it cannot read that."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = LOGS_ERRORS
    options.intra_op_num_threads = threads
    if not has_vnni():
        # On x86 the kernel for unsigned times signed bytes can then saturate: take the exact one, which is slower.
        options.add_session_config_entry("session.x64quantprecision", "1")
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no class of its own above its exceptions
        reason = str(error).splitlines()[0]
        raise UserError(
            f"is no ONNX model that onnxruntime {onnxruntime.__version__} can read ({reason}); export it again, or "
            "update onnxruntime: a --noexact export needs 1.24"
        ) from None
