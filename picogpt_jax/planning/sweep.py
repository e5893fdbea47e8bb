"""Many plans: meshes, batch sizes and types compared on one slice, and slices of growing size."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from picogpt_jax.config import Config, MeshConfig
from picogpt_jax.errors import UserError
from picogpt_jax.planning.plan import make_plan, topology_devices

FULL = 2  # plans of each type that a comparison compiles in full


def mesh_shapes(devices: int) -> list[MeshConfig]:
    """What --compare tries by default: data, fsdp, both halfway, and both with a little tensor parallelism."""
    half = 2 ** (int(math.log2(devices)) // 2)
    shapes = [(devices, 1, 1), (devices // half, half, 1), (1, devices, 1)]
    shapes += [(devices // 4, 4, 1)] if half > 4 else []
    shapes += [(devices // (2 * half), half, 2)] if devices >= 4 else []
    return [MeshConfig(data=data, fsdp=fsdp, tensor=tensor) for data, fsdp, tensor in dict.fromkeys(shapes)]


def compare(
    config: Config,
    topology: str,
    meshes: Sequence[MeshConfig],
    batch_sizes: Sequence[int],
    quick: bool | None = None,
    progress: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Plans of every mesh, batch size and of int8 and bfloat16, the fastest first; then what does not fit or work.

    Args:
        quick: whether the compiler optimizes less. None: for all of them, and then the best `FULL` of int8 and of
            bfloat16 in full, which are ranked before the others: quick plans tell meshes apart, not types.
    """
    modes: tuple[Literal["int8", "none"], ...] = ("int8", "none") if config.quant.mode == "int8" else ("none",)
    plans: dict[Config, dict[str, Any]] = {}
    for mesh, batch_size, mode in itertools.product(meshes, batch_sizes, modes):
        train = dataclasses.replace(config.train, batch_size=batch_size)
        quant = dataclasses.replace(config.quant, mode=mode)
        changed = dataclasses.replace(config, mesh=mesh, train=train, quant=quant)
        plans[changed] = _plan(changed, topology, quick is not False, progress)
    if quick is None:
        for mode in modes:
            fitting = [one for one, plan in plans.items() if one.quant.mode == mode and plan["fits"]]
            for changed in sorted(fitting, key=lambda one: _rank(plans[one]))[:FULL]:
                if plans[changed]["quick"]:
                    plans[changed] = _plan(changed, topology, False, progress)
    return sorted(plans.values(), key=_rank)


def _plan(config: Config, topology: str, quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """A plan; or why there is none, under `error`."""
    try:
        plan = make_plan(config, topology, quick)
    except UserError as error:
        plan = {"mesh": dataclasses.asdict(config.mesh), "batch_size": config.train.batch_size}
        plan |= {"quant_mode": config.quant.mode, "fits": False, "error": str(error)}
    batch = f"{dataclasses.astuple(config.mesh)} batch {config.train.batch_size} {config.quant.mode}"
    progress(f"{batch}: {_outcome(plan)}")
    return plan


def _rank(plan: dict[str, Any]) -> tuple[bool, bool, float]:
    return not plan["fits"], plan.get("quick", True), -plan.get("tokens_per_second", 0.0)


def _outcome(plan: dict[str, Any]) -> str:
    if "error" in plan:
        return str(plan["error"])
    if "mfu" not in plan:
        return "does not fit"
    how = "quickly" if plan["quick"] else "in full"
    return f"{plan['step_time_ms']:.1f} ms, MFU {plan['mfu']:.1%}, compiled {how} in {plan['compile_seconds']:.0f} s"


def weak_scaling(
    config: Config,
    topologies: Iterable[str],
    meshes: Sequence[MeshConfig] = (),
    quick: bool = False,
    progress: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Plans on slices of growing size with the same work a chip: `train.batch_size` is that of the first.

    Args:
        meshes: one for each slice; default: the configuration's on all of them.

    Each plan also has `efficiency`: its tokens/s a chip, relative to the first's. Those that do not fit are left out.
    """
    plans: list[dict[str, Any]] = []
    sizes = {topology: len(topology_devices(topology)) for topology in topologies}
    smallest = next(iter(sizes.values()))
    if meshes and len(meshes) != len(sizes):
        raise UserError(f"there are {len(meshes)} meshes for {len(sizes)} slices; give one for each, or none")
    for (topology, devices), mesh in zip(sizes.items(), meshes or [config.mesh] * len(sizes), strict=True):
        train = dataclasses.replace(config.train, batch_size=config.train.batch_size * devices // smallest)
        plan = make_plan(dataclasses.replace(config, train=train, mesh=mesh), topology, quick)
        if "mfu" in plan:
            plans.append(plan)
            per_chip = [item["tokens_per_second"] / item["chips"] for item in (plan, plans[0])]
            plan["efficiency"] = per_chip[0] / per_chip[1]
        progress(f"{topology}: {_outcome(plan)}")
    return plans
