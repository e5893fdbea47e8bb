"""Plans a training run: compiles its real step for TPUs or GPUs that are not here, and reads the compiled program.

The TPU compiler (extra `tpu`: libtpu) describes a slice such as v5e:16x16 and compiles for it on any machine; the GPU
compiler (`gpus`) does the same for h100:8. Memory comes from the compiler, FLOPs and collectives from the program
(`cost`), times from `roofline`.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from picogpt_jax.config import Config
from picogpt_jax.devices import sharding
from picogpt_jax.devices.chips import CHIPS, chip_of
from picogpt_jax.errors import UserError
from picogpt_jax.planning import gpus, hlo, roofline
from picogpt_jax.planning.cost import Collective, Cost, Precision, cost_of
from picogpt_jax.training.trainer import Trainer, TrainState

# libtpu is loaded for its compiler alone: it need not look for a machine with TPUs, lock it, or log to /tmp.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
}
QUICK: dict[str, Any] = {"exec_time_optimization_effort": -1.0}  # of the compiler, from -1 to 1
LARGEST = 10  # collectives that are listed one by one


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a slice, or of hosts with GPUs, as their compiler describes them.

    Args:
        name: the chip and the shape of the slice, such as v5e:16x16, h100:8 or h100:2x8 (two hosts).

    Raises:
        UserError: the compiler is not installed, or does not know the topology.
    """
    known = {chip.topology: chip for chip in CHIPS if chip.topology is not None}
    examples = ", ".join(f"{chip.topology}:{chip.example}" for chip in known.values())
    chip = known.get(name.partition(":")[0])
    if chip is None:
        raise UserError(f"--topology={name} begins with no chip that is known; give one such as {examples}")
    if chip.topology in gpus.TARGETS:
        return gpus.gpu_devices(chip, name.partition(":")[2])
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("a plan needs the TPU compiler, which is not installed; pip install 'picogpt_jax[tpu]'")
    from jax.experimental import topologies

    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        options = {} if chip.cores is None else {"chip_config_name": chip.cores}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise UserError(
            f"--topology={name} is not known to the TPU compiler ({str(error).splitlines()[0]}); give a chip and the "
            f"shape of a slice, such as {examples}"
        ) from None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A training step for the devices of a slice; `program` is None where their memory does not hold it."""

    trainer: Trainer
    program: Any
    too_large_bytes: float | None  # what it would need, where it does not fit
    seconds: float


def compile_step(config: Config, devices: Sequence[jax.Device], quick: bool = False) -> Compiled:
    """Compiles one training step of `Trainer`, tokens coming from the host, without any array.

    Args:
        quick: less optimization by the TPU compiler, several times as fast; the program differs a little.

    Raises:
        UserError: mesh, batch and model do not fit the devices.
    """
    trainer = Trainer(config, list(devices))
    if trainer.mesh.size != len(devices):
        raise UserError(
            f"mesh {dict(trainer.mesh.shape)} uses {trainer.mesh.size} of {len(devices)} devices; change mesh.*, or "
            "train.batch_size so that a part of it falls to each (mesh.data * mesh.fsdp must divide it)"
        )
    shape = (1, config.train.batch_size, config.model.block_size + 1)
    batches = jax.ShapeDtypeStruct(shape, jnp.uint16, sharding=sharding.batch_sharding(trainer.mesh, 1))
    began = time.perf_counter()
    with gpus.without_cudnn() if devices[0].platform == "gpu" else contextlib.nullcontext():
        mode = trainer.mode_at(config.quant.start_step)
        lowered = trainer.steps.lower(trainer.abstract_state, None, batches, mode)
    try:
        program, too_large = lowered.compile(QUICK if quick else None), None
    except jax.errors.JaxRuntimeError as error:
        program, too_large = None, _needed_bytes(str(error))
        if too_large is None:
            raise
    return Compiled(trainer, program, too_large, time.perf_counter() - began)


def _needed_bytes(message: str) -> float | None:
    """What the compiler says a program needs that does not fit: `Used 20.01G of 15.75G hbm`."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    return float(found[1]) * 1024 ** " KMGT".index(found[2] or " ") if found else None


def make_plan(config: Config, topology: str, quick: bool = False) -> dict[str, Any]:
    """The plan of a run on a slice: a JSON value, see `picogpt_jax.planning.report`.

    Raises:
        UserError: the topology is unknown, or the run does not fit its number of devices.
    """
    devices = topology_devices(topology)
    quick = quick and devices[0].platform == "tpu"  # the GPU compiler takes as long, and makes the same program
    compiled = compile_step(config, devices, quick)
    mesh = compiled.trainer.mesh
    chip = chip_of(devices[0].device_kind)
    assert chip is not None, devices[0].device_kind
    place = roofline.Slice(chip, [_coordinates(device) for device in mesh.devices.flat])
    tokens = config.train.batch_size * config.model.block_size
    plan: dict[str, Any] = {
        "topology": topology,
        "chip": chip.name,
        "chips": len(devices) // place.devices_per_chip,
        "mesh": dict(mesh.shape),
        "quant_mode": config.quant.mode,
        "batch_size": config.train.batch_size,
        "tokens_per_step": tokens,
        "tokens_per_chip": tokens * place.devices_per_chip / len(devices),
        "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "parameters": config.model.n_parameters,
        **_state_bytes(compiled.trainer.abstract_state, place.devices_per_chip),
        **_memory(compiled, place),
        "model_flops_per_step": config.model.flops_per_token * tokens,
        "compile_seconds": compiled.seconds,
        "quick": quick,
    }
    if compiled.program is None or not plan["fits"]:  # the GPU compiler makes a program all the same
        return plan
    cost = cost_of(hlo.parse_module(compiled.program.as_text()), mesh.size)
    left_out = [*roofline.left_out(chip), *cost.uncounted]
    return plan | _cost(cost, mesh, place) | _times(cost, place, plan) | {"left_out": left_out}


def _coordinates(device: jax.Device) -> tuple[int, ...]:
    """Of a TPU, its place in the slice; of a GPU, its host and its number."""
    return tuple(device.coords) if device.platform == "tpu" else (device.process_index, device.id)


def _state_bytes(state: TrainState, devices_per_chip: int) -> dict[str, float]:
    sizes: dict[str, float] = {}
    for name, tree in {"parameter": state.params, "optimizer": state.opt_state}.items():
        leaves = jax.tree.leaves(tree)
        local = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        sizes[f"{name}_bytes"] = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        sizes[f"{name}_bytes_per_chip"] = local * devices_per_chip
    return sizes


def _memory(compiled: Compiled, place: roofline.Slice) -> dict[str, Any]:
    """Bytes a chip: the arguments (state and batch), what is live at once beside them, and the program itself."""
    chip_bytes = place.chip.memory_bytes
    if compiled.program is None:
        assert compiled.too_large_bytes is not None
        needed = compiled.too_large_bytes * place.devices_per_chip
        return {"bytes_per_chip": needed, "chip_memory_bytes": chip_bytes, "fits": False}
    found = compiled.program.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "results": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }
    parts = {name: size * place.devices_per_chip for name, size in parts.items()}
    needed = sum(parts.values())
    return {"bytes_per_chip": needed, "memory": parts, "chip_memory_bytes": chip_bytes, "fits": needed <= chip_bytes}


def _cost(cost: Cost, mesh: jax.sharding.Mesh, place: roofline.Slice) -> dict[str, Any]:
    """FLOPs of all chips; bytes of memory traffic and collectives of one device."""
    precisions: tuple[Precision, ...] = ("int8", "bfloat16", "float32")
    matmuls = {name: {"count": cost.products(name), "flops": cost.flops(name) * mesh.size} for name in precisions}
    sums: dict[str, dict[str, float]] = {}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for item in cost.collectives:
        axes = group_axes(item, mesh)
        seconds = item.times * roofline.collective_seconds(item, place)
        key = (item.kind, item.dtype, axes, item.overlapped)
        row = rows.setdefault(key, dict(zip(("kind", "dtype", "axes", "overlapped"), key, strict=True)))
        for entry in (sums.setdefault(item.kind, {}), row):
            entry["count"] = entry.get("count", 0) + item.times
            entry["bytes"] = entry.get("bytes", 0) + item.times * item.n_bytes
            entry["ms"] = entry.get("ms", 0.0) + 1e3 * seconds
        if item.times * item.n_bytes > row.get("largest_bytes", -1):
            row |= {"largest_bytes": item.times * item.n_bytes, "largest": item.source}
    listed = sorted(rows.values(), key=lambda row: -row["ms"])
    return {
        "flops_per_step": sum(row["flops"] for row in matmuls.values()),
        "matmuls": matmuls,
        "memory_traffic_bytes": cost.n_bytes,
        "collectives": sums,
        "largest_collectives": listed[:LARGEST],
    }


def group_axes(collective: Collective, mesh: jax.sharding.Mesh) -> str:
    """The mesh axes along which the devices of a collective's first group differ, such as `data+fsdp`."""
    groups = collective.groups
    group = groups[0] if collective.kind != "collective-permute" else sorted({one for pair in groups for one in pair})
    places = np.array(np.unravel_index(group, mesh.devices.shape))
    return "+".join(axis for axis, where in zip(mesh.axis_names, places, strict=True) if len(set(where)) > 1) or "-"


def _times(cost: Cost, place: roofline.Slice, plan: dict[str, Any]) -> dict[str, float]:
    estimate = roofline.estimate(cost, place)
    step = estimate.step
    peak = place.chip.bfloat16_flops * plan["chips"]
    return {
        "compute_ms": 1e3 * estimate.compute,
        "memory_ms": 1e3 * estimate.memory,
        "interconnect_ms": 1e3 * estimate.interconnect,
        "exposed_interconnect_ms": 1e3 * estimate.exposed,
        "step_time_ms": 1e3 * step,
        "step_time_ms_nothing_hidden": 1e3 * estimate.serial,
        "tokens_per_second": plan["tokens_per_step"] / step,
        "mfu": plan["model_flops_per_step"] / (step * peak),
        "mfu_nothing_hidden": plan["model_flops_per_step"] / (estimate.serial * peak),
    }
