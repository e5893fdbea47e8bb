"""A small GPT in JAX/Flax: int8 quantization-aware training, and one int8 model for every runtime."""

import os
from typing import TYPE_CHECKING

from picogpt_jax.errors import UserError

if TYPE_CHECKING:
    from picogpt_jax.formats.loading import Model, Runtime

__all__ = ["UserError", "__version__", "load"]
__version__ = "0.1.0"


def load(path: str | os.PathLike[str], runtime: "Runtime" = "auto") -> "Model":
    """A model, ready to write text: `load("runs/shakespeare/int8").generate("ROMEO:")`.

    Args:
        path: a workdir (its best checkpoint, without quantization), an int8 folder, a PyTorch .pt, a Hugging Face
            folder, an ONNX folder, or a GGUF file.
        runtime: what computes: "jax", "torch", "onnx", "numpy", "c", "llama.cpp"; "auto" takes JAX where there is
            an accelerator or the parameters are float, and else what answers first.

    Raises:
        UserError: nothing that is known lies there, it is damaged, or the runtime does not take it.
        ImportError: the runtime is not installed; the message names the extra.
    """
    from picogpt_jax.formats import loading  # only now, with all that a model needs

    return loading.load(path, runtime)
