"""Reads the int8 folder for the NumPy runtime, with nothing but NumPy and the standard library.

It shares no code with `int8.folder`, which is the one that checks all.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from picogpt_jax.errors import UserError

Tensors = dict[str, npt.NDArray[Any]]
Model = TypeVar("Model")

DTYPES = {"I8": "<i1", "I16": "<i2", "I32": "<i4", "F32": "<f4"}


def read_folder(folder: str | os.PathLike[str], make: Callable[[dict[str, Any], Tensors], Model]) -> Model:
    """`make` of what config.json and model.safetensors hold.

    Raises:
        UserError: a file is missing or damaged, or `make` refuses what it holds.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return make(config, read_safetensors(folder / "model.safetensors"))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, OSError) else repr(error)[:200]
        raise UserError(f"{folder} is no int8 folder that can be read: {reason}; write the model again") from None


def read_safetensors(path: Path) -> Tensors:
    """The tensors of a safetensors file: 8 bytes header length, the header as JSON, then the raw little-endian data.

    Raises:
        UserError: a name occurs twice, or the tensors are not side by side up to the end of the file.
    """
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start], object_pairs_hook=_once)
    header.pop("__metadata__", None)
    tensors, end = {}, start
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = (start + offset for offset in entry["data_offsets"])
        if begin != end:
            raise UserError(
                f"model.safetensors: the data of {name:.80} do not follow the tensor before; write it again"
            )
        tensors[name] = np.frombuffer(content[begin:stop], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        end = stop
    if end != len(content):
        raise UserError(f"model.safetensors has {len(content)} bytes; its header expects {end:.0f}; write it again")
    return tensors


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in entries if names.count(name) > 1)
        raise UserError(f"model.safetensors holds {twice:.80} more than once; write it again")
    return entries
