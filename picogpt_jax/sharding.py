"""Where each array lives: a mesh with the axes data, fsdp and tensor, and one table from logical axes to mesh axes.

The model names logical axes only. The batch is split over `data` and `fsdp`; `fsdp` also splits the parameters along
the width, `tensor` along heads, hidden units and vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_sharding
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from picogpt_jax.config import MeshConfig
from picogpt_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
RULES = (
    ("layers", None),
    ("vocab", "tensor"),
    ("position", None),
    ("embed", "fsdp"),
    ("qkv", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("norm", None),
)


def make_mesh(config: MeshConfig, batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh of a run.

    An axis of -1 takes the devices that are left; if it splits the batch, as many of them as divide `batch_size`.

    Raises:
        UserError: the axes need another number of devices than there are, or do not divide the batch.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    given = math.prod(size for size in sizes if size != -1)
    if given > len(devices) or (-1 not in sizes and len(devices) % given):
        raise UserError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {given} devices, found {len(devices)}; change mesh.* "
            "(on CPU, JAX_NUM_CPU_DEVICES sets their number)"
        )
    if -1 in sizes:
        axis = sizes.index(-1)
        left = len(devices) // given
        if axis < len(BATCH_AXES):
            other = sizes[1 - axis]
            left = max(size for size in range(1, left + 1) if batch_size % (size * other) == 0 or size == 1)
        sizes[axis] = left
    if batch_size % (sizes[0] * sizes[1]):
        raise UserError(
            f"a batch of {batch_size} sequences (train.batch_size / train.gradient_accumulation_steps) does not divide "
            f"over mesh.data * mesh.fsdp = {sizes[0]} * {sizes[1]}; change one of them"
        )
    used = devices[: math.prod(sizes)]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=used)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, batch_dim: int = 0) -> NamedSharding:
    """Splits dimension `batch_dim` over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(*[None] * batch_dim, BATCH_AXES))


def parameter_shardings(abstract_boxed: Any, mesh: Mesh) -> Any:
    """Shardings of parameters from the logical axes that the model gave them.

    Args:
        abstract_boxed: the result of `jax.eval_shape(model.init, ...)`, linen metadata included.

    Returns:
        The same tree, unboxed, of `NamedSharding`.

    Raises:
        UserError: a dimension does not divide over its mesh axis.
    """
    specs = nn.get_partition_spec(abstract_boxed)
    shardings = logical_to_mesh_sharding(specs, mesh, RULES)

    def check(path: Any, array: jax.ShapeDtypeStruct, sharding: NamedSharding) -> NamedSharding:
        for dim, axis in enumerate(sharding.spec):
            if axis is not None and array.shape[dim] % mesh.shape[axis]:
                raise UserError(
                    f"dimension {dim} of {jax.tree_util.keystr(path)}, of size {array.shape[dim]}, does not divide "
                    f"over mesh.{axis}={mesh.shape[axis]}; change mesh.{axis} or the model's size"
                )
        return sharding

    return jax.tree_util.tree_map_with_path(check, nn.unbox(abstract_boxed), shardings)
