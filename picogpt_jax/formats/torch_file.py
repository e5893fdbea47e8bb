"""PyTorch's `.pt` container: tensors and plain values, read without running what a file may hold (extra: torch).

A `.pt` file is a zip of a pickle and raw tensors. It is read with `weights_only=True`, which builds tensors and plain
values and runs nothing else; before that, the zip must declare no more bytes than the file has. `torch_checkpoint`
(float) and `torch_int8_checkpoint` know what the keys mean, and account for every one.
"""

import json
import os
import shlex
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError("this needs PyTorch; install it with: pip install 'picogpt_jax[torch]'") from error

from picogpt_jax.errors import UserError, errors_in
from picogpt_jax.files import atomic_path

OLDEST_SAFE_TORCH = (2, 10)
EXTRA_KEY = "picogpt_jax"  # of a file's dict: what the layouts of nanoGPT and picoGPT have no place for
DTYPES = (torch.float32, torch.int8, torch.int64)
HALF = (torch.float16, torch.bfloat16)
OLD_START = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # of a file before PyTorch 1.6: its magic number, pickled
MAX_PLAIN_VALUES = 1 << 20
COMPILED_PREFIX = "_orig_mod."  # torch.compile puts it in front of every key

CheckpointKind = Literal["float", "int8", "picogpt-int8"]


def is_torch_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is, or by its name means to be, a PyTorch file; loading a damaged one says what is wrong."""
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix in (".pt", ".pth"):
        return True
    try:
        return any(record.filename.endswith("/data.pkl") for record in _records(path))
    except UserError:
        return False


def checkpoint_kind(path: str | os.PathLike[str]) -> CheckpointKind:
    """Which layout the file has: a float one, our int8 one, or that of picoGPT's own quantization.

    Raises:
        UserError: it has none of them, or is damaged or unsafe.
    """
    content = load_content(path)
    with errors_in(path):
        return content_kind(content)


def content_kind(content: Mapping[Any, Any]) -> CheckpointKind:
    """`checkpoint_kind` of what `load_content` returned."""
    if "model_state_dict" in content and "quantization_type" in content:
        return "int8" if EXTRA_KEY in content else "picogpt-int8"
    if "model" in content and "model_args" in content:
        return "float"
    raise UserError(f"it has the keys {sorted(map(str, content))}; expected picoGPT's int8 file or nanoGPT's ckpt.pt")


def load_content(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Reads tensors and plain values, and nothing else; tensors stay on disk until they are used.

    Raises:
        UserError: the file is missing, damaged, unsafe, or holds anything but a dict.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_SAFE_TORCH:
        raise UserError(
            f"torch {torch.__version__} can be made to run code by a .pt file (CVE-2026-24747); install torch >= 2.10"
        )
    _check_not_old(Path(path))
    _check_archive(Path(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a malformed pickle may raise anything: UnpicklingError, RuntimeError, KeyError, ...
        raise UserError(
            f"{path} cannot be read as tensors and plain values ({type(error).__name__}): it is damaged, or holds "
            "other Python objects, which are never loaded because they can run code; save the model again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a dict")
    return content


def save_content(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the file, atomically; the same content gives the same bytes."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)  # into an open file, so that its name is not part of the content


def checked_arrays(tensors: Mapping[Any, Any], file_size: int, widen: bool = False) -> dict[str, np.ndarray]:
    """The tensors in memory. Views can repeat a few stored bytes without end, so their sizes are bounded first.

    Args:
        widen: half precision is read too, as float32, which is exact; else it is refused.

    Raises:
        UserError: something is no tensor, of another type, or larger than the file can be.
    """
    dtypes = DTYPES + HALF * widen
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{name!r} is a {type(tensor).__name__}; expected a tensor under a name")
        if tensor.dtype not in dtypes or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{name} is {tensor.dtype} ({tensor.layout}); expected one of {dtypes}")
    declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if declared > 2 * file_size:  # tied tensors are stored once and named twice
        raise UserError(f"the tensors declare {declared} bytes in a file of {file_size}; it is not loaded")
    arrays = {}
    for name, tensor in tensors.items():
        dtype = torch.float32 if tensor.dtype in HALF else tensor.dtype
        arrays[name] = tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format).numpy()
    return arrays


def without_prefix(tensors: Any, where: str) -> dict[Any, Any]:
    """The tensors without torch.compile's prefix.

    Raises:
        UserError: it is no dict, or a name is there with and without the prefix.
    """
    check_keys(where, tensors)
    renamed = {name.removeprefix(COMPILED_PREFIX) if isinstance(name, str) else name: x for name, x in tensors.items()}
    if len(renamed) < len(tensors):
        raise UserError(f"tensors occur twice, with and without the prefix {COMPILED_PREFIX!r}")
    return renamed


def check_plain(name: str, value: Any) -> None:
    """Numbers, strings, None, dicts and lists of them; bounded, as a few nested lists can stand for billions."""
    pending, seen = [value], 0
    while pending:
        item = pending.pop()
        seen += 1
        if seen + len(pending) > MAX_PLAIN_VALUES:
            raise UserError(f"{name} has more than {MAX_PLAIN_VALUES} values; it is not loaded")
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            pending += item
        elif type(item) not in (bool, int, float, str, type(None)):
            raise UserError(f"{name} holds a {type(item).__name__}; expected plain values")


def check_keys(where: str, found: Any, *expected: str) -> None:
    """Raises a UserError if `found` is no dict, or lacks a key."""
    if not isinstance(found, dict):
        raise UserError(f"{where} is a {type(found).__name__}; expected a dict")
    missing = [key for key in expected if key not in found]
    if missing:
        raise UserError(f"{where} lacks the keys {missing}")


def _records(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (
        Exception
    ) as error:  # a malformed table may raise anything: BadZipFile, UnicodeDecodeError, struct.error, ...
        raise UserError(f"{path} is no PyTorch checkpoint, or is truncated ({error}); save the model again") from None


def _check_not_old(path: Path) -> None:
    """Refuses PyTorch's older format: how much memory to fill, and with what, its pickle says, not the file's size."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        is_old = file.read(len(OLD_START)) == OLD_START
    if is_old:
        name = json.dumps(str(path), ensure_ascii=False)
        code = f"import torch; name = {name}; torch.save(torch.load(name, weights_only=True), name)"
        raise UserError(
            f"{path} is in the format that PyTorch wrote before 1.6, which is not read here; take the model's "
            f"safetensors file, or, if you trust this one, write it again: python -c {shlex.quote(code)}"
        )


def _check_archive(path: Path) -> None:
    """PyTorch stores its records uncompressed: together they cannot be larger than the file, or this is a zip bomb."""
    records = _records(path)
    declared, size = sum(record.file_size for record in records), path.stat().st_size
    if declared > size or any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise UserError(
            f"{path} has {size} bytes but declares {declared}, or is compressed; PyTorch writes neither: not loaded"
        )
