"""ONNX Runtime with a thread for each core or with a single one, whichever is faster at the time (extra: onnx).

A node of a small model takes microseconds, and at the end of each one the threads wait for each other. How long depends
on the machine, and on a shared one it changes within seconds: a token of the default model took two threads 0.8 to 1.8
times as long as one. So both are tried, again and again. The results are the same bits, since no sum is split.
"""

import collections
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import onnxruntime
except ImportError as error:
    raise ImportError("this needs onnxruntime; install it with: pip install 'picogpt_jax[onnx]'") from error

from picogpt_jax.cpu import has_vnni
from picogpt_jax.errors import UserError

LOGS_ERRORS = 3  # not warnings: one would say that the optional input is no constant
PER_CORE, ALONE = 0, 1  # threads; ONNX Runtime's 0 is one per core
SMALL_MODEL = 16 << 20  # bytes of a model that may be opened twice
SMALL_WORK = 1 << 30  # tokens times bytes of the model: a few milliseconds; what takes longer gets all cores
FIRST_TRIAL, TRIAL_EVERY = 0.01, 0.25  # seconds until the other number of threads is tried
LATEST = 3  # calls whose best time counts


@dataclasses.dataclass
class Record:
    """What is known of calls of one shape.

    Attributes:
        trial_due: when the number of threads that is not in use is tried, on the clock of `time.perf_counter`.
        seconds: of the latest calls with each number of threads; one alone may have been interrupted.
        threads: those in use, the faster ones.
    """

    trial_due: float
    seconds: dict[int, collections.deque[float]]
    threads: int = PER_CORE


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
            self._is_fixed = threads is not None or self._bytes > SMALL_MODEL
            if not (self._is_fixed or isinstance(model, bytes)):
                self._model = Path(model).read_bytes()  # by the time it is opened again, the file may be another one
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}; see that the file is there and readable") from None
        self.onnx = open_session(self._model, threads or PER_CORE)
        self._sessions = {PER_CORE: self.onnx}
        self._records: dict[tuple[int, ...], Record] = {}

    def run(self, outputs: list[str], feeds: dict[str, npt.NDArray[Any]]) -> list[npt.NDArray[np.float32]]:
        """The outputs named; `feeds` holds `input_ids` and the other inputs."""
        ids = feeds["input_ids"]
        if self._is_fixed or ids.size * self._bytes > SMALL_WORK:
            return self.onnx.run(outputs, feeds)
        now = time.perf_counter()
        if ids.shape not in self._records:
            self._records[ids.shape] = Record(now + FIRST_TRIAL, {PER_CORE: collections.deque(maxlen=LATEST)})
        record = self._records[ids.shape]
        threads = record.threads
        if now >= record.trial_due:
            record.trial_due = now + TRIAL_EVERY
            threads = ALONE if threads == PER_CORE else PER_CORE
            if threads not in self._sessions:
                self._sessions[threads] = open_session(self._model, threads)
            self._sessions[threads].run(outputs, feeds)  # wakes its threads
            record.seconds[threads] = collections.deque(maxlen=LATEST)
            now = time.perf_counter()
        results = self._sessions[threads].run(outputs, feeds)
        record.seconds[threads].append(time.perf_counter() - now)
        record.threads = min(record.seconds, key=lambda number: min(record.seconds[number]))
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
