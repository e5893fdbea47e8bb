"""Whether a workdir can be trained on, and where a training in it begins."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from picogpt_jax.config import Config
from picogpt_jax.devices.distributed import is_first
from picogpt_jax.errors import UserError
from picogpt_jax.files import read_json
from picogpt_jax.text.reading import load_vocabulary
from picogpt_jax.text.vocabulary import Vocabulary
from picogpt_jax.training import checkpoint
from picogpt_jax.training.trainer import FIRST_LOSS_SCALE, Trainer, TrainState

# What a resumed run may change and still learn what it would have learned: its length, its log, the machine's shape.
QUIET_ON_RESUME = frozenset(
    {
        *("train.max_iters", "train.eval_interval", "train.eval_iters", "train.log_interval"),
        *("train.gradient_accumulation_steps", "train.scan_layers", "train.remat", "train.attention"),
        *("mesh.data", "mesh.fsdp", "mesh.tensor"),
        *("checkpoint.keep", "log.tensorboard", "log.wandb", "log.wandb_project"),
    }
)
# What it may change besides, after a loss that was not finite, say: metrics.jsonl has a note of it.
NOTED_ON_RESUME = frozenset(
    {
        *("optimizer.learning_rate", "optimizer.min_lr", "optimizer.warmup_iters", "optimizer.lr_decay_iters"),
        *("optimizer.weight_decay", "optimizer.beta1", "optimizer.beta2", "optimizer.grad_clip"),
        *("train.dtype", "train.backward_dtype", "data.dir"),
    }
)
FREE_ON_RESUME = QUIET_ON_RESUME | NOTED_ON_RESUME


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
    state = trainer.adopt(restored.state)
    was_half, is_half = (dtype == "float16" for dtype in (restored.meta["config"]["train"]["dtype"], trainer.dtype))
    if was_half != is_half:
        scale = np.float32(FIRST_LOSS_SCALE if is_half else 1.0)
        state = dataclasses.replace(state, loss_scale=jax.device_put(scale, state.loss_scale.sharding))
    return state, restored.step, restored.meta["best_val_loss"], restored.step


def check_resumable(
    workdir: Path, config: Config, vocabulary: Vocabulary, resume: bool | None, fingerprints: list[str]
) -> str:
    """Refuses a workdir that does not fit: see `train`; says what a run that fits goes on with.

    A run goes on with its own configuration, but for `FREE_ON_RESUME`. Imported parameters are no run yet: they take
    any training that is of their shape and vocabulary.

    Args:
        fingerprints: of the splits of the text.

    Returns:
        what changes of `NOTED_ON_RESUME`, for the log; mostly nothing.

    Raises:
        UserError: naming the keys that differ from the run in `workdir`.
    """
    exists = (workdir / checkpoint.FOLDER).is_dir() and (workdir / "config.json").is_file()
    if resume and not exists:
        raise UserError(f"--resume: {workdir} holds no run; give the --workdir of one, or leave --resume out")
    if resume is False and exists:
        raise UserError(f"--noresume: {workdir} already holds a run; give another --workdir, or leave --noresume out")
    if not exists:
        return ""
    step, newest = _newest(workdir)
    if step is None:
        if resume:
            raise UserError(
                f"--resume: {workdir} holds no finished checkpoint yet; leave --resume out to start at step 0 again"
            )
        return ""
    imported = checkpoint.IMPORTED in newest
    old = Config.from_dict(newest["config"] if imported else read_json(workdir / "config.json")).to_dict()
    changed = {
        f"{section}.{key}": (old[section][key], value)
        for section, values in config.to_dict().items()
        for key, value in values.items()
        if old[section][key] != value
    }
    differing = [
        f"{key} ({there!r} there, {here!r} here)"
        for key, (there, here) in changed.items()
        if not _may_change(key, imported)
    ]
    if differing:
        what = "an imported model of another shape" if imported else "a run with another configuration"
        way = "use its values, as configs/finetune.py does" if imported else "use its values"
        raise UserError(f"{workdir} holds {what}: {', '.join(differing)}; {way}, or another --workdir")
    if not load_vocabulary(workdir / "vocab.json").fits(vocabulary):
        raise UserError(f"{workdir} was trained on another vocabulary than {config.data.dir}; use another --workdir")
    if imported:
        return ""
    if config.train.max_iters < step:
        raise UserError(
            f"{workdir} holds step {step} already, train.max_iters={config.train.max_iters} is less; give at least "
            f"--config.train.max_iters={step}, or another --workdir"
        )
    texts = {key: f"{key} {there!r} -> {here!r}" for key, (there, here) in changed.items()}
    if newest.get("data", fingerprints) != fingerprints:
        texts["data.dir"] = texts.get("data.dir", f"data.dir {config.data.dir!r}") + " (another text)"
    if texts:
        _say(f"{workdir} goes on with {', '.join(texts.values())}")
    return ", ".join(text for key, text in texts.items() if key in NOTED_ON_RESUME)


def _say(text: str) -> None:
    if is_first():
        print(text, flush=True)


def _may_change(key: str, imported: bool) -> bool:
    if imported:
        return not key.startswith("model.") or key == "model.dropout"
    return key in FREE_ON_RESUME


def _newest(workdir: Path) -> tuple[int | None, dict[str, Any]]:
    """The newest checkpoint's step, None where there is none, and what lies beside it, nothing where it is damaged."""
    step = checkpoint.newest_step(workdir)
    if step is None:
        return None, {}
    try:
        with checkpoint.Checkpoints(workdir) as checkpoints:
            return step, checkpoints.meta(step)
    except UserError:  # the training reports it, and takes the one before it
        return step, {}
