"""What a checkpoint must hold: the name, shape, type and checksum of every array, sealed together with its meta data.

The checksum is of the array's bits, not of a file's: it is the same on any mesh, from a device to the disk and back.
"""

import functools
import json
import math
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax
from jaxtyping import Array, UInt32

from picogpt_jax.devices.distributed import AgreedError
from picogpt_jax.devices.setup import TWO_STAGE_SUM_PASS
from picogpt_jax.errors import UserError
from picogpt_jax.files import read_json

Manifest = dict[str, dict[str, Any]]  # name of an array -> {"shape", "dtype", "checksum"}
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # bytes of an element -> its bits
_NAMES_SHOWN = 8


class MisfitError(AgreedError):
    """A checkpoint holds another tree than the one asked for: no damage, and no reason to go back to an older one."""


@jax.jit
def checksum(array: Array) -> UInt32[Array, ""]:
    """The sum of every element's bits times an odd number made of its position, modulo 2**32.

    An odd number has an inverse, so one changed element always changes the sum; addition modulo 2**32 is exact in any
    order, so the sum does not depend on how the array is split.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.zeros(array.shape, jnp.uint32)
    for dim, size in enumerate(array.shape):
        position = position * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, array.shape, dim)
    for factor, shift in ((0x7FEB352D, 15), (0x846CA68B, 16)):  # neighbours get numbers that have nothing in common
        position = (position ^ (position >> shift)) * jnp.uint32(factor)
    return jnp.sum(bits * (position | jnp.uint32(1)), dtype=jnp.uint32)


@functools.cache
def compiled_checksums() -> Any:
    """Name -> array to name -> checksum, in one program that needs no memory beside the arrays.

    Several programs with sums over devices, under way at once on CPU, can wait for each other's threads. XLA for CPU
    would write down every product, as large as its array, to add them up in windows.
    """
    options = {"xla_disable_hlo_passes": TWO_STAGE_SUM_PASS} if jax.default_backend() == "cpu" else None
    return jax.jit(lambda arrays: jax.tree.map(checksum, arrays), compiler_options=options)


def manifest(state: Any) -> Manifest:
    """Describes every array of a tree. In several processes all must ask, because all compute it."""
    names = _names(state)
    sums = compiled_checksums()(names)
    return {
        name: {
            "shape": list(np.shape(array)),
            "dtype": str(jax.dtypes.canonicalize_dtype(array.dtype)),
            "checksum": int(np.asarray(sums[name])),
        }
        for name, array in names.items()
    }


def check_fits(stored: Manifest, abstract_state: Any, where: object) -> None:
    """Compares names, shapes and types with those of a tree of `jax.ShapeDtypeStruct`.

    Raises:
        MisfitError: with the names that are missing, unexpected or of another shape or type.
    """
    wanted = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in _names(abstract_state).items()}
    found = {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in stored.items()}
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape or type": [
            f"{name} ({_describe(*found[name])} there, {_describe(*wanted[name])} here)"
            for name in wanted
            if name in found and found[name] != wanted[name]
        ],
    }
    texts = [f"{kind}: {_shortened(names)}" for kind, names in problems.items() if names]
    if texts:
        raise MisfitError(f"checkpoint {where} does not fit: {'; '.join(texts)}")


def check_unchanged(stored: Manifest, state: Any, where: object) -> None:
    """Compares the arrays of a tree with their checksums; all processes compute them, and find the same.

    Raises:
        AgreedError: with the names of those that differ.
    """
    changed = [name for name, entry in manifest(state).items() if entry["checksum"] != stored[name]["checksum"]]
    if changed:
        raise AgreedError(f"checkpoint {where} is damaged: not the numbers that were saved: {_shortened(changed)}")


def seal(meta: dict[str, Any], arrays: Manifest) -> dict[str, Any]:
    """Meta data and manifest as one JSON object that shows when it was changed."""
    content = {"meta": meta, "arrays": arrays}
    return {**content, "crc32": _crc32(content)}


def unseal(sealed: Any) -> tuple[dict[str, Any], Manifest | None]:
    """The inverse of `seal`; the manifest is None where the checkpoint is older than these seals.

    Raises:
        UserError: it was changed.
    """
    if isinstance(sealed, dict) and "config" in sealed and "arrays" not in sealed:
        return sealed, None
    try:
        content = {"meta": sealed["meta"], "arrays": sealed["arrays"]}
        intact = sealed["crc32"] == _crc32(content)
    except (KeyError, TypeError):
        intact = False
    if not intact:
        raise UserError("the meta data are not those that were saved")
    return content["meta"], content["arrays"]


def metrics(val_loss: float) -> dict[str, float]:
    """A validation loss as it is stored, beside what shows when it was changed."""
    return {"val_loss": val_loss, "crc32": zlib.crc32(repr(float(val_loss)).encode())}


def val_loss(stored: dict[str, float]) -> float:
    """The inverse of `metrics`; older checkpoints have no `crc32`.

    Raises:
        TypeError: it is no finite number, or not the one that was saved.
    """
    loss = stored["val_loss"]
    if not isinstance(loss, float | int) or not math.isfinite(loss):
        raise TypeError(f"a validation loss of {loss!r:.60}")
    if "crc32" in stored and stored != metrics(loss):
        raise TypeError(f"a validation loss of {loss!r:.60}, which is not the one that was saved")
    return loss


def check_metrics(folder: Path, remove: bool) -> None:
    """Looks at the small files that Orbax reads when it starts, where a damaged one would end the program.

    Args:
        folder: of all checkpoints.
        remove: remove damaged checkpoints where there are others.

    Raises:
        UserError: one is damaged, and is not removed.
    """
    damaged = {}
    for path in folder.glob("*/metrics/metrics"):
        try:
            val_loss(read_json(path))
        except (UserError, KeyError, TypeError) as error:
            if path.exists():  # else a training has just removed it
                damaged[path.parents[1]] = error
    if not damaged:
        return
    reasons = "; ".join(f"checkpoint {step} is damaged: {error}" for step, error in damaged.items())
    others = [step for step in folder.iterdir() if step.name.isdecimal() and step not in damaged]
    if not remove or not others:
        raise UserError(f"{reasons}; remove the folder to go on without it")
    logging.error("%s; trying the one before it", reasons)
    for step in damaged:
        shutil.rmtree(step)


def _crc32(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _names(tree: Any) -> dict[str, Any]:
    name: Callable[[Any], str] = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _describe(shape: tuple[int, ...], dtype: str) -> str:
    return f"{dtype}{list(shape)}"


def _shortened(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
