"""Checkpoints of a training run. Orbax is imported here alone.

`<workdir>/checkpoints/<step>/` holds the items `state` (the `TrainState`) and `meta` (config, vocabulary, losses).
Orbax writes to a temporary folder in the background and renames it: a checkpoint that can be seen is complete. `meta`
carries the manifest of the state's arrays (`picogpt_jax.integrity`), which is checked whenever they are read. In a run
of several processes all of them call everything here, and each writes and reads the shards of its own devices.
"""

import contextlib
import dataclasses
import errno
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from picogpt_jax import integrity
from picogpt_jax.distributed import is_first, is_lost, together
from picogpt_jax.errors import UserError
from picogpt_jax.sharding import local_bytes, shard_bytes

FOLDER = "checkpoints"
# In `meta` of a step 0 that was not trained here: {"step", "quantization_aware"} of the model it came from.
IMPORTED = "imported"
_POLICIES = preservation_policy
# What may be on its way between arrays and the disk at a time, or SHARE of a large state: a part costs a tenth of a
# second. Beside the arrays it takes up to three times as much memory: encoded, decoded, copied.
READ_BYTES, WRITE_BYTES = 32 << 20, 128 << 20
SHARE = 1 / 32

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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {workdir}: {error.strerror}; give another --workdir") from None
        if keep is None:
            integrity.check_metrics(self.folder, remove=False)
        else:
            with together():
                if is_first():
                    integrity.check_metrics(self.folder, remove=True)
        self._keep, self._write_bytes = keep, WRITE_BYTES
        self._manager = self._open()
        self._saving: int | None = None

    def _open(self) -> ocp.CheckpointManager:
        policy = None
        if (keep := self._keep) is not None:
            policy = _POLICIES.AnyPreservationPolicy(
                [
                    _POLICIES.LatestN(n=keep),
                    _POLICIES.BestN(
                        get_metric_fn=integrity.val_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
                    ),
                ]
            )
        options = ocp.CheckpointManagerOptions(
            create=False,  # it exists: Orbax would wait for the other processes on the devices
            read_only=keep is None,
            best_fn=integrity.val_loss,
            best_mode="min",
            preservation_policy=policy,
            cleanup_tmp_directories=keep is not None,
            multiprocessing_options=_all_processes() if keep is not None else _this_process(),
        )
        # Orbax's own handler would hold the whole state encoded until the last array is written.
        handler = ocp.StandardCheckpointHandler(
            save_concurrent_gb=self._write_bytes / 1e9, multiprocessing_options=options.multiprocessing_options
        )
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add("state", ocp.args.StandardSave, handler)
        return ocp.CheckpointManager(self.folder, options=options, handler_registry=registry)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        try:
            if error is None or jax.process_count() == 1:  # else another process may be gone, and closing waits for it
                self._manager.close()
        except Exception:
            if error is None:
                raise
            logging.exception("a checkpoint was not finished, after another error")

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
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(sealed))
        metrics = None if val_loss is None else integrity.metrics(val_loss)
        last, self._saving = self._last(), step
        try:
            if not self.folder.is_dir():
                raise FileNotFoundError(f"{self.folder} has vanished")
            self._manager.save(step, args=items, metrics=metrics)
        except Exception as error:
            raise self._cannot_save(error, last) from error

    def _admit(self, state: Any) -> None:
        """Fits the limit of what is written at a time to a large state; an array's shard is written as a whole."""
        arrays = jax.tree.leaves(state)
        wanted = max(1 + max(map(shard_bytes, arrays)), int(SHARE * sum(map(local_bytes, arrays))))
        if wanted > self._write_bytes:
            self.wait()
            self._manager.close()
            self._write_bytes = wanted
            self._manager = self._open()

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
            raise self._cannot_save(error, self._last()) from error

    def _last(self) -> int | None:
        """The newest step on the disk."""
        steps = [int(path.name) for path in self.folder.glob("*") if path.name.isdecimal() and path.is_dir()]
        return max(steps, default=None)

    def _cannot_save(self, error: Exception, last: int | None) -> Exception:
        """What a failed save means to the user; TensorStore, Orbax and the system raise many types."""
        if is_lost(error):
            return error
        kept = f"the last checkpoint is step {last}" if last is not None else "there is no earlier checkpoint"
        reason = _shortened(error)
        return UserError(
            f"cannot save step {self._saving} in {self.folder}: {reason}; {kept}. Make room or give the folder back, "
            "and start again with the same command"
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
        with together():
            try:
                with self._reader() as reader:
                    state = _read(reader, step, abstract_state)
            except Exception as error:  # Orbax, TensorStore and JSON raise many types for a damaged checkpoint
                _check_passing(error, where)
                raise UserError(f"checkpoint {where} is damaged or does not fit: {_shortened(error)}") from error
        if arrays is not None:
            integrity.check_unchanged(arrays, state, where)
        return Restored(step=step, state=state, meta=meta)

    @contextlib.contextmanager
    def _reader(self) -> Iterator[ocp.CheckpointManager]:
        """A manager that waits for no other process: one that finds damage could not come to where they wait."""
        options = ocp.CheckpointManagerOptions(
            create=False,
            read_only=True,
            best_fn=integrity.val_loss,
            best_mode="min",
            multiprocessing_options=_this_process(),
        )
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_this_process())
        registry.add("state", ocp.args.PyTreeRestore, handler)
        with ocp.CheckpointManager(self.folder, options=options, handler_registry=registry) as manager:
            yield manager

    def _sealed(self, step: int) -> tuple[dict[str, Any], integrity.Manifest | None]:
        try:
            with self._reader() as reader:
                sealed = reader.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            return integrity.unseal(sealed)
        except Exception as error:  # as in `restore`
            _check_passing(error, self.folder / str(step))
            raise UserError(f"checkpoint {self.folder / str(step)} is damaged: {_shortened(error)}") from error

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


def _read(reader: ocp.CheckpointManager, step: int, abstract_state: Any) -> Any:
    """Reads a state in parts: Orbax would hold all of it encoded, decoded and placed at the same time.

    Shards of one array are read together, because they share the file's chunks where it was split otherwise.
    """
    leaves, tree = jax.tree.flatten(abstract_state)
    arrays = list(leaves)
    for part in _parts(leaves):
        others_left_out = [leaf if index in part else ocp.PLACEHOLDER for index, leaf in enumerate(leaves)]
        wanted = jax.tree.unflatten(tree, others_left_out)
        item = ocp.args.PyTreeRestore(wanted, ocp.checkpoint_utils.construct_restore_args(wanted))
        found = jax.tree.leaves(reader.restore(step, args=ocp.args.Composite(state=item))["state"])
        for index in part:
            arrays[index] = found[index]
        gc.collect()  # the buffer that was read last hangs on a cycle
    return jax.tree.unflatten(tree, arrays)


def _parts(leaves: Sequence[jax.ShapeDtypeStruct]) -> list[list[int]]:
    """Groups arrays, by their indices, that are small enough to be read together."""
    sizes = list(map(local_bytes, leaves))
    limit = max(READ_BYTES, int(SHARE * sum(sizes)))
    parts: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if size > room:
            parts.append([])
            room = limit
        parts[-1].append(index)
        room -= size
    return parts


def _check_passing(error: Exception, where: Path) -> None:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _PASSING):
        raise UnreadableError(f"checkpoint {where} cannot be read now: {error!r}; start again later") from error


def silence_background_errors() -> None:
    """For a program: leaves out what Orbax and TensorStore print about a failed save, which `Checkpoints` raises."""
    logging.get_absl_handler().addFilter(lambda record: "/orbax/" not in record.pathname)
    hook = sys.excepthook

    def without_closed_loops(kind: Any, error: BaseException, traceback: TracebackType | None) -> None:
        if not (kind is RuntimeError and str(error) == "Event loop is closed"):  # of a write that comes back too late
            hook(kind, error, traceback)

    sys.excepthook = without_closed_loops


def abstract(tree: Any, shardings: Any) -> Any:
    """The shapes, dtypes and shardings of a tree, for `restore`."""
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), tree, shardings
    )


def _shortened(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 1000 else f"{text[:500]} ... {text[-500:]}"


def _all_processes() -> ocp.options.MultiprocessingOptions:
    """Named one by one, so that Orbax waits for them at JAX's coordination service, with a time limit.

    Else it computes a sum on all devices for it, also in the background: a step could meet that in another order.
    """
    return ocp.options.MultiprocessingOptions(primary_host=0, active_processes=set(range(jax.process_count())))


def _this_process() -> ocp.options.MultiprocessingOptions:
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )
