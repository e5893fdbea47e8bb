"""Calls Orbax: in bounded memory and without a wait that could hang. Only this file imports it.

All processes save together. Each reads by itself: one that finds damage would not come to where the others wait.
"""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from picogpt_jax.devices.sharding import local_bytes, shard_bytes
from picogpt_jax.training import integrity

_POLICIES = preservation_policy
# What may be on its way between arrays and the disk at a time, or SHARE of a large state: a part costs a tenth of a
# second. Beside the arrays it takes up to three times as much memory: encoded, decoded, copied.
READ_BYTES, WRITE_BYTES = 32 << 20, 128 << 20
SHARE = 1 / 32


def open_manager(folder: Path, keep: int | None, write_bytes: int) -> ocp.CheckpointManager:
    """The manager of a folder of checkpoints.

    Args:
        keep: as in `picogpt_jax.training.checkpoint.Checkpoints`.
        write_bytes: what may be on its way to the disk at a time.
    """
    policy = None
    if keep is not None:
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
        save_concurrent_gb=write_bytes / 1e9, multiprocessing_options=options.multiprocessing_options
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.StandardSave, handler)
    return ocp.CheckpointManager(folder, options=options, handler_registry=registry)


def bytes_to_write(state: Any) -> int:
    """What must be allowed on its way to the disk at a time; an array's shard is written as a whole."""
    arrays = jax.tree.leaves(state)
    return max(1 + max(map(shard_bytes, arrays)), int(SHARE * sum(map(local_bytes, arrays))))


def save(
    manager: ocp.CheckpointManager, step: int, state: Any, meta: dict[str, Any], metrics: dict[str, Any] | None
) -> None:
    """Starts writing a checkpoint."""
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    manager.save(step, args=items, metrics=metrics)


@contextlib.contextmanager
def _reader(folder: Path) -> Iterator[ocp.CheckpointManager]:
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
    with ocp.CheckpointManager(folder, options=options, handler_registry=registry) as manager:
        yield manager


def read_meta(folder: Path, step: int) -> Any:
    """What was stored beside the state."""
    with _reader(folder) as reader:
        return reader.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def read_state(folder: Path, step: int, abstract_state: Any) -> Any:
    """Reads a state in parts: Orbax would hold all of it encoded, decoded and placed at the same time.

    Shards of one array are read together, because they share the file's chunks where it was split otherwise.
    """
    leaves, tree = jax.tree.flatten(abstract_state)
    arrays = list(leaves)
    with _reader(folder) as reader:
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
