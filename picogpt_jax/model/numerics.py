"""How a run computes what the model says: one frozen object, which every layer gets whole."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from picogpt_jax.config import AttentionForm, QuantConfig

# float: no quantization; train: quantize in the forward pass; convert: the same, and keep the codes in the collection
# "aqt"; serve: the codes are given, in the collection "int8", and there are no float matrices.
Mode = Literal["float", "train", "convert", "serve"]

FLOAT32 = jnp.dtype("float32")


@dataclasses.dataclass(frozen=True)
class Numerics:
    """The numerics of a run.

    Attributes:
        quant: which operands are int8, and on which grid.
        mode: what happens to the matrices, see `Mode`.
        dtype: the compute type; parameters are float32.
        backward_dtype: what the operands of the backward pass's products are rounded to (`kernels.products`); None:
            they have the compute type.
        attention: a form that can serve (`attention.choose`), for whole sequences; with a cache it is the plain one.
    """

    quant: QuantConfig
    mode: Mode
    dtype: jnp.dtype = FLOAT32
    backward_dtype: jnp.dtype | None = None
    attention: AttentionForm = "plain"

    @property
    def is_integer(self) -> bool:
        """Whether everything between token ids and logits is an integer (`model.integer`)."""
        return self.mode != "float" and self.quant.mode == "int8" and self.quant.arithmetic == "integer"
