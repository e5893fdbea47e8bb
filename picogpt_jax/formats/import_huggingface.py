"""Reads a Hugging Face GPT-2 folder: config.json and the float tensors, safetensors (sharded or not) or PyTorch's.

The architecture must be ours: what GPT-2's code can also do (scores that are not scaled, cross-attention, an untied
head) is refused with the reason. No tensor is read before the headers agree with config.json.
"""

import dataclasses
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (comes with JAX; NumPy then knows bfloat16)
import numpy as np

from picogpt_jax.config import Activation, ModelConfig
from picogpt_jax.errors import UserError, errors_in, python_string
from picogpt_jax.files import read_json
from picogpt_jax.formats.gpt2_tensors import HEAD, POSITIONS, is_buffer, read_parameters, renamed
from picogpt_jax.int8.layout import SAFETENSORS_DTYPES, Stored, shortened, stored_in_safetensors

READ_AS = SAFETENSORS_DTYPES | {"F16": "float32", "BF16": "float32"}
CONFIG_FILE = "config.json"
TENSORS_FILE, TORCH_FILE = "model.safetensors", "pytorch_model.bin"

REQUIRED = {  # key -> (the only value that our model computes, what another one would mean)
    "scale_attn_weights": (True, "scores that are not divided by the square root of the head size"),
    "scale_attn_by_inverse_layer_idx": (False, "scores that are divided by the layer's number"),
    "add_cross_attention": (False, "cross-attention"),
    "tie_word_embeddings": (True, "a head that is not the token embedding"),
    "quantization_config": (None, "quantized weights"),
}
# What an absent key means: the defaults of transformers' GPT2Config.
DEFAULTS: dict[str, Any] = {
    **{"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None},
    **{"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1},
    **{key: value for key, (value, _) in REQUIRED.items()},
}
ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


def is_huggingface_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` means to be a Hugging Face folder: its config.json names a `model_type`."""
    path = Path(path) / CONFIG_FILE
    try:
        return path.is_file() and "model_type" in read_json(path)
    except (UserError, TypeError):
        return False


def load_huggingface(folder: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Reads the folder.

    `dropout` is `resid_pdrop`: here there is one rate. A model whose every bias is zero is one without biases.

    Returns:
        the architecture, and float32 tensors under nanoGPT's names, matrices [out, in], without the tied head.

    Raises:
        UserError: a file is missing or damaged, the architecture is not ours, or a tensor is unknown, missing,
            mis-shaped, of no float type up to float32 or not finite.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_FILE)
    with errors_in(folder / CONFIG_FILE):
        model = _model(config)
    files = _stored(folder)
    with errors_in(folder):
        found = renamed(*files)
        _check_heads(folder, found)
        return _without_zero_biases(model, read_parameters(model, found, in_by_out=True))


def _model(config: Any) -> ModelConfig:
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != "gpt2":
        raise UserError(f"model_type is {found!r:.60}; expected 'gpt2', the one architecture that is computed here")
    config = DEFAULTS | config
    for key, (expected, meaning) in REQUIRED.items():
        if config[key] != expected:
            raise UserError(f"{key} is {config[key]!r:.60}, {meaning}; expected {expected!r}: no other is computed")
    activation = config["activation_function"]
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(f"activation_function is {activation!r:.60}; expected one of {sorted(ACTIVATIONS)}")
    width, hidden = config["n_embd"], config["n_inner"]
    if hidden is None:
        mlp_ratio = 4
    elif type(hidden) is int and type(width) is int and width > 0 and hidden % width == 0:
        mlp_ratio = hidden // width
    else:
        raise UserError(f"n_inner is {hidden!r:.60}; expected a multiple of n_embd={width!r:.60}")
    same = {name: config[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size", "layer_norm_epsilon")}
    same |= {"block_size": config["n_positions"], "dropout": config["resid_pdrop"]}
    return ModelConfig(**same, mlp_ratio=mlp_ratio, bias=True, activation=ACTIVATIONS[activation])


def _check_heads(folder: Path, found: Mapping[str, Stored]) -> None:
    """Refuses a GPT-2 with another head, such as a classifier's, before its names are called unknown."""
    heads = sorted(found[name].name for name in found if not name.startswith("transformer.") and name != HEAD)
    if heads and POSITIONS in found:
        code = "from transformers import GPT2LMHeadModel as m; "
        code += f"m.from_pretrained({python_string(folder)}).save_pretrained({python_string(f'{folder.name}-lm')})"
        raise UserError(
            f"a GPT-2 with another head, {shortened(heads, 1)}, which is not computed here; write it without: "
            f"python -c {shlex.quote(code)}"
        )


def _stored(folder: Path) -> list[dict[str, Stored]]:
    """What each file of the folder stores."""
    for name in (TENSORS_FILE, TORCH_FILE):
        files = []
        for path, names in _shards(folder, name).items():
            with errors_in(path):
                files.append(stored_in_safetensors(path, READ_AS) if name == TENSORS_FILE else _torch(path))
                if names and not all(map(is_buffer, names ^ set(files[-1]))):
                    raise UserError(f"it does not hold exactly the tensors of {name}.index.json; download it again")
        if files:
            return files
    raise UserError(f"{folder} has neither {TENSORS_FILE} nor {TORCH_FILE}, nor an index of several; download one")


def _shards(folder: Path, tensors_file: str) -> dict[Path, set[str]]:
    """The files that hold the tensors, and which tensors each must hold, where there is an index that tells."""
    index_file = folder / f"{tensors_file}.index.json"
    if not index_file.is_file():
        return {folder / tensors_file: set()} if (folder / tensors_file).is_file() else {}
    index = read_json(index_file)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index_file} has no weight_map of names to files; download it again")
    present = os.listdir(folder)
    shards: dict[Path, set[str]] = {}
    for name, file in names.items():
        if file not in present:
            raise UserError(f"{index_file} names the file {file!r:.80}; expected one of {folder}")
        shards.setdefault(folder / file, set()).add(name)
    return shards


def _torch(path: Path) -> dict[str, Stored]:
    from picogpt_jax.formats.torch_file import load_content, stored_tensors

    return stored_tensors("it", load_content(path), path.stat().st_size)


def _without_zero_biases(
    model: ModelConfig, arrays: dict[str, np.ndarray]
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """GPT-2 always stores biases; where each is zero, bit for bit, the model has none."""
    biases = {name for name in arrays if name.endswith(".bias")}
    if any(arrays[name].tobytes().strip(b"\0") for name in biases):
        return model, arrays
    return dataclasses.replace(model, bias=False), {name: arrays[name] for name in arrays if name not in biases}
