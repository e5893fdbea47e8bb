"""Checkpoints of a training run. Orbax is imported here alone.

`<workdir>/checkpoints/<step>/` holds the items `state` (the `TrainState`) and `meta` (config, vocabulary, losses).
Orbax writes to a temporary folder in the background and renames it: a checkpoint that can be seen is complete.
"""

import dataclasses
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from picogpt_jax.errors import UserError
from picogpt_jax.files import read_json

FOLDER = "checkpoints"
# In `meta` of a step 0 that was not trained here: {"step", "quantization_aware"} of the model it came from.
IMPORTED = "imported"
_POLICIES = preservation_policy


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
        self._check_metrics(remove=keep is not None)
        policy = None
        if keep is not None:
            policy = _POLICIES.AnyPreservationPolicy(
                [
                    _POLICIES.LatestN(n=keep),
                    _POLICIES.BestN(get_metric_fn=_val_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False),
                ]
            )
        options = ocp.CheckpointManagerOptions(
            create=keep is not None,
            read_only=keep is None,
            best_fn=_val_loss,
            best_mode="min",
            preservation_policy=policy,
            cleanup_tmp_directories=keep is not None,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def _check_metrics(self, remove: bool) -> None:
        """Looks at the small files that Orbax reads when it starts, where a damaged one would end the program."""
        damaged = {}
        for path in self.folder.glob("*/metrics/metrics"):
            try:
                _val_loss(read_json(path))
            except (UserError, KeyError, TypeError) as error:
                damaged[path.parents[1]] = error
        if not damaged:
            return
        reasons = "; ".join(f"checkpoint {folder} is damaged: {error}" for folder, error in damaged.items())
        others = [folder for folder in self.folder.iterdir() if folder.name.isdecimal() and folder not in damaged]
        if not remove or not others:
            raise UserError(f"{reasons}; remove the folder to go on without it")
        logging.error("%s; trying the one before it", reasons)
        for folder in damaged:
            shutil.rmtree(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of lowest validation loss; the newest where none was evaluated."""
        best = self._manager.best_step()
        return best if best is not None or not self.steps else self.steps[-1]

    def save(self, step: int, state: Any, meta: dict[str, Any], val_loss: float | None) -> None:
        """Starts writing a checkpoint; an earlier write that failed raises here."""
        if step in self.steps:
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        metrics = None if val_loss is None else {"val_loss": val_loss}
        self._manager.save(step, args=items, metrics=metrics)

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def restore(self, abstract_state: Any, step: int) -> Restored:
        """Reads one checkpoint; every array is placed as its abstract counterpart says.

        Args:
            abstract_state: tree of `jax.ShapeDtypeStruct` with shardings.

        Raises:
            UserError: it is damaged, or holds another tree than the abstract one.
        """
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # Orbax, TensorStore and JSON raise many types for a damaged checkpoint
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"checkpoint {self.folder / str(step)} is damaged or does not fit: {reason}") from error
        return Restored(step=step, state=restored["state"], meta=restored["meta"])

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint that can be read; a damaged one is reported and removed. None where there is none.

        Raises:
            UserError: there are checkpoints and none can be read.
        """
        steps = self.steps
        errors = []
        for step in reversed(steps):
            try:
                restored = self.restore(abstract_state, step)
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
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        except Exception as error:  # as in `restore`
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"checkpoint {self.folder / str(step)} is damaged: {reason}") from error
        return restored["meta"]


def abstract(tree: Any, shardings: Any) -> Any:
    """The shapes, dtypes and shardings of a tree, for `restore`."""
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), tree, shardings
    )


def _val_loss(metrics: dict[str, float]) -> float:
    return metrics["val_loss"]
