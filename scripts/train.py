"""Trains a model: `python scripts/train.py --config=configs/shakespeare_char.py --workdir=runs/shakespeare`."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from picogpt_jax import cli
from picogpt_jax.config import Config
from picogpt_jax.devices import set_up_jax
from picogpt_jax.errors import UserError
from picogpt_jax.files import read_json
from picogpt_jax.vocabulary import Vocabulary

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # configs/ import configs.base

CONFIG = config_flags.DEFINE_config_file("config", None, "File of the configuration; see configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and the loss curve.")
DEVICE = flags.DEFINE_enum("device", "auto", ["auto", "cpu", "gpu", "tpu"], "Where to train.")
RESUME = flags.DEFINE_bool(
    "resume",
    None,
    "Insist on going on with the run in --workdir (--noresume: on a new one). Default: where there is one.",
)


def main() -> None:
    if CONFIG.value is None or WORKDIR.value is None:
        raise UserError("--config and --workdir are needed, e.g. --config=configs/debug.py --workdir=runs/debug")
    set_up_jax(DEVICE.value)
    sections = cli.config_sections(CONFIG)
    if not sections["data"]["dir"]:
        raise UserError("--config.data.dir is needed: a folder with train.bin, val.bin and meta.json")
    vocabulary = Vocabulary.from_data_dir(sections["data"]["dir"], sections["model"]["vocab_size"])
    complete(sections["model"], vocabulary)
    from picogpt_jax.train import train  # after set_up_jax

    result = train(Config.from_dict(sections), vocabulary, WORKDIR.value, RESUME.value)
    if result.stopped_by is not None:
        print(f"stopped by a signal and saved step {result.step}; go on with the same command")
        sys.exit(128 + result.stopped_by)
    print(f"best validation loss {result.best_val_loss:.4f}")
    draw_loss(Path(WORKDIR.value))


def complete(model: dict[str, Any], vocabulary: Vocabulary) -> None:
    """Sets what the configuration leaves open: the vocabulary's size is the data's, the rest is the workdir's."""
    if model["vocab_size"] is None:
        model["vocab_size"] = vocabulary.size
    missing = [f"model.{key}" for key, value in model.items() if value is None]
    stored = Path(WORKDIR.value) / "config.json"
    if missing and not stored.is_file():
        raise UserError(
            f"the configuration leaves {', '.join(missing)} to --workdir={WORKDIR.value}, which holds no model; import "
            "one with scripts/convert.py --to=checkpoint"
        )
    if missing:
        there = dataclasses.asdict(Config.from_dict(read_json(stored)).model)
        model |= {key: there[key] for key, value in model.items() if value is None}


def draw_loss(workdir: Path) -> None:
    from picogpt_jax.metrics import METRICS_FILE
    from picogpt_jax.plot import plot_loss

    try:
        plot_loss(workdir / METRICS_FILE, workdir / "loss.png", workdir.name)
    except UserError as error:  # the extra is missing; a training that has succeeded does not end with an error
        print(f"no loss curve: {error}")
    else:
        print(f"wrote {workdir / 'loss.png'}")


if __name__ == "__main__":
    cli.run(main)
