"""Reads and writes the int8 folder of both versions; README.md beside this file specifies it.

Nothing here needs more than numpy and safetensors.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from picogpt_jax.config import ModelConfig
from picogpt_jax.errors import UserError, errors_in
from picogpt_jax.files import atomic_folder, read_json, write_json
from picogpt_jax.int8.int8_model import (
    FORMAT,
    FORMAT_VERSION,
    Int8Model,
    Int8Tensor,
    check_version,
    config_from_json,
    config_to_json,
)
from picogpt_jax.int8.integer_model import (
    INTEGER_VERSION,
    IntegerModel,
    integer_config_from_json,
    integer_config_to_json,
    integer_layout,
)
from picogpt_jax.int8.layout import Layout, check_depth, int8_layout, read_as, stored_in_safetensors
from picogpt_jax.text.reading import load_vocabulary

TENSORS_FILE, CONFIG_FILE, VOCABULARY_FILE = "model.safetensors", "config.json", "vocab.json"


def save_int8_model(model: Int8Model | IntegerModel, folder: str | os.PathLike[str]) -> None:
    """Writes the folder in one step; an existing one is replaced as a whole.

    Raises:
        UserError: `folder` is a file or cannot be written.
    """
    if isinstance(model, IntegerModel):
        config, tensors = integer_config_to_json(model), model.tensors
    else:
        config, tensors = config_to_json(model), model.tensors()
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / TENSORS_FILE, metadata={"format": "pt"})
        write_json(temporary / CONFIG_FILE, config)
        write_json(temporary / VOCABULARY_FILE, model.vocabulary.to_json())


def load_int8_model(folder: str | os.PathLike[str]) -> Int8Model | IntegerModel:
    """Reads and checks the folder; no tensor is read before its header agrees with `config.json`.

    Returns:
        what the version says: an `Int8Model` for 1, an `IntegerModel` for 2.

    Raises:
        UserError: a file is missing, damaged, or of another format or version, or anything in it is not as it must be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected one with {TENSORS_FILE}, {CONFIG_FILE}, {VOCABULARY_FILE}")
    version, config = stored_version(folder), read_json(folder / CONFIG_FILE)
    if version == INTEGER_VERSION:
        return _load_integer(folder, config)
    with errors_in(folder / CONFIG_FILE):
        model, quantization, training = config_from_json(config)
    vocabulary = load_vocabulary(folder / VOCABULARY_FILE)
    tensors = _read_tensors(folder, model, lambda: int8_layout(model, quantization.weight_granularity))
    with errors_in(folder):
        return Int8Model(
            model=model,
            quantization=quantization,
            training=training,
            vocabulary=vocabulary,
            matrices={
                name: Int8Tensor(tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"])
                for name in model.matrix_shapes()
            },
            vectors={name: tensors[name] for name in model.vector_shapes()},
        )


def _load_integer(folder: Path, config: Any) -> IntegerModel:
    with errors_in(folder / CONFIG_FILE):
        model, granularity, training = integer_config_from_json(config)
    vocabulary = load_vocabulary(folder / VOCABULARY_FILE)
    tensors = _read_tensors(folder, model, lambda: integer_layout(model, granularity))
    with errors_in(folder):
        return IntegerModel(
            model=model, weight_granularity=granularity, training=training, vocabulary=vocabulary, tensors=tensors
        )


def _read_tensors(folder: Path, model: ModelConfig, layout: Callable[[], Layout]) -> dict[str, np.ndarray]:
    with errors_in(folder / TENSORS_FILE):
        found = stored_in_safetensors(folder / TENSORS_FILE)
        check_depth(model, found)
        return read_as(layout(), found)


def stored_version(folder: str | os.PathLike[str]) -> int:
    """The format version of an int8 folder: 1 for mixed arithmetic, 2 for integers.

    Raises:
        UserError: config.json is missing or damaged, or says another format or version.
    """
    path = Path(folder) / CONFIG_FILE
    config = read_json(path)
    with errors_in(path):
        return check_version(config, FORMAT_VERSION, INTEGER_VERSION)


def is_int8_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` means to be an int8 folder; a damaged one counts, so that loading it can say what is wrong."""
    path = Path(path)
    if not (path / CONFIG_FILE).is_file():
        return False
    try:
        config = read_json(path / CONFIG_FILE)
    except UserError:
        return (path / TENSORS_FILE).is_file()
    return isinstance(config, dict) and config.get("format") == FORMAT


def file_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes on disk of the three files of an int8 folder."""
    return sum((Path(folder) / name).stat().st_size for name in (TENSORS_FILE, CONFIG_FILE, VOCABULARY_FILE))
