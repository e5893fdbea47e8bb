"""Says what a training run will need, before TPUs or GPUs are rented: memory, FLOPs, collectives, a time at best.

Compiles the real step for devices that are not here; needs `pip install 'picogpt_jax[tpu]'`, for GPUs `[gpu-plan]`:
`python scripts/plan.py --config=configs/gpt2_xl.py --topology=v5e:16x16 [--config.mesh.fsdp=16] [--json=FILE]`.
--compare ranks meshes, batch sizes, int8 and bfloat16; --weak_scaling takes the same work a chip to larger slices.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from picogpt_jax import cli
from picogpt_jax.config import Config, MeshConfig
from picogpt_jax.devices.setup import set_up_jax
from picogpt_jax.errors import UserError
from picogpt_jax.files import write_json

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # configs/ import configs.base
VOCAB_SIZE = 65  # tiny Shakespeare's, where the configuration leaves it to the data

CONFIG = config_flags.DEFINE_config_file("config", None, "File of the configuration; see configs/.", lock_config=True)
TOPOLOGY = flags.DEFINE_string(
    "topology",
    "v5e:16x16",
    "Chip and shape of the slice, such as v5e:16x16; GPUs of a host, such as h100:8; 2x8: hosts.",
)
JSON = cli.DEFINE_path("json", None, "File for the plan, or the list of plans.")
COMPARE = flags.DEFINE_bool("compare", False, "Rank meshes and batch sizes, int8 beside bfloat16.")
MESHES = flags.DEFINE_list(
    "meshes", None, "data x fsdp x tensor, such as 256x1x1,16x16x1: those to compare, or one a slice."
)
BATCH_SIZES = flags.DEFINE_list(
    "batch_sizes", None, "Those to compare (default: the configuration's, and twice that), or to scale from."
)
WEAK_SCALING = flags.DEFINE_list(
    "weak_scaling", None, "Slices of growing size, such as v5e:2x2,v5e:16x16; the batch is that of the first."
)
PNG = cli.DEFINE_path("png", None, "--weak_scaling: file for a picture.")
QUICK = flags.DEFINE_bool(
    "quick",
    None,
    "TPUs: let the compiler optimize less: several times as fast, and a longer step. Default: off; with --compare, on, "
    "and off for the best two of int8 and of bfloat16.",
)


def main() -> None:
    if CONFIG.value is None:
        raise UserError("--config is needed, e.g. --config=configs/gpt2_xl.py --topology=v5e:16x16")
    set_up_jax("cpu", cpu_devices=1)
    import jax

    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled cannot run here
    sections = cli.config_sections(CONFIG)
    if sections["model"]["vocab_size"] is None:
        sections["model"]["vocab_size"] = VOCAB_SIZE
    report = plan(Config.from_dict(sections))
    if JSON.value is not None:
        write_json(JSON.value, report)


def plan(config: Config) -> Any:
    from picogpt_jax.planning import report  # after set_up_jax
    from picogpt_jax.planning.plan import make_plan, topology_devices
    from picogpt_jax.planning.sweep import compare, mesh_shapes, weak_scaling

    meshes = [_mesh(text) for text in MESHES.value or ()]
    if COMPARE.value:
        meshes = meshes or mesh_shapes(len(topology_devices(TOPOLOGY.value)))
        batch_size = config.train.batch_size
        batch_sizes = [_number(text) for text in BATCH_SIZES.value or (batch_size, 2 * batch_size)]
        plans = compare(config, TOPOLOGY.value, meshes, batch_sizes, QUICK.value)
        print(report.format_comparison(plans))
        return plans
    if WEAK_SCALING.value:
        series = {}
        for batch_size in map(_number, BATCH_SIZES.value or (config.train.batch_size,)):
            first = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch_size))
            plans = weak_scaling(first, WEAK_SCALING.value, meshes, bool(QUICK.value))
            print(report.format_scaling(plans))
            series |= {report.scaling_label(plans[0]): plans} if plans else {}
        if PNG.value is not None:
            report.plot_scaling(series, PNG.value, "Weak scaling by the plan")
        return [plan for plans in series.values() for plan in plans]
    result = make_plan(config, TOPOLOGY.value, bool(QUICK.value))
    print(report.format_plan(result))
    return result


def _mesh(text: str) -> MeshConfig:
    sizes = [_number(size) for size in text.split("x")]
    if len(sizes) != 3:
        raise UserError(f"--meshes={text} has {len(sizes)} sizes; give data x fsdp x tensor, such as 16x16x1")
    return MeshConfig(**dict(zip([field.name for field in dataclasses.fields(MeshConfig)], sizes, strict=True)))


def _number(text: str | int) -> int:
    if not str(text).isdigit() or int(text) < 1:
        raise UserError(f"{text!r} in --meshes or --batch_sizes is not a positive number")
    return int(text)


if __name__ == "__main__":
    cli.run(main)
