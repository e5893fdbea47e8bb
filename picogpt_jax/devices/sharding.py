"""Where each array lies: a mesh with the axes data, fsdp and tensor, and one table from logical axes to mesh axes.

The model names logical axes only. `data` and `fsdp` split the batch. `fsdp` also splits the parameters along the width,
`tensor` along heads, hidden units and vocabulary. The compiler knows where parameters and batches lie and derives the
rest; `constrain` tells it where it would guess wrong. With `fsdp` each weight is gathered for its product (in QAT, its
int8 codes); activations are not. A step that adds up the gradients of several parts of its batch on each device
(`training.trainer`) is computed by the devices themselves: the model finds no mesh there.
"""

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from picogpt_jax.config import MeshConfig
from picogpt_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "tokens": "data",  # the batch while it is looked up in tables whose width is split over fsdp
    "layers": None,
    "vocab": "tensor",
    "position": None,
    "embed": "fsdp",
    "qkv": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "norm": None,
}
# What sets the size of a dimension, for the message when it does not divide.
KEYS = {"vocab": "vocab_size", "embed": "n_embd", "qkv": "n_embd", "heads": "n_head", "mlp": "mlp_ratio"}


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

    def place(path: Any, array: jax.ShapeDtypeStruct, axes: PartitionSpec) -> NamedSharding:
        return placement(axes, jax.tree_util.keystr(path), array.shape, mesh)

    return jax.tree_util.tree_map_with_path(place, nn.unbox(abstract_boxed), logical_axes(abstract_boxed))


def logical_axes(abstract_boxed: Any) -> Any:
    """The logical axes of each parameter, as the model names them."""
    return nn.get_partition_spec(abstract_boxed)


def placement(axes: Iterable[str | None], name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where an array of these logical axes lies.

    Raises:
        UserError: a dimension does not divide over its mesh axis.
    """
    axes = tuple(axes)
    for dim, (axis, size) in enumerate(zip(axes, shape, strict=False)):
        check_divides(axis, f"dimension {dim} ({axis}) of {name}", size, mesh)
    return NamedSharding(mesh, partition_spec(axes))


def check_divides(axis: str | None, what: str, size: int, mesh: Mesh) -> None:
    """Raises a UserError that names what to change if `size` does not divide over the mesh axis of a logical axis."""
    mesh_axis = None if axis is None else RULES[axis]
    if axis is None or not isinstance(mesh_axis, str) or size % mesh.shape[mesh_axis] == 0:
        return
    raise UserError(
        f"{what}, of size {size}, does not divide over mesh.{mesh_axis}={mesh.shape[mesh_axis]}; change "
        f"mesh.{mesh_axis} or model.{KEYS[axis]}"
    )


def partition_spec(axes: Iterable[str | None]) -> PartitionSpec:
    """Logical axes -> mesh axes, by the table."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def on(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Within it, while a function is traced, the mesh is known to `constrain` and to fused kernels."""
    return contextlib.nullcontext() if mesh.size == 1 else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def known_mesh() -> AbstractMesh | None:
    """The mesh over whose devices the compiler splits what is traced here.

    None outside `on`, and within a function that each device computes for itself (`jax.shard_map`): its arrays are the
    device's own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.are_all_axes_manual else mesh


def constrain(x: Array, *axes: str | None) -> Array:
    """Places dimension i of `x` as logical axis i says; None: not split.

    Nothing happens without a mesh, nor where only the batch is split: what the compiler derives is right then.
    """
    mesh = known_mesh()
    if mesh is None or mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        return x
    return lax.with_sharding_constraint(x, partition_spec(axes))


def splits(axis: str) -> bool:
    """Whether a logical axis is split where this is traced."""
    mesh, mesh_axis = known_mesh(), RULES[axis]
    return mesh is not None and isinstance(mesh_axis, str) and mesh.shape[mesh_axis] > 1


def splits_weights() -> bool:
    """Whether weights may be split over devices where this is traced; without a mesh they are not."""
    mesh = known_mesh()
    if mesh is None:
        return False
    is_ours = mesh.axis_names == AXES and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return not (is_ours and mesh.shape["fsdp"] == mesh.shape["tensor"] == 1)


def batch_shares() -> int:
    """Over how many devices the batch is split where this is traced; without a mesh over one."""
    mesh = known_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
