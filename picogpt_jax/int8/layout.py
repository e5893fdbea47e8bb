"""Which tensors a model's file holds: names, dtypes and shapes, and the checks that account for every one of them.

The names are nanoGPT's and matrices are [out, in], here and in every file that is read or written.
"""

import functools
import json
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from picogpt_jax.config import Granularity, ModelConfig
from picogpt_jax.errors import UserError, reason

# What a file holds: tensor name -> (dtype as numpy spells it, shape).
Layout = Mapping[str, tuple[str, tuple[int, ...]]]
# safetensors' names of types -> numpy's.
SAFETENSORS_DTYPES = {"I8": "int8", "I16": "int16", "I32": "int32", "F32": "float32"}


class Stored(NamedTuple):
    """A tensor of a file, which is read when it is needed."""

    name: str  # in the file
    layout: tuple[str, tuple[int, ...]]  # the type as numpy spells it, when it is read
    read: Callable[[], np.ndarray]


def int8_layout(model: ModelConfig, granularity: Granularity) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What `model.safetensors` holds, complete: tensor name -> (dtype, shape)."""
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in model.matrix_shapes().items():
        layout[f"{name}.weight"] = ("int8", shape)
        layout[f"{name}.weight_scale"] = ("float32", (shape[0] if granularity == "per_channel" else 1, 1))
    return layout | {name: ("float32", shape) for name, shape in model.vector_shapes().items()}


def float_layout(model: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The float parameters under nanoGPT's names, matrices [out, in], without the tied head: name -> (dtype, shape)."""
    matrices = {f"{name}.weight": shape for name, shape in model.matrix_shapes().items()}
    return {name: ("float32", shape) for name, shape in (matrices | model.vector_shapes()).items()}


def layout_of(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The layout that these tensors have."""
    return {name: (str(array.dtype), array.shape) for name, array in arrays.items()}


def check_layout(found: Layout, expected: Layout) -> None:
    """Total accounting: the same names, and each with the same dtype and shape.

    Raises:
        UserError: it names what is unknown and missing, or the first tensor that differs.
    """
    unknown, missing = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    if unknown or missing:
        raise UserError(f"unknown tensors: {shortened(unknown)}; missing tensors: {shortened(missing)}")
    for name, (dtype, shape) in expected.items():
        if found[name] != (dtype, shape):
            found_dtype, found_shape = found[name]
            raise UserError(f"{name} is {found_dtype} {list(found_shape)!s:.80}; expected {dtype} {list(shape)}")


def check_depth(model: ModelConfig, found: Mapping[str, Any]) -> None:
    """Refuses a depth that the tensors cannot fill, before a table of that many layers is made."""
    if model.n_layer > len(found):
        raise UserError(f"model.n_layer={model.n_layer}, but there are only {len(found)} tensors")


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises a UserError if a value of the tensor is infinite or not a number."""
    if not np.isfinite(array).all():
        raise UserError(f"{name} holds values that are not finite; expected finite float32 values")


def stored_in_safetensors(path: Path, dtypes: Mapping[str, str] = SAFETENSORS_DTYPES) -> dict[str, Stored]:
    """What a safetensors file holds, by name, half precision as float32 where `dtypes` says so, which is exact.

    Raises:
        UserError: it is damaged (its header's sizes are not those of the file), or a name occurs twice.
    """
    try:
        file = safe_open(path, framework="numpy")
        _check_names_occur_once(path)
        headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"is no readable safetensors file ({reason(error)}); write or download it again") from None
    stored = {}
    for name, header in headers.items():
        layout = (dtypes.get(header.get_dtype(), header.get_dtype()), tuple(header.get_shape()))
        stored[name] = Stored(name, layout, functools.partial(_array, file, name, layout[0]))
    return stored


def _array(file: Any, name: str, dtype: str) -> np.ndarray:
    array: np.ndarray = file.get_tensor(name)
    return array.astype(np.float32, copy=False) if dtype == "float32" else array


def read_as(layout: Layout, found: Mapping[str, Stored]) -> dict[str, np.ndarray]:
    """Reads the tensors, when their names, types and shapes have turned out to be exactly those of `layout`.

    Raises:
        UserError: it names what is unknown and missing, or the first tensor that differs or is not finite.
    """
    theirs = {ours: tensor.name for ours, tensor in found.items()}
    check_layout(
        {tensor.name: tensor.layout for tensor in found.values()},
        {theirs.get(ours, ours): entry for ours, entry in layout.items()},
    )
    arrays = {name: tensor.read() for name, tensor in found.items()}
    for name, array in arrays.items():
        if array.dtype.kind == "f":
            check_finite(theirs[name], array)
    return arrays


def _check_names_occur_once(path: Path) -> None:
    """safetensors keeps the last of two entries with one name; we refuse both."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        pairs = json.loads(file.read(length), object_pairs_hook=list)
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise UserError(f"tensors stored more than once: {shortened(repeated)}")


def shortened(names: Iterable[str], limit: int = 3) -> str:
    """The first of these names, for a message of one line."""
    names = [f"{name:.80}" for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more
