"""Hugging Face's GPT-2: which of its tensors is which of ours.

The names are ours, which are nanoGPT's, which are GPT-2's. Two things differ: linear layers are `Conv1D` there, with
weights [in, out] (transformers, pytorch_utils.py), and each has a bias, as the LayerNorms have.
"""

import dataclasses

import numpy as np

from picogpt_jax.config import ModelConfig
from picogpt_jax.int8_model import EMBEDDINGS, Int8Model


def hf_names(model: ModelConfig) -> dict[str, tuple[str, bool]]:
    """All tensors of a `GPT2LMHeadModel`: our name -> (its name, whether it is [in, out] there).

    Every bias is listed, also where `model.bias` is false. `lm_head.weight` is `transformer.wte.weight` and not listed.
    """
    names = {f"{name}.weight": (f"{name}.weight", name not in EMBEDDINGS) for name in model.matrix_shapes()}
    vectors = dataclasses.replace(model, bias=True).vector_shapes()
    return names | {name: (name, False) for name in vectors}


def dequantized(model: Int8Model) -> dict[str, np.ndarray]:
    """The float32 parameters that an int8 model stands for, under our names: codes * scale, and the vectors."""
    return {f"{name}.weight": matrix.dequantize() for name, matrix in model.matrices.items()} | model.vectors
