"""Whether a workdir can be trained on, and where a training in it begins."""

import math
from pathlib import Path
from typing import Any

from picogpt_jax.config import Config
from picogpt_jax.devices.distributed import is_first
from picogpt_jax.errors import UserError
from picogpt_jax.files import read_json
from picogpt_jax.text.reading import load_vocabulary
from picogpt_jax.text.vocabulary import Vocabulary
from picogpt_jax.training import checkpoint
from picogpt_jax.training.trainer import Trainer, TrainState

# What a resumed run may change: nothing that moves a parameter, but for the length and the shape of the machine.
FREE_ON_RESUME = frozenset(
    {
        *("train.max_iters", "train.eval_interval", "train.eval_iters", "train.log_interval"),
        *("train.gradient_accumulation_steps", "data.dir", "mesh.data", "mesh.fsdp", "mesh.tensor"),
        *("train.scan_layers", "train.remat", "train.attention"),
        *("checkpoint.keep", "log.tensorboard", "log.wandb", "log.wandb_project"),
    }
)


def begin(
    trainer: Trainer, checkpoints: checkpoint.Checkpoints, workdir: Path
) -> tuple[TrainState, int, float, int | None]:
    """Where a training starts: from the newest checkpoint, from imported parameters, or from new ones.

    Returns:
        the state, its step, the best validation loss so far, and the step to resume the log at (None: a new log).
    """
    # Each checkpoint has its layers as the run had them that wrote it.
    restored = checkpoints.restore_latest(
        lambda meta: trainer.stored_as(Config.from_dict(meta["config"]).train.scan_layers).abstract_state
    )
    if restored is None:
        if (workdir / "config.json").is_file():
            _say(f"{workdir} holds no checkpoint yet: starting at step 0")
        return trainer.init(), 0, math.inf, None
    if checkpoint.IMPORTED in restored.meta:
        _say(f"starting from the parameters imported into {workdir}")
        return trainer.init(restored.state.params), 0, math.inf, None
    _say(f"resumed {workdir} at step {restored.step}")
    return trainer.adopt(restored.state), restored.step, restored.meta["best_val_loss"], restored.step


def check_resumable(workdir: Path, config: Config, vocabulary: Vocabulary, resume: bool | None) -> None:
    """Refuses a workdir that does not fit: see `train`.

    A run goes on with its own configuration, but for `FREE_ON_RESUME`. Imported parameters are no run yet: they take
    any training that is of their shape and vocabulary.

    Raises:
        UserError: naming the keys that differ from the run in `workdir`.
    """
    exists = (workdir / checkpoint.FOLDER).is_dir() and (workdir / "config.json").is_file()
    if resume and not exists:
        raise UserError(f"--resume: {workdir} holds no run; give the --workdir of one, or leave --resume out")
    if resume is False and exists:
        raise UserError(f"--noresume: {workdir} already holds a run; give another --workdir, or leave --noresume out")
    if not exists:
        return
    newest = _newest_meta(workdir)
    if resume and newest is None:
        raise UserError(
            f"--resume: {workdir} holds no finished checkpoint yet; leave --resume out to start at step 0 again"
        )
    imported = checkpoint.IMPORTED in (newest or {})
    stored = newest["config"] if newest and imported else read_json(workdir / "config.json")
    old = Config.from_dict(stored).to_dict()
    differing = [
        f"{section}.{key} ({old[section][key]!r} there, {value!r} here)"
        for section, values in config.to_dict().items()
        for key, value in values.items()
        if old[section][key] != value and not _may_change(section, key, imported)
    ]
    if differing and imported:
        raise UserError(
            f"{workdir} holds an imported model of another shape: {', '.join(differing)}; use its values, as "
            "configs/finetune.py does, or another --workdir"
        )
    if differing:
        raise UserError(
            f"{workdir} holds a run with another configuration: {', '.join(differing)}; "
            "use its values, or another --workdir"
        )
    if not load_vocabulary(workdir / "vocab.json").fits(vocabulary):
        raise UserError(f"{workdir} was trained on another vocabulary than {config.data.dir}; use another --workdir")


def _say(text: str) -> None:
    if is_first():
        print(text, flush=True)


def _may_change(section: str, key: str, imported: bool) -> bool:
    if imported:
        return section != "model" or key == "dropout"
    return f"{section}.{key}" in FREE_ON_RESUME


def _newest_meta(workdir: Path) -> dict[str, Any] | None:
    """What lies beside the newest checkpoint; None where there is none, nothing where it is damaged."""
    try:
        with checkpoint.Checkpoints(workdir) as checkpoints:
            return checkpoints.meta(checkpoints.steps[-1]) if checkpoints.steps else None
    except UserError:  # the training reports it, and takes the one before it
        return {}
