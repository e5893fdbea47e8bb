"""Checkpoints of a training run: what is saved, which one is read, and what a failure means to the user.

`<workdir>/checkpoints/<step>/` holds the items `state` (the `TrainState`) and `meta` (config, vocabulary, losses, and
the manifest of the state's arrays, which is checked whenever they are read). Orbax (`training.orbax_io`) writes to a
temporary folder and renames it: what can be seen is complete. Of several processes, all call everything here.
"""

import contextlib
import dataclasses
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import jax
from absl import logging

from picogpt_jax.devices.distributed import is_first, is_lost, together
from picogpt_jax.errors import UserError, reason
from picogpt_jax.files import disk_failure
from picogpt_jax.training import integrity, orbax_io

FOLDER = "checkpoints"
# In `meta` of a step 0 that was not trained here: {"step", "quantization_aware"} of the model it came from.
IMPORTED = "imported"
_TRIES, _SECONDS = 20, 1.0  # to read what a training replaces; how long a removal may take
# What fails in the machine, and says nothing about the files.
_PASSING = (errno.ESTALE, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ETIMEDOUT)


class UnreadableError(UserError):
    """A checkpoint could not be read now: no reason to go back to an earlier one, and none to remove it."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint: the step, the state (a tree like the abstract one asked for) and what was stored beside it."""

    step: int
    state: Any
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one workdir; a context manager that waits for pending writes.

    Args:
        workdir: the run's folder.
        keep: how many of the newest are kept, beside the one of lowest validation loss; None: read only.
    """

    def __init__(self, workdir: str | os.PathLike[str], keep: int | None = None) -> None:
        self.folder = (Path(workdir) / FOLDER).absolute()
        if keep is None and not self.folder.is_dir():
            raise UserError(f"{workdir} holds no checkpoints; expected a workdir that scripts/train.py has written")
        if keep is None:
            integrity.check_metrics(self.folder, remove=False)
        else:
            with together():
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise UserError(f"cannot write to {workdir}: {error.strerror}; give another --workdir") from None
                if is_first():
                    integrity.check_metrics(self.folder, remove=True)
        self._keep, self._write_bytes = keep, orbax_io.WRITE_BYTES
        self._manager = orbax_io.open_manager(self.folder, keep, self._write_bytes)
        self._saving: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.wait()
            self._manager.close()
        elif jax.process_count() == 1:  # else another process may be gone, and closing waits for it
            with contextlib.suppress(Exception):  # what was not finished is less than the other error
                self._manager.close()

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of lowest validation loss; the newest where none was evaluated."""
        best = self._manager.best_step()
        return best if best is not None or not self.steps else self.steps[-1]

    def save(self, step: int, state: Any, meta: dict[str, Any], val_loss: float | None) -> None:
        """Starts writing a checkpoint.

        Raises:
            UserError: it cannot be written, or an earlier one could not.
        """
        self.check()
        if step in self.steps:
            return
        self._admit(state)
        sealed = integrity.seal(meta, integrity.manifest(state))
        metrics = None if val_loss is None else integrity.metrics(val_loss)
        self._saving = step
        try:
            if not self.folder.is_dir():
                raise FileNotFoundError(f"{self.folder} has vanished")
            orbax_io.save(self._manager, step, state, sealed, metrics)
        except Exception as error:
            raise self.failure(f"save step {step} in {self.folder}", error) from error

    def _admit(self, state: Any) -> None:
        """Fits the limit of what is written at a time to a large state; an array's shard is written as a whole."""
        wanted = orbax_io.bytes_in_flight(state, orbax_io.WRITE_BYTES)
        if wanted > self._write_bytes:
            self.wait()
            self._manager.close()
            self._write_bytes = wanted
            self._manager = orbax_io.open_manager(self.folder, self._keep, wanted)

    def check(self) -> None:
        """Asks, without waiting, whether the last save has failed.

        Raises:
            UserError: it has.
        """
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save has been committed.

        Raises:
            UserError: it could not be written.
        """
        saving, self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if saving is not None and not (self.folder / str(saving)).is_dir():
                raise FileNotFoundError(f"{self.folder / str(saving)} has vanished")
        except Exception as error:
            self._saving = saving
            raise self.failure(f"save step {saving} in {self.folder}", error) from error

    def failure(self, what: str, error: Exception) -> Exception:
        """What it means to the user that `what` failed; TensorStore, Orbax and the system raise many types."""
        if is_lost(error):
            return error
        last = newest_step(self.folder.parent)
        kept = f"the last checkpoint is step {last}" if last is not None else "there is no earlier checkpoint"
        why = disk_failure(error) or reason(error)
        return UserError(
            f"cannot {what}: {why}; {kept}. Make room or give the folder back, and start again with the same command"
        )

    def restore(self, abstract_state: Any, step: int) -> Restored:
        """Reads one checkpoint; every array is placed as its abstract counterpart says.

        Args:
            abstract_state: tree of `jax.ShapeDtypeStruct` with shardings.

        Raises:
            UserError: it is damaged, or holds another tree than the abstract one.
        """
        return self._restore(lambda _: abstract_state, step)

    def _restore(self, abstract_state_of: Callable[[dict[str, Any]], Any], step: int) -> Restored:
        self.wait()  # for what is still being written
        where = self.folder / str(step)
        with together():
            meta, arrays = self._sealed(step)
        try:
            abstract_state = abstract_state_of(meta)
        except UserError as error:
            raise integrity.MisfitError(f"checkpoint {where} does not fit: {error}") from error
        if arrays is not None:
            integrity.check_fits(arrays, abstract_state, where)
        with together(), _reading(where):
            state = orbax_io.read_state(self.folder, step, abstract_state)
        if arrays is not None:
            integrity.check_unchanged(arrays, state, where)
        return Restored(step=step, state=state, meta=meta)

    def _sealed(self, step: int) -> tuple[dict[str, Any], integrity.Manifest | None]:
        with _reading(self.folder / str(step)):
            return integrity.unseal(orbax_io.read_meta(self.folder, step))

    def restore_latest(self, abstract_state_of: Callable[[dict[str, Any]], Any]) -> Restored | None:
        """The newest checkpoint that can be read; a damaged one is reported and removed. None where there is none.

        Args:
            abstract_state_of: what `restore` is to be given for a checkpoint, from what was stored beside its state:
                not all need be of the same layout.

        Raises:
            UserError: there are checkpoints and none can be read, the newest is intact and holds another tree, or it
                could not be read for a reason that may pass.
        """
        steps = self.steps
        errors = []
        for step in reversed(steps):
            try:
                restored = self._restore(abstract_state_of, step)
            except (integrity.MisfitError, UnreadableError):
                raise
            except UserError as error:
                errors.append(str(error))
                logging.error("%s; trying the one before it", error)
                continue
            for damaged in steps[steps.index(step) + 1 :]:
                self._manager.delete(damaged)
            return restored
        if errors:
            raise UserError(f"no checkpoint in {self.folder} can be read; the newest: {errors[0]}")
        return None

    def meta(self, step: int) -> dict[str, Any]:
        """What was stored beside the state: config, vocabulary, losses."""
        self.wait()
        return self._sealed(step)[0]


def restore_best(
    workdir: str | os.PathLike[str], abstract_state_of: Callable[[dict[str, Any]], Any]
) -> Restored | None:
    """The best checkpoint; None where there is none. A training may write to the workdir meanwhile.

    Args:
        abstract_state_of: as in `Checkpoints.restore_latest`.

    Raises:
        UserError: it is damaged, or does not fit.
    """
    for _ in range(_TRIES):
        before = _steps(workdir)
        try:
            with Checkpoints(workdir) as checkpoints:
                step = checkpoints.best_step()
                return None if step is None else checkpoints._restore(abstract_state_of, step)
        except Exception:  # whatever Orbax raises when a training removes what is being read
            if not _changes(workdir, before):
                raise
    raise UnreadableError(f"the checkpoints of {workdir} are replaced faster than they can be read; try again later")


def _changes(workdir: str | os.PathLike[str], before: set[int]) -> bool:
    """Whether there are other steps now; a removal takes a while."""
    end = time.monotonic() + _SECONDS
    while _steps(workdir) == before:
        if time.monotonic() > end:
            return False
        time.sleep(_SECONDS / 20)
    return True


def newest_step(workdir: str | os.PathLike[str]) -> int | None:
    """The newest step on the disk."""
    return max(_steps(workdir), default=None)


def _steps(workdir: str | os.PathLike[str]) -> set[int]:
    folder = Path(workdir) / FOLDER
    return {int(path.name) for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()}


@contextlib.contextmanager
def _reading(where: Path) -> Iterator[None]:
    """Says what fails as an error of the checkpoint `where`; Orbax, TensorStore and JSON raise many types."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _PASSING):
            raise UnreadableError(f"checkpoint {where} cannot be read now: {error!r}; start again later") from error
        raise UserError(f"checkpoint {where} is damaged: {reason(error)}") from error


def abstract(tree: Any, shardings: Any) -> Any:
    """The shapes, dtypes and shardings of a tree, for `restore`."""
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), tree, shardings
    )
