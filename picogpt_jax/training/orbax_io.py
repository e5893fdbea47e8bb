"""Calls Orbax: in bounded memory and without a wait that could hang. Only this file imports it.

All processes save together. Each reads by itself: one that finds damage would not come to where the others wait.
"""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from picogpt_jax.training import integrity

# What may be on its way between arrays and the disk at a time. Beside the arrays it takes up to three times as much
# memory: encoded, decoded, copied.
READ_BYTES, WRITE_BYTES = 32 << 20, 128 << 20


def open_manager(folder: Path, keep: int | None, write_bytes: int) -> ocp.CheckpointManager:
    """The manager of a folder of checkpoints.

    Args:
        keep: as in `picogpt_jax.training.checkpoint.Checkpoints`.
        write_bytes: what may be on its way to the disk at a time.
    """
    best = policy.BestN(get_metric_fn=integrity.val_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        create=False,  # it exists: Orbax would wait for the other processes on the devices
        read_only=keep is None,
        best_fn=integrity.val_loss,
        best_mode="min",
        preservation_policy=policy.AnyPreservationPolicy([policy.LatestN(n=keep), best]),
        cleanup_tmp_directories=keep is not None,
        multiprocessing_options=_all_processes() if keep is not None else _this_process(),
    )
    # Orbax's own handler would hold the whole state encoded until the last array is written.
    handler = ocp.StandardCheckpointHandler(
        save_concurrent_gb=write_bytes / 1e9, multiprocessing_options=options.multiprocessing_options
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.StandardSave, handler)
    return ocp.CheckpointManager(folder, options=options, handler_registry=registry)


def bytes_in_flight(state: Any, least: int) -> int:
    """What must be allowed on its way at a time: `least`, or one more than the largest array; it goes as a whole."""
    return max(least, *(1 + array.size * array.dtype.itemsize for array in jax.tree.leaves(state)))


def save(
    manager: ocp.CheckpointManager, step: int, state: Any, meta: dict[str, Any], metrics: dict[str, Any] | None
) -> None:
    """Starts writing a checkpoint."""
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    manager.save(step, args=items, metrics=metrics)


def read_meta(folder: Path, step: int) -> Any:
    """What was stored beside the state."""
    return json.loads((folder / str(step) / "meta" / "metadata").read_text(encoding="utf-8"))


def read_state(folder: Path, step: int, abstract_state: Any) -> Any:
    """Reads a state; waits for no other process: one that finds damage could not come to where they wait."""
    handler = ocp.PyTreeCheckpointHandler(
        restore_concurrent_gb=bytes_in_flight(abstract_state, READ_BYTES) / 1e9, multiprocessing_options=_this_process()
    )
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract_state)
    with ocp.Checkpointer(handler, multiprocessing_options=_this_process()) as reader:
        where = folder / str(step) / "state"
        return reader.restore(where, args=ocp.args.PyTreeRestore(abstract_state, arguments))


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
