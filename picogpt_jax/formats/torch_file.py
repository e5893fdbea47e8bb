"""PyTorch's `.pt` container: tensors and plain values, read without running what a file may hold (extra: torch).

A `.pt` file is a zip of a pickle and raw tensors. It is read with `weights_only=True`, which builds tensors and plain
values and runs nothing else; before that, the zip must declare no more bytes than the file has. `torch_checkpoint`
(float) and `torch_int8_checkpoint` know what the keys mean, and account for every one.
"""

import functools
import os
import shlex
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

try:
    import torch as torch  # for those that import it from here, too
except ImportError as error:
    raise ImportError("this needs PyTorch; install it with: pip install 'picogpt_jax[torch]'") from error

from picogpt_jax.errors import UserError, python_string, reason
from picogpt_jax.files import atomic_path
from picogpt_jax.formats.gpt2_tensors import POSITIONS, is_buffer, our_name
from picogpt_jax.int8.layout import Stored, shortened

OLDEST_SAFE_TORCH = (2, 10)
EXTRA_KEY = "picogpt_jax"  # of a file's dict: what the layouts of nanoGPT and picoGPT have no place for
OLD_START = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # of a file before PyTorch 1.6: its magic number, pickled
MAX_PLAIN_VALUES = 1 << 20

CheckpointKind = Literal["torch-float", "torch-int8", "picogpt-int8"]


def is_torch_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is, or by its name means to be, a PyTorch file; loading a damaged one says what is wrong."""
    path = Path(path)
    try:
        by_name = path.is_file() and path.suffix in (".pt", ".pth")
        return by_name or any(record.filename.endswith("/data.pkl") for record in _records(path))
    except UserError:
        return False


def checkpoint_kind(content: Mapping[Any, Any], path: str | os.PathLike[str]) -> CheckpointKind:
    """Which layout has what `load_content` returned of `path`: a float one, our int8 one, or picoGPT's own.

    Raises:
        UserError: it has none of them.
    """
    if "model_state_dict" in content and "quantization_type" in content:
        return "torch-int8" if EXTRA_KEY in content else "picogpt-int8"
    if "model" in content:
        return "torch-float"
    if POSITIONS in {our_name(name) for name in content if isinstance(name, str)}:
        advice = rewriting(path, "x = dict(model=x, model_args=dict(n_head=N_HEAD))")
        raise UserError(f"{path} is a bare state dict, which does not tell the number of heads; {advice}")
    raise UserError(
        f"{path} is no model that is known: it has the keys {shortened(sorted(map(str, content)))}; expected model and "
        "model_args, as nanoGPT's ckpt.pt has them, or picoGPT's model_state_dict and quantization_type"
    )


def rewriting(path: str | os.PathLike[str], change: str, new: str | os.PathLike[str] | None = None) -> str:
    """Advice: a command that writes a file again, after a change of its content x (without single quotes).

    Args:
        new: where to; None: into the working folder, under a name of its own.
    """
    new = f"{Path(path).stem}.fixed.pt" if new is None else new
    load, save = f"t.load({python_string(path)}, weights_only=True)", f"t.save(x, {python_string(new)})"
    return f"write it again with: python -c {shlex.quote(f'import torch as t; x = {load}; {change}; {save}')}"


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
    _check_archive(Path(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a malformed pickle may raise anything: UnpicklingError, RuntimeError, KeyError, ...
        raise UserError(_why_not_loaded(path, error)) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a dict")
    return content


def _why_not_loaded(path: str | os.PathLike[str], error: Exception) -> str:
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it is so damaged that not even the names in it can be listed
        foreign = []
    if not foreign:
        return f"{path} cannot be read as tensors and plain values ({type(error).__name__}): it is damaged"
    return (
        f"{path} holds a Python object, {ascii(foreign[0])[1:-1][:60]}; these are never loaded: they can run code; "
        "where it was made, save instead: torch.save({'model': model.state_dict(), 'model_args': vars(model.config) | "
        "{'activation': 'gelu_tanh'}}, 'ckpt.pt') ('gelu': the exact one)"
    )


def save_content(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the file, atomically; the same content gives the same bytes."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)  # into an open file, so that its name is not part of the content


def stored_tensors(where: str, tensors: Any, file_size: int) -> dict[str, Stored]:
    """The tensors of a state dict, half precision as float32; buffers are left out.

    Views can repeat a few stored bytes without end, so their sizes are bounded before one is read.

    Raises:
        UserError: it is no dict, something in it is no plain tensor under a name, or all are larger than the file.
    """
    check_keys(where, tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if not is_buffer(name)}
    stored = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{ascii(name)[:80]} is a {type(tensor).__name__}; expected a tensor under a name")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{name} is {tensor.layout} on {tensor.device}; expected a plain tensor on the CPU")
        dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
        read = functools.partial(_array, tensor, dtype)
        stored[name] = Stored(name, (str(dtype).removeprefix("torch."), tuple(tensor.shape)), read)
    declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if declared > 2 * file_size:  # tied tensors are stored once and named twice
        raise UserError(f"the tensors declare {declared} bytes in a file of {file_size}; it is not loaded")
    return stored


def _array(tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format).numpy()


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
    except Exception as error:  # a malformed table may raise anything: BadZipFile, struct.error, ...
        raise UserError(
            f"{path} is no PyTorch checkpoint, or is truncated ({reason(error)}); save the model again"
        ) from None


def _check_archive(path: Path) -> None:
    """PyTorch stores its records uncompressed: together they cannot be larger than the file, or this is a zip bomb.

    In its older format the pickle says how much memory to fill, and with what.
    """
    if path.is_file():
        with path.open("rb") as file:
            is_old = file.read(len(OLD_START)) == OLD_START
        if is_old:
            raise UserError(
                f"{path} is in the format that PyTorch wrote before 1.6, which is not read here; take the model's "
                f"safetensors file, or, if you trust this one, {rewriting(path, 'pass', path)}"
            )
    records = _records(path)
    declared, size = sum(record.file_size for record in records), path.stat().st_size
    if declared > size or any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise UserError(
            f"{path} has {size} bytes but declares {declared}, or is compressed; PyTorch writes neither: not loaded"
        )
