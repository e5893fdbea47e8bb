"""The layers that hold a matrix: the linear layer and the embedding table, in float, in QAT and in int8.

Shapes: B batch, T time, N rows (tokens), C width, V vocabulary; I input features, O output features of a product.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from picogpt_jax.devices.sharding import constrain, splits
from picogpt_jax.kernels import products
from picogpt_jax.model import rounding
from picogpt_jax.model.numerics import Numerics
from picogpt_jax.model.quantization import (
    INT8_COLLECTION,
    QuantizedTensor,
    fake_quantize,
    int8_dot,
    quantized_dot_general,
)

INIT_STDDEV = 0.02


def init_stddev(name: str, n_layer: int) -> float:
    """GPT-2's initialisation: normal(0.02), and 0.02 / sqrt(2 * n_layer) for the projections into the residual stream.

    Args:
        name: of the layer, such as c_attn; `c_proj` is what projects into the residual stream.
    """
    return INIT_STDDEV * (2 * n_layer) ** -0.5 if name == "c_proj" else INIT_STDDEV


class Dense(nn.Module):
    """y = x W + b, with W float [in, out] (linen's Dense), quantized on the fly, or int8 [out, in] and nothing else."""

    features: int
    axes: tuple[str, str]
    numerics: Numerics
    use_bias: bool
    stddev: float = INIT_STDDEV
    parts: int = 1  # q, k and v side by side are three

    @nn.compact
    def __call__(self, x_BTI: Float[Array, "B T I"]) -> Float[Array, "B T *O"]:
        """[B, T, features]; or [B, T, parts, features / parts], where each part's features are split over devices."""
        apart = self.parts > 1 and splits("heads")
        shape = (self.parts, self.features // self.parts)
        if self.numerics.mode == "serve":
            kernel_OI = stored(self, "kernel")
            if apart:
                kernel_OI = in_parts(kernel_OI, shape)
            y_BTO = int8_dot(x_BTI, kernel_OI, self.numerics.quant.activation_bits)
        else:
            init = nn.with_logical_partitioning(nn.initializers.normal(self.stddev), self.axes)
            kernel_IO: Any = self.param("kernel", init, (x_BTI.shape[-1], self.features), jnp.float32)
            if apart:
                # Stored side by side, a device's share is no whole heads: the weights move, not the activations.
                kernel_IO = constrain(kernel_IO.reshape(-1, *shape), "embed", None, "heads")
            y_BTO = matmul(x_BTI, kernel_IO, 0, quantized_dot_general(self.numerics), self.numerics)
        y_BTO = rounding.rounded(y_BTO)
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            bias: Any = self.param("bias", init, (self.features,), jnp.float32)
            if apart:
                bias = constrain(bias.reshape(shape), None, "heads")
            y_BTO = y_BTO + as_row(bias.astype(y_BTO.dtype), y_BTO.ndim)
        return y_BTO.astype(self.numerics.dtype)


class Embedding(nn.Module):
    """A table [rows, C], looked up; as the tied head it also multiplies (`attend`), with the same codes and scales.

    Attributes:
        used: how many rows stand for tokens, None: all. The others pad the table, in training alone: nothing depends on
            what they hold, neither a scale of the whole table nor a loss, so that a model is served without them.
    """

    rows: int
    width: int
    axes: tuple[str, str]
    numerics: Numerics
    used: int | None = None

    def setup(self) -> None:
        self.table: Any
        if self.numerics.mode == "serve":
            self.table = stored(self, "embedding")
        else:
            init = nn.with_logical_partitioning(nn.initializers.normal(INIT_STDDEV), self.axes)
            self.table = self.param("embedding", init, (self.rows, self.width), jnp.float32)
            if self.used is not None and self.used < self.rows:
                self.table = jnp.where(jnp.arange(self.rows)[:, None] < self.used, self.table, 0.0)
            self.dot_general = quantized_dot_general(self.numerics)

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... C"]:
        ids = constrain(ids, "tokens", None)
        if isinstance(self.table, QuantizedTensor):
            # Only the rows that are looked up are computed: the product is fused into the look-up. Compiled into the
            # LayerNorm that follows, it would change the order of its sums, and so the last bit against training.
            rows = self.table.dequantize()[ids]
        elif self.numerics.mode == "float":
            rows = self.table[ids]
        else:
            rows = fake_quantize(self.table, self.numerics.quant.weight_granularity)[ids]
        return constrain(rows.astype(self.numerics.dtype), "tokens", None, "embed")

    def attend(self, x_BTC: Float[Array, "B T C"]) -> Float[Array, "B T V"]:
        if isinstance(self.table, QuantizedTensor):
            return int8_dot(x_BTC, self.table, self.numerics.quant.activation_bits)
        logits_BTV = matmul(x_BTC, self.table, 1, self.dot_general, self.numerics)
        if self.used is None or self.used == self.rows:
            return logits_BTV
        return jnp.where(jnp.arange(self.rows)[None, None] < self.used, logits_BTV, jnp.finfo(logits_BTV.dtype).min)


def matmul(
    x: Float[Array, "B T I"],
    weight: Float[Array, "..."],
    in_dim: int,
    dot_general: nn.Module | None,
    numerics: Numerics,
) -> Float[Array, "B T *O"]:
    """x times a float weight whose dimension `in_dim` is contracted: through AQT, or plain where there is no module."""
    dimension_numbers = (((1,), (in_dim,)), ((), ()))
    # One row a token: the weight's gradient is then a plain 2-D product, which no backend needs a transposed copy for.
    x_NI = x.reshape(-1, x.shape[-1])
    if dot_general is None:
        operands = x_NI.astype(numerics.dtype), weight.astype(numerics.dtype)
        y_NO = products.dot_general(*operands, dimension_numbers, numerics.backward_dtype)
    else:
        y_NO = dot_general(x_NI.astype(jnp.float32), weight, dimension_numbers, None)
    return y_NO.reshape(*x.shape[:-1], *y_NO.shape[1:])


def as_row(vector: Float[Array, "*C"], ndim: int) -> Float[Array, "..."]:
    """`vector` [C] as [1, ..., 1, C], `ndim` dimensions."""
    return vector.reshape((1,) * (ndim - vector.ndim) + vector.shape)


def in_parts(weight_OI: QuantizedTensor, shape: tuple[int, int]) -> QuantizedTensor:
    """An int8 weight [parts * O, I] as [parts, O, I], each part split over devices by heads."""
    codes = constrain(weight_OI.codes.reshape(*shape, -1), None, "heads", "embed")
    scale = weight_OI.scale.reshape(*(shape if weight_OI.scale.size > 1 else (1, 1)), 1)
    return QuantizedTensor(codes=codes, scale=scale)


def stored(module: nn.Module, name: str) -> QuantizedTensor:
    """The int8 tensor `name` of a serving module; it must be given to `apply`: there is nothing to make it from."""
    tensor: Any = module.get_variable(INT8_COLLECTION, name)
    if tensor is None:
        raise ValueError(f"{'/'.join(module.path)}/{name} is missing from the collection {INT8_COLLECTION!r}")
    return tensor
