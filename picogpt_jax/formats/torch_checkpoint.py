"""Float PyTorch checkpoints: nanoGPT's and picoGPT's `ckpt.pt`, also of picoGPT's own QAT (extra: torch).

    model            nanoGPT's names, matrices [out, in], the tied `lm_head.weight` beside `transformer.wte.weight`
    model_args       the architecture; without the width of the MLP, which the tensors tell
    iter_num, best_val_loss, config, optimizer
    picogpt_jax      in ours: the vocabulary

Every tensor is a parameter or is named in `IGNORED`; what is neither is refused.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError("this needs PyTorch; install it with: pip install 'picogpt_jax[torch]'") from error

from picogpt_jax.config import ModelConfig
from picogpt_jax.errors import UserError, errors_in
from picogpt_jax.formats.torch_file import (
    EXTRA_KEY,
    check_keys,
    check_plain,
    checked_arrays,
    content_kind,
    load_content,
    save_content,
    without_prefix,
)
from picogpt_jax.int8.layout import check_depth, check_finite, check_layout, float_layout, layout_of
from picogpt_jax.text.reading import vocabulary_from_json
from picogpt_jax.text.vocabulary import Vocabulary

MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
HEAD = "lm_head"
HIDDEN = "transformer.h.0.mlp.c_fc"

# The layer norm of picoGPT and nanoGPT; they know the exact GELU alone, too.
THEIR_EPSILON = 1e-5

# Entries of a state dict that are no parameters.
IGNORED = (
    # The causal mask, a buffer of old nanoGPT releases.
    re.compile(r"transformer\.h\.\d+\.attn\.bias"),
    # torch.ao's QAT: the fake quantization of a layer's weight or output, and the observer inside it. The parameters
    # beside them are the float ones that it trained; its grids (one scale for all tokens) are not ours.
    re.compile(
        r"(\w+\.)+(weight_fake_quant|activation_post_process)\."
        r"(scale|zero_point|fake_quant_enabled|observer_enabled|activation_post_process\.(eps|min_val|max_val))"
    ),
)


def save_float_checkpoint(
    model: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    path: str | os.PathLike[str],
    *,
    iter_num: int,
    best_val_loss: float,
    config: dict[str, Any],
    vocabulary: Vocabulary,
) -> None:
    """Writes nanoGPT's and picoGPT's float `ckpt.pt`, without an optimizer state.

    Args:
        model: the architecture.
        tensors: float32, nanoGPT's names, matrices [out, in], without the tied `lm_head.weight`, which is added.
        path: the file.
        iter_num: optimizer steps made.
        best_val_loss: nats per token.
        config: the training configuration; plain values.
        vocabulary: the tokens.

    Raises:
        UserError: a tensor is unknown, missing or mis-shaped, their code cannot compute the model's activation or
            LayerNorm, or the file cannot be written.
    """
    check_expressible(model)
    check_plain("config", config)
    check_layout(layout_of(tensors), float_layout(model))
    state = {name: torch.tensor(array) for name, array in tensors.items()}
    state[f"{HEAD}.weight"] = state["transformer.wte.weight"]  # one storage, as their tied modules have it
    content = {
        "model": state,
        "model_args": model_args_of(model),
        "iter_num": int(iter_num),
        "best_val_loss": float(best_val_loss),  # a numpy float would need more than plain values to load
        "config": config,
        EXTRA_KEY: {"vocabulary": vocabulary.to_json()},
    }
    save_content(content, path)


@dataclasses.dataclass(frozen=True, eq=False)
class FloatCheckpoint:
    """A float `ckpt.pt`.

    Attributes:
        model: the architecture; `mlp_ratio` is inferred from the tensors.
        tensors: float32, nanoGPT's names, matrices [out, in], without the tied `lm_head.weight`.
        iter_num: optimizer steps made.
        best_val_loss: nats per token.
        config: the training configuration, as it was stored.
        vocabulary: None where another program wrote the file.
    """

    model: ModelConfig
    tensors: dict[str, np.ndarray]
    iter_num: int
    best_val_loss: float
    config: dict[str, Any]
    vocabulary: Vocabulary | None


def load_float_checkpoint(path: str | os.PathLike[str]) -> FloatCheckpoint:
    """Reads nanoGPT's or picoGPT's float `ckpt.pt`; of a QAT checkpoint, the float parameters.

    Ignored on purpose: what `IGNORED` names, the optimizer state, and any other top-level key.

    Raises:
        UserError: the file is damaged, unsafe or of another kind; a tensor is unknown, missing, mis-shaped, not float32
            or not finite; or the head is not tied to the token embedding.
    """
    content = load_content(path)
    with errors_in(path):
        if content_kind(content) != "float":
            raise UserError("this is an int8 checkpoint; expected a float one")
        check_keys("the file", content, "model", "model_args", "iter_num", "best_val_loss", "config")
        check_plain("config", content["config"])
        tensors = without_prefix(content["model"], "model")
        ignored = {name for name in tensors if isinstance(name, str) and any(x.fullmatch(name) for x in IGNORED)}
        parameters = {name: tensor for name, tensor in tensors.items() if name not in ignored}
        arrays = checked_arrays(parameters, Path(path).stat().st_size)
        model = model_from_args(content["model_args"], arrays, f"{HIDDEN}.weight")
        check_depth(model, arrays)
        head = ("float32", (model.vocab_size, model.n_embd))
        check_layout(layout_of(arrays), float_layout(model) | {f"{HEAD}.weight": head})
        for name, array in arrays.items():
            check_finite(name, array)
        if not np.array_equal(arrays.pop(f"{HEAD}.weight"), arrays["transformer.wte.weight"]):
            raise UserError(f"{HEAD}.weight differs from transformer.wte.weight; expected a head tied to the embedding")
        return FloatCheckpoint(
            model=model,
            tensors=arrays,
            iter_num=_number(content, "iter_num", int),
            best_val_loss=_number(content, "best_val_loss", float),
            config=content["config"],
            vocabulary=_vocabulary(content.get(EXTRA_KEY)),
        )


def model_from_args(model_args: Any, arrays: Mapping[str, np.ndarray], hidden_name: str) -> ModelConfig:
    """The architecture of `model_args`, with the `mlp_ratio` that the matrix `hidden_name` has.

    Raises:
        UserError: a key is missing or unknown, a value is of the wrong type or range, or that matrix does not fit.
    """
    check_keys("model_args", model_args, *MODEL_ARGS)
    check_plain("model_args", model_args)
    unknown = sorted(map(str, set(model_args) - set(MODEL_ARGS)))
    if unknown:
        raise UserError(f"model_args has unknown keys {unknown}; it knows {sorted(MODEL_ARGS)}")
    fixed: dict[str, Any] = {"activation": "gelu", "layer_norm_epsilon": THEIR_EPSILON}
    model = ModelConfig(**model_args, mlp_ratio=1, **fixed)
    hidden = arrays.get(hidden_name)
    if hidden is None or hidden.ndim != 2 or len(hidden) % model.n_embd:
        found = "missing" if hidden is None else f"of shape {list(hidden.shape)}"
        raise UserError(f"{hidden_name} is {found}; expected [a multiple of {model.n_embd}, {model.n_embd}]")
    return dataclasses.replace(model, mlp_ratio=len(hidden) // model.n_embd)


def model_args_of(model: ModelConfig) -> dict[str, Any]:
    """The architecture in nanoGPT's words."""
    return {name: getattr(model, name) for name in MODEL_ARGS}


def check_expressible(model: ModelConfig) -> None:
    """Raises a UserError for what their checkpoints do not name: their code has one of each."""
    if model.activation != "gelu":
        raise UserError(f"model.activation={model.activation!r}, but picoGPT and nanoGPT compute 'gelu' only")
    if model.layer_norm_epsilon != THEIR_EPSILON:
        raise UserError(
            f"model.layer_norm_epsilon={model.layer_norm_epsilon}, but picoGPT and nanoGPT use {THEIR_EPSILON} only"
        )


def _number(content: Mapping[str, Any], key: str, kind: type) -> Any:
    """A number of the file; nanoGPT stores its best loss as a tensor of one element."""
    value = content[key]
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type == "cpu":
        value = value.item()
    if type(value) not in (int, float):
        raise UserError(f"{key} is {type(value).__name__}; expected a number")
    return kind(value)


def _vocabulary(extra: Any) -> Vocabulary | None:
    if extra is None:
        return None
    check_keys(EXTRA_KEY, extra, "vocabulary")
    check_plain(f"{EXTRA_KEY}.vocabulary", extra["vocabulary"])
    return vocabulary_from_json(extra["vocabulary"], f"{EXTRA_KEY}.vocabulary")
