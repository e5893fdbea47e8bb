"""Hugging Face's GPT-2: the folder that `AutoModelForCausalLM` loads (its JSON files: `hf_documents`).

The tensors are float32; the tied head is stored once. Linear layers are `Conv1D` there, with weights [in, out], and
have a bias, as every LayerNorm has: zero where ours has none. From an int8 model the weights are exactly code * scale.
The token that pads a batch has a row of its own where the table has no free one (`with_padding`), and so a logit.
"""

import dataclasses
import os
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from picogpt_jax.config import ModelConfig
from picogpt_jax.files import atomic_folder, check_replaceable, write_json
from picogpt_jax.formats.gpt2_tensors import TABLE, linear_weights
from picogpt_jax.formats.hf_documents import hf_documents, padding
from picogpt_jax.int8.folder import TENSORS_FILE
from picogpt_jax.int8.int8_model import Int8Model
from picogpt_jax.int8.layout import check_finite, check_layout, float_layout, layout_of
from picogpt_jax.text.vocabulary import Vocabulary


def dequantized(model: Int8Model) -> dict[str, np.ndarray]:
    """The float32 parameters that an int8 model stands for, under our names: codes * scale, and the vectors."""
    return {f"{name}.weight": matrix.dequantize() for name, matrix in model.matrices.items()} | model.vectors


def hf_tensors(model: ModelConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a `GPT2LMHeadModel`, float32.

    Args:
        arrays: exactly `float_layout(model)`; matrices [out, in].

    Raises:
        UserError: a tensor is unknown, missing, of another type or shape, or holds a value that is not finite.
    """
    check_layout(layout_of(arrays), float_layout(model))
    for name, array in arrays.items():
        check_finite(name, array)
    shapes = dataclasses.replace(model, bias=True).vector_shapes()
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    turned = linear_weights(model)
    tensors = {**zeros, **arrays}
    return {name: np.ascontiguousarray(array.T if name in turned else array) for name, array in tensors.items()}


def with_padding(table_VC: npt.NDArray[np.float32], vocabulary: Vocabulary) -> npt.NDArray[np.float32]:
    """The embedding with a row for the token that pads, where it has none.

    That row is the mean of the others. So its logit is the mean of theirs, whatever constant training added to all: it
    is never the largest, and takes less of the probability than one in `vocab_size`, after training far less.
    """
    if padding(vocabulary)[1] < len(table_VC):
        return table_VC
    return np.concatenate([table_VC, table_VC.mean(0, keepdims=True)])


def save_huggingface(
    model: ModelConfig, arrays: Mapping[str, np.ndarray], vocabulary: Vocabulary, folder: str | os.PathLike[str]
) -> None:
    """Writes the folder in one step; an earlier one is replaced as a whole.

    Args:
        arrays: see `hf_tensors`.

    Raises:
        UserError: the tensors are not the model's, or `folder` cannot be written or holds other files.
    """
    tensors = hf_tensors(model, arrays)
    tensors[TABLE] = with_padding(tensors[TABLE], vocabulary)
    documents = hf_documents(dataclasses.replace(model, vocab_size=len(tensors[TABLE])), vocabulary)
    check_replaceable(folder, {TENSORS_FILE, *documents})
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / TENSORS_FILE, metadata={"format": "pt"})
        for name, document in documents.items():
            write_json(temporary / name, document)
