"""Reads a Hugging Face GPT-2 folder: config.json and the float tensors, safetensors (sharded or not) or PyTorch's.

Half precision (float16, bfloat16) is widened to float32, which is exact. The architecture must be ours: what GPT-2's
code can also do (scores that are not scaled, cross-attention, an untied head) is refused with the reason. No tensor is
read before the headers agree with config.json, and every name is accounted for: `huggingface.hf_names` is the table,
`IGNORED` names what is left out.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (comes with JAX; NumPy then knows bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from picogpt_jax.config import ModelConfig
from picogpt_jax.errors import UserError, errors_in
from picogpt_jax.files import read_json
from picogpt_jax.formats.huggingface import hf_names
from picogpt_jax.int8.layout import (
    SAFETENSORS_DTYPES,
    check_depth,
    check_finite,
    check_layout,
    check_names_occur_once,
    float_layout,
    layout_of,
)

READ_AS = SAFETENSORS_DTYPES | {"F16": "float32", "BF16": "float32"}
CONFIG_FILE = "config.json"
TENSORS_FILE, INDEX_FILE, TORCH_FILE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
PREFIX = "transformer."  # of every tensor but the head's; a `GPT2Model` was saved without it
HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"
IGNORED = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, a buffer of old releases

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
    if (folder / INDEX_FILE).is_file() or (folder / TENSORS_FILE).is_file():
        tensors = _read_safetensors(folder, model)
    elif (folder / TORCH_FILE).is_file():
        with errors_in(folder / TORCH_FILE):
            tensors = _read_torch(folder / TORCH_FILE, model)
    else:
        raise UserError(f"{folder} has neither {TENSORS_FILE} nor {INDEX_FILE} nor {TORCH_FILE}; download the weights")
    with errors_in(folder):
        return _without_zero_biases(model, _ours(model, tensors))


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


def _read_safetensors(folder: Path, model: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors of all shards under our names; every header is checked before the first tensor is read."""
    shards = _shards(folder)
    stored: dict[str, tuple[Path, str]] = {}  # our name -> the file and its name there
    found = {}
    for path, names in shards.items():
        with errors_in(path):
            headers = _safetensors(path, None)
            if names is not None and set(headers) != names:
                raise UserError(f"it does not hold exactly the tensors that {INDEX_FILE} names; download it again")
        for name, header in headers.items():
            if (ours := _renamed(name)) in stored:
                raise UserError(f"{path}: {name} is stored twice")
            stored[ours], found[ours] = (path, name), header
    stored = {name: place for name, place in stored.items() if not IGNORED.fullmatch(name)}
    with errors_in(folder):
        _check({name: found[name] for name in stored}, model)
    tensors: dict[str, np.ndarray] = {}
    for path in shards:
        wanted = {place[1]: name for name, place in stored.items() if place[0] == path}
        with errors_in(path):
            tensors |= {wanted[name]: array for name, array in _safetensors(path, set(wanted)).items()}
    return tensors


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """The files that hold the tensors, and which tensors each must hold (None: whatever it does)."""
    if not (folder / INDEX_FILE).is_file():
        return {folder / TENSORS_FILE: None}
    index = read_json(folder / INDEX_FILE)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{folder / INDEX_FILE} has no weight_map of names to files; download it again")
    shards: dict[Path, set[str]] = {}
    for name, file in names.items():
        if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
            raise UserError(f"{folder / INDEX_FILE} names the file {str(file)[:80]!r}; expected one of {folder}")
        shards.setdefault(folder / file, set()).add(name)
    return {**shards}


def _safetensors(path: Path, names: set[str] | None) -> dict[str, Any]:
    """The tensors `names`, half precision as float32; or, for None, (dtype, shape) of all, as they will be."""
    try:
        with safe_open(path, framework="numpy") as file:
            if names is not None:
                return {name: _widened(file.get_tensor(name)) for name in names}
            check_names_occur_once(path)
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
            return {
                name: (READ_AS.get(header.get_dtype(), header.get_dtype()), tuple(header.get_shape()))
                for name, header in headers.items()
            }
    except (OSError, SafetensorError) as error:
        raise UserError(f"is no readable safetensors file ({error}); download it again") from None


def _widened(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.itemsize == 2 else array


def _read_torch(path: Path, model: ModelConfig) -> dict[str, np.ndarray]:
    from picogpt_jax.formats.torch_file import checked_arrays, load_content

    content = load_content(path)
    names = {_renamed(name): name for name in content}
    if len(names) < len(content):
        raise UserError(f"tensors are stored twice, with and without the prefix {PREFIX!r}")
    kept = {ours: content[name] for ours, name in names.items() if not IGNORED.fullmatch(ours)}
    tensors = checked_arrays(kept, path.stat().st_size, widen=True)
    _check(layout_of(tensors), model)
    return tensors


def _renamed(name: Any) -> str:
    """The name with the prefix, whether it was saved with it or not."""
    name = str(name)
    return name if name.startswith(PREFIX) or name == HEAD else PREFIX + name


def _check(found: Mapping[str, tuple[str, tuple[int, ...]]], model: ModelConfig) -> None:
    """The headers against the table; the tied head may be stored or not."""
    check_depth(model, found)
    shapes = float_layout(model)
    expected = {}
    for name, (theirs, transposed) in hf_names(model).items():
        dtype, shape = shapes[name]
        expected[theirs] = (dtype, shape[::-1] if transposed else shape)
    if HEAD in found:
        expected[HEAD] = shapes[TABLE]
    check_layout(found, expected)


def _ours(model: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name, array in tensors.items():
        check_finite(name, array)
    head = tensors.pop(HEAD, tensors[TABLE])
    if not np.array_equal(head, tensors[TABLE]):
        raise UserError(f"{HEAD} differs from {TABLE}; expected a head tied to the embedding")
    arrays = {}
    for name, (theirs, transposed) in hf_names(model).items():
        arrays[name] = np.ascontiguousarray(tensors[theirs].T if transposed else tensors[theirs])
    return arrays


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
