"""Makes a workdir of any model's float parameters: every command reads it, and a training can start from it.

It holds a checkpoint of step 0, marked as imported, with an optimizer that has done nothing. A training that finds it
begins at step 0. Its configuration is its own, except for the shape of the model.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from picogpt_jax.config import Config
from picogpt_jax.errors import UserError
from picogpt_jax.files import atomic_folder, write_json
from picogpt_jax.formats import sources
from picogpt_jax.formats.sources import FloatModel
from picogpt_jax.int8.convert import params_from_arrays, serving_quant
from picogpt_jax.int8.int8_model import MAX_CODE, Int8Model, Int8Tensor
from picogpt_jax.model.quantization import quantize
from picogpt_jax.training.checkpoint import IMPORTED, Checkpoints


def load_for_import(path: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None) -> FloatModel:
    """The float parameters of a model of any kind; those of an int8 model are its codes times their scales.

    Args:
        data_dir: see `sources.load_float`.

    Raises:
        UserError: see `sources.load_float`.
    """
    if sources.recognise(path) not in ("int8", "torch-int8"):
        return sources.load_float(path, data_dir)
    model = sources.load_int8(path).mixed()
    sources.check_vocabulary(model.vocabulary, model.model, path, data_dir)
    return float_model(model)


def float_model(model: Int8Model) -> FloatModel:
    """An int8 model as float parameters that quantize to the same codes and scales again.

    That holds for every row whose largest code is 127, as quantization leaves it; another row gets a finer scale.
    """
    arrays = {f"{name}.weight": _requantizable(matrix) for name, matrix in model.matrices.items()} | model.vectors
    step, val_loss = model.training.get("step"), model.training.get("val_loss")
    qat = model.training.get("quantization_aware") is True
    return FloatModel(
        config=model.model,
        run=None,
        quant=dataclasses.replace(serving_quant(model), mode="int8" if qat else "none"),
        params=params_from_arrays(model.model, arrays),
        vocabulary=model.vocabulary,
        step=step if type(step) is int else 0,
        val_loss=val_loss if type(val_loss) is float else None,
        qat=qat,
    )


def _requantizable(tensor: Int8Tensor) -> np.ndarray:
    """codes * scale, but for the last bit of some values of the largest code.

    127 * scale is rounded, and so is its 127th part, the new scale: in one row of 25 that is the neighbour of the old
    one. There the product is replaced by the float beside it that leads back.
    """
    largest = np.float32(MAX_CODE) * tensor.scale
    for candidate in (np.nextafter(largest, np.float32(0)), np.nextafter(largest, np.float32(np.inf))):
        largest = np.where(_scale_of(largest) == tensor.scale, largest, candidate)
    signs = np.where(np.abs(tensor.codes) == MAX_CODE, np.sign(tensor.codes), 0)
    return np.where(signs == 0, tensor.dequantize(), signs * largest).astype(np.float32)


def _scale_of(absmax_R1: np.ndarray) -> np.ndarray:
    """The scales [R, 1] that quantization gives rows of these largest values; computed by the very same code."""
    return np.asarray(jax.jit(lambda x: quantize(x).scale)(jnp.asarray(absmax_R1)))


def write_workdir(
    source: FloatModel, defaults: Mapping[str, Mapping[str, Any]], folder: str | os.PathLike[str]
) -> None:
    """Writes the workdir in one step.

    Args:
        source: what to import.
        defaults: a complete configuration, for what the source does not say; a training replaces it by its own.
        folder: is made, or is empty.

    Raises:
        UserError: `folder` holds something, or cannot be written.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; an import makes a new workdir: name a new --output")
    sections = source.run.to_dict() if source.run else dict(defaults)
    sections |= {"model": dataclasses.asdict(source.config), "quant": dataclasses.asdict(source.quant)}
    config = Config.from_dict(sections)
    trainer = sources.one_device_trainer(config)
    meta = {
        "config": config.to_dict(),
        "vocab": source.vocabulary.to_json(),
        "val_loss": source.val_loss,
        "best_val_loss": source.val_loss,
        IMPORTED: {"step": source.step, "quantization_aware": source.qat},
    }
    with atomic_folder(folder) as temporary:
        with Checkpoints(temporary, keep=1) as checkpoints:
            # Without a loss to rank it by: it was measured elsewhere, and must not beat what is trained from here.
            checkpoints.save(0, trainer.init(source.params), meta, None)
            checkpoints.wait()
        write_json(temporary / "config.json", config.to_dict())
        source.vocabulary.save(temporary / "vocab.json")
