"""Reads a Hugging Face GPT-2 folder: config.json and the float tensors, safetensors (sharded or not) or PyTorch's.

The architecture must be ours: what GPT-2's
code can also do (scores that are not scaled, cross-attention, an untied head) is refused with the reason. No tensor is
read before the headers agree with config.json; names and types are those of `gpt2_tensors`.
"""

import functools
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (comes with JAX; NumPy then knows bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from picogpt_jax.config import ModelConfig
from picogpt_jax.errors import UserError, errors_in, python_string
from picogpt_jax.files import read_json
from picogpt_jax.formats.gpt2_tensors import HEAD, POSITIONS, Stored, by_our_names, is_buffer, read_parameters
from picogpt_jax.int8.layout import SAFETENSORS_DTYPES, check_names_occur_once, shortened

READ_AS = SAFETENSORS_DTYPES | {"F16": "float32", "BF16": "float32"}
CONFIG_FILE = "config.json"
TENSORS_FILE, TORCH_FILE = "model.safetensors", "pytorch_model.bin"

# What an absent key means: the defaults of transformers' GPT2Config.
DEFAULTS: dict[str, Any] = {
    **{"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None},
    **{"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1},
    **{"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    **{"tie_word_embeddings": True, "quantization_config": None},
}
REQUIRED = {  # key -> (the only value that our model computes, what another one would mean)
    "scale_attn_weights": (True, "scores that are not divided by the square root of the head size"),
    "scale_attn_by_inverse_layer_idx": (False, "scores that are divided by the layer's number"),
    "add_cross_attention": (False, "cross-attention"),
    "tie_word_embeddings": (True, "a head that is not the token embedding"),
    "quantization_config": (None, "quantized weights"),
}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


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
        found = by_our_names(*files)
        _check_heads(folder, found)
        return _without_zero_biases(model, read_parameters(model, found, in_by_out=True))


def _model(config: Any) -> ModelConfig:
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != "gpt2":
        raise UserError(f"model_type is {found!r}; expected 'gpt2', the one architecture that is computed here")
    config = DEFAULTS | config
    for key, (expected, meaning) in REQUIRED.items():
        if config[key] != expected:
            raise UserError(f"{key} is {config[key]!r}, {meaning}; expected {expected!r}: no other is computed")
    activation = config["activation_function"]
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(f"activation_function is {activation!r}; expected one of {sorted(ACTIVATIONS)}")
    width, hidden = config["n_embd"], config["n_inner"]
    if hidden is None:
        mlp_ratio = 4
    elif type(hidden) is int and type(width) is int and width > 0 and hidden % width == 0:
        mlp_ratio = hidden // width
    else:
        raise UserError(f"n_inner is {hidden!r}; expected a multiple of n_embd={width!r}")
    return ModelConfig(
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        n_embd=width,
        block_size=config["n_positions"],
        vocab_size=config["vocab_size"],
        mlp_ratio=mlp_ratio,
        bias=True,
        activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
        layer_norm_epsilon=config["layer_norm_epsilon"],
        dropout=config["resid_pdrop"],
    )


def _check_heads(folder: Path, found: Mapping[str, Stored]) -> None:
    """Refuses a GPT-2 with another head, such as a classifier's, before its names are called unknown."""
    heads = sorted(
        tensor.name for name, tensor in found.items() if not name.startswith("transformer.") and name != HEAD
    )
    if heads and POSITIONS in found:
        code = "from transformers import GPT2LMHeadModel as m; "
        code += f"m.from_pretrained({python_string(folder)}).save_pretrained({python_string(f'{folder.name}-lm')})"
        raise UserError(
            f"a GPT-2 with another head, {shortened(heads, 1)}, which is not computed here; write it without: "
            f"python -c {shlex.quote(code)}"
        )


def _stored(folder: Path) -> list[dict[str, Stored]]:
    """What each file of the folder stores."""
    for name, read in ((TENSORS_FILE, _safetensors), (TORCH_FILE, _torch)):
        if (folder / f"{name}.index.json").is_file():
            shards = _shards(folder, folder / f"{name}.index.json")
        elif (folder / name).is_file():
            shards = {folder / name: None}
        else:
            continue
        files = []
        for path, names in shards.items():
            with errors_in(path):
                files.append(read(path))
                if names is not None and not all(map(is_buffer, names ^ set(files[-1]))):
                    raise UserError(
                        f"it does not hold exactly the tensors that {name}.index.json names; download it again"
                    )
        return files
    raise UserError(
        f"{folder} has neither {TENSORS_FILE} nor {TORCH_FILE}, nor an index of several; download the weights"
    )


def _shards(folder: Path, index_file: Path) -> dict[Path, set[str] | None]:
    """The files that hold the tensors, and which tensors each must hold."""
    index = read_json(index_file)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index_file} has no weight_map of names to files; download it again")
    shards: dict[Path, set[str]] = {}
    for name, file in names.items():
        if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
            raise UserError(f"{index_file} names the file {str(file)[:80]!r}; expected one of {folder}")
        shards.setdefault(folder / file, set()).add(name)
    return {**shards}


def _safetensors(path: Path) -> dict[str, Stored]:
    try:
        file = safe_open(path, framework="numpy")
        check_names_occur_once(path)
        headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"is no readable safetensors file ({error}); download it again") from None
    stored = {}
    for name, header in headers.items():
        layout = (READ_AS.get(header.get_dtype(), header.get_dtype()), tuple(header.get_shape()))
        stored[name] = Stored(name, layout, functools.partial(_array, file, name))
    return stored


def _array(file: Any, name: str) -> np.ndarray:
    array = file.get_tensor(name)
    return array.astype(np.float32) if array.itemsize == 2 else array


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
    return (
        ModelConfig(**{**vars(model), "bias": False}),
        {name: array for name, array in arrays.items() if name not in biases},
    )
