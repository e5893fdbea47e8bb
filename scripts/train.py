"""Trains a model: `python scripts/train.py --config=configs/shakespeare_char.py --workdir=runs/shakespeare`."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from picogpt_jax import cli
from picogpt_jax.config import Config
from picogpt_jax.devices import distributed
from picogpt_jax.devices.cpu import cores
from picogpt_jax.devices.setup import set_up_jax
from picogpt_jax.errors import UserError, command
from picogpt_jax.files import read_json
from picogpt_jax.text.reading import vocabulary_of_data
from picogpt_jax.text.vocabulary import Vocabulary

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # configs/ import configs.base

CONFIG = config_flags.DEFINE_config_file("config", None, "File of the configuration; see configs/.", lock_config=True)
WORKDIR = cli.DEFINE_path("workdir", None, "Folder for checkpoints, metrics and the loss curve.")
DEVICE = flags.DEFINE_enum("device", "auto", ["auto", "cpu", "gpu", "tpu"], "Where to train.")
RESUME = flags.DEFINE_bool(
    "resume",
    None,
    "Insist on going on with the run in --workdir (--noresume: on a new one). Default: where there is one.",
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "This is one of several processes of one training; Slurm, Open MPI, GKE or Cloud TPU says which.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "Without those: HOST:PORT where process 0 listens. The next two belong to it."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout_seconds",
    distributed.HEARTBEAT_TIMEOUT_SECONDS,
    "A process that has been silent for so long is lost, and all others end.",
)
INITIALIZATION = flags.DEFINE_integer(
    "initialization_timeout_seconds",
    distributed.INITIALIZATION_TIMEOUT_SECONDS,
    "How long the processes wait for one another at the start; machines that boot at different times need more.",
)


def main() -> None:
    if CONFIG.value is None or WORKDIR.value is None:
        raise UserError("--config and --workdir are needed, e.g. --config=configs/debug.py --workdir=runs/debug")
    cpu_devices = None
    if DISTRIBUTED.value or any(value is not None for value in address()):
        distributed.initialize(*address(), HEARTBEAT.value, INITIALIZATION.value)
        if "JAX_NUM_CPU_DEVICES" not in os.environ:
            cpu_devices = distributed.cpu_devices(cores(), COORDINATOR.value, NUM_PROCESSES.value)
    with distributed.leave_on_error():
        set_up_jax(DEVICE.value, cpu_devices)
        run()


def address() -> tuple[str | None, int | None, int | None]:
    return COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value


def run() -> None:
    from picogpt_jax.training.loop import train  # after set_up_jax

    with distributed.together():
        config, vocabulary = configuration()
    result = train(config, vocabulary, WORKDIR.value, RESUME.value)
    if distributed.is_first():
        report(result)
    if result.stopped_by is not None:
        sys.exit(128 + result.stopped_by)


def configuration() -> tuple[Config, Vocabulary]:
    sections = cli.config_sections(CONFIG)
    if not sections["data"]["dir"]:
        raise UserError("--config.data.dir is needed: a folder with train.bin, val.bin and meta.json")
    vocabulary = vocabulary_of_data(sections["data"]["dir"], sections["model"]["vocab_size"])
    complete(sections["model"], vocabulary)
    return Config.from_dict(sections), vocabulary


def report(result: Any) -> None:
    if result.stopped_by is not None:
        print(f"stopped by a signal and saved step {result.step}; go on with the same command")
        return
    print(f"best validation loss {result.best_val_loss:.4f}")
    draw_loss(Path(WORKDIR.value))


def complete(model: dict[str, Any], vocabulary: Vocabulary) -> None:
    """Sets what the configuration leaves open: the model is the workdir's, or only its vocabulary is the data's."""
    missing = [f"model.{key}" for key, value in model.items() if value is None]
    if missing == ["model.vocab_size"]:
        model["vocab_size"] = vocabulary.size
        return
    stored = Path(WORKDIR.value) / "config.json"
    if missing and not stored.is_file():
        make = command("scripts/convert.py", input="MODEL", to="checkpoint", output=WORKDIR.value)
        raise UserError(
            f"the configuration leaves {', '.join(missing)} to --workdir={WORKDIR.value}, which holds no model; import "
            f"one with: {make}"
        )
    if missing:
        there = dataclasses.asdict(Config.from_dict(read_json(stored)).model)
        model |= {key: there[key] for key, value in model.items() if value is None}


def draw_loss(workdir: Path) -> None:
    from picogpt_jax.training.metrics import METRICS_FILE
    from picogpt_jax.training.plot import plot_loss

    try:
        plot_loss(workdir / METRICS_FILE, workdir / "loss.png", workdir.name)
    except UserError as error:  # the extra is missing; a training that has succeeded does not end with an error
        print(f"no loss curve: {error}")
    else:
        print(f"wrote {workdir / 'loss.png'}")


if __name__ == "__main__":
    cli.run(main)
