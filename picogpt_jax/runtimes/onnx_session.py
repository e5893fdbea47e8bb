"""ONNX Runtime with the number of threads that is fast for a small model (extra: onnx).

A node of a small model takes microseconds, and two threads that share it wait for each other. So each call of a small
model has one thread, and several windows are computed side by side, a thread each. Large calls, and those of large
models, have a thread per core.
"""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy.typing as npt

try:
    import onnxruntime
except ImportError as error:
    raise ImportError("this needs onnxruntime; install it with: pip install 'picogpt_jax[onnx]'") from error

from picogpt_jax.devices.cpu import cores, has_vnni, is_small_call
from picogpt_jax.errors import UserError, reason

LOGS_ERRORS = 3  # not warnings: of a file of an earlier release, one is about an optional input
PER_CORE, ALONE = 0, 1  # threads; ONNX Runtime's 0 is one per core
SMALL_MODEL = 16 << 20  # bytes of a model that may be opened twice

Feeds = dict[str, npt.NDArray[Any]]
Results = list[npt.NDArray[Any]]


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
        self._model = model
        self._threads = ThreadPoolExecutor(self.side_by_side, "onnxruntime")

    def is_large(self, tokens: int) -> bool:
        """Whether a call with so many tokens is worth the work of all cores."""
        return not is_small_call(tokens, self._bytes)

    def run(self, outputs: list[str], feeds: Feeds) -> Results:
        """The outputs named; `feeds` holds `input_ids` and the other inputs."""
        is_shared = self.side_by_side > 1 and self.is_large(feeds["input_ids"].size)
        return _run(self._by_all_cores if is_shared else self.onnx, outputs, feeds)

    @functools.cached_property
    def _by_all_cores(self) -> onnxruntime.InferenceSession:
        return open_session(self._model, PER_CORE)

    def run_all(self, outputs: list[str], feeds: Sequence[Callable[[], Feeds]]) -> list[Results]:
        """`run` for each of `feeds`, made just before; `side_by_side` at a time with a thread each, however large."""
        if self.side_by_side == 1:
            return [self.run(outputs, feed()) for feed in feeds]
        return list(self._threads.map(lambda feed: _run(self.onnx, outputs, feed()), feeds))


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
    if not has_vnni():
        # On x86 the kernel for unsigned times signed bytes can then saturate: take the exact one, which is slower.
        options.add_session_config_entry("session.x64quantprecision", "1")
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no class of its own above its exceptions
        raise UserError(
            f"is no ONNX model that onnxruntime {onnxruntime.__version__} can read ({reason(error)}); export it again, "
            "or update onnxruntime: an export needs 1.24"
        ) from None
