"""Float PyTorch checkpoints: nanoGPT's and picoGPT's `ckpt.pt`, also of picoGPT's own QAT (extra: torch).

model            nanoGPT's names, matrices [out, in], the tied `lm_head.weight` beside `transformer.wte.weight`
model_args       the architecture (and, if it says so, the `activation`); what is missing follows from the tensors,
                 but for `n_head`; only these two are needed
iter_num, best_val_loss, config, optimizer; picogpt_jax in ours: the vocabulary
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from picogpt_jax.config import ModelConfig
from picogpt_jax.errors import UserError, errors_in
from picogpt_jax.formats.gpt2_tensors import HEAD, TABLE, FloatCheckpoint, read_parameters, renamed, sizes_of
from picogpt_jax.formats.torch_file import (
    EXTRA_KEY,
    check_keys,
    check_plain,
    checkpoint_kind,
    load_content,
    rewriting,
    save_content,
    stored_tensors,
    torch,
)
from picogpt_jax.int8.layout import Stored, check_layout, float_layout, layout_of, shortened
from picogpt_jax.text.reading import vocabulary_from_json
from picogpt_jax.text.vocabulary import Vocabulary

MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")

THEIRS = {"activation": "gelu", "layer_norm_epsilon": 1e-5}  # all that picoGPT and nanoGPT know


def save_float_checkpoint(checkpoint: FloatCheckpoint, path: str | os.PathLike[str]) -> None:
    """Writes nanoGPT's and picoGPT's float `ckpt.pt`, with the tied `lm_head.weight`, without an optimizer state.

    Raises:
        UserError: a tensor is unknown, missing or mis-shaped, their code cannot compute the model's activation or
            LayerNorm, or the file cannot be written.
    """
    check_expressible(checkpoint.model)
    check_plain("config", checkpoint.config)
    check_layout(layout_of(checkpoint.tensors), float_layout(checkpoint.model))
    state = {name: torch.tensor(array) for name, array in checkpoint.tensors.items()}
    state[HEAD] = state[TABLE]  # one storage, as their tied modules have it
    content = {
        "model": state,
        "model_args": model_args_of(checkpoint.model),
        "iter_num": int(checkpoint.iter_num),
        "best_val_loss": float(checkpoint.best_val_loss),  # a numpy float would need more than plain values to load
        "config": checkpoint.config,
    }
    if checkpoint.vocabulary is not None:
        content[EXTRA_KEY] = {"vocabulary": checkpoint.vocabulary.to_json()}
    save_content(content, path)


def load_float_checkpoint(path: str | os.PathLike[str]) -> FloatCheckpoint:
    """Reads nanoGPT's or picoGPT's float `ckpt.pt`; of a QAT checkpoint, the float parameters.

    Ignored on purpose: buffers (`gpt2_tensors.IGNORED`), the optimizer state, and any other top-level key.

    Raises:
        UserError: the file is damaged, unsafe or of another kind; a tensor is unknown, missing, mis-shaped, of no float
            type up to float32 or not finite; or the head is not tied to the token embedding.
    """
    content = load_content(path)
    kind = checkpoint_kind(content, path)
    with errors_in(path):
        if kind != "torch-float":
            raise UserError("this is an int8 checkpoint; expected a float one")
        content = {"model_args": {}, "iter_num": 0, "best_val_loss": float("inf"), "config": {}} | content
        check_plain("config", content["config"])
        check_keys("config", content["config"])
        found = renamed(stored_tensors("model", content["model"], Path(path).stat().st_size))
        model = model_from_args(content["model_args"], found, path)
        return FloatCheckpoint(
            model=model,
            tensors=read_parameters(model, found),
            iter_num=_number(content, "iter_num", int),
            best_val_loss=_number(content, "best_val_loss", float),
            config=content["config"],
            vocabulary=_vocabulary(content.get(EXTRA_KEY)),
        )


def model_from_args(model_args: Any, found: Mapping[str, Stored], path: str | os.PathLike[str]) -> ModelConfig:
    """The architecture of `model_args`, completed by the tensors `found`; `path` is for messages.

    Raises:
        UserError: a key is unknown, `n_head` is missing, or a value is of the wrong type, or not that of the tensors.
    """
    check_keys("model_args", model_args)
    check_plain("model_args", model_args)
    unknown = sorted(map(str, set(model_args) - {*MODEL_ARGS, "activation"}))
    if unknown:
        raise UserError(f"model_args has the unknown keys {shortened(unknown)}; it knows {', '.join(MODEL_ARGS)}")
    if "n_head" not in model_args:
        advice = rewriting(path, 'x.setdefault("model_args", {}).update(n_head=N_HEAD)')
        raise UserError(f"model_args lacks n_head, the number of heads, which no tensor tells; {advice}")
    sizes = sizes_of(found)
    for name, size in sizes.items():
        if model_args.get(name, size) != size:
            heads = ", n_head=N_HEAD" if name == "n_embd" else ""  # the heads of another width are doubtful, too
            advice = rewriting(path, f'x["model_args"].update({name}={size}{heads})')
            raise UserError(f"model_args says {name}={model_args[name]!r:.40}, the tensors {size}; {advice}")
    defaults: dict[str, Any] = {"dropout": 0.0, **THEIRS}
    return ModelConfig(**defaults | model_args | sizes)


def model_args_of(model: ModelConfig) -> dict[str, Any]:
    """The architecture in nanoGPT's words."""
    return {name: getattr(model, name) for name in MODEL_ARGS}


def check_expressible(model: ModelConfig) -> None:
    """Raises a UserError for what their checkpoints do not name: their code has one of each."""
    for name, value in THEIRS.items():
        if getattr(model, name) != value:
            raise UserError(f"model.{name}={getattr(model, name)!r}, but picoGPT and nanoGPT compute {value!r} only")


def _number(content: Mapping[str, Any], key: str, kind: type) -> Any:
    """A number of the file; nanoGPT stores its best loss as a tensor of one element."""
    value = content[key]
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type == "cpu":
        value = value.item()
    with contextlib.suppress(ValueError, OverflowError):  # no step is infinite
        if type(value) in (int, float):
            return kind(value)
    found = value if type(value) is float else type(value).__name__
    raise UserError(f"{key} is {found}; expected a number")


def _vocabulary(extra: Any) -> Vocabulary | None:
    if extra is None:
        return None
    check_keys(EXTRA_KEY, extra, "vocabulary")
    check_plain(f"{EXTRA_KEY}.vocabulary", extra["vocabulary"])
    return vocabulary_from_json(extra["vocabulary"], f"{EXTRA_KEY}.vocabulary")
