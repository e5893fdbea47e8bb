"""The layers that hold a matrix: the linear layer and the embedding table, in float, in QAT and in int8.

Shapes: B batch, T time, N rows (tokens), C width, V vocabulary; I input features, O output features of a product.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from picogpt_jax.devices.sharding import constrain, splits
from picogpt_jax.kernels import products
from picogpt_jax.model import integer
from picogpt_jax.model.numerics import Numerics
from picogpt_jax.model.quantization import (
    INT8_COLLECTION,
    ROUNDING,
    QuantizedTensor,
    fake_quantize,
    int8_dot,
    quantize,
    quantized_dot_general,
)

Table = QuantizedTensor | Float[Array, "V C"]

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
    # Of integer arithmetic: fraction bits of the input (`integer.quantize`) and of the output, and what the first
    # of the parts is multiplied by.
    input_bits: int = 64
    output_bits: int = integer.RESIDUAL_BITS
    first_factor: float = 1.0

    @nn.compact
    def __call__(self, x_BTI: Float[Array, "B T I"]) -> Float[Array, "B T *O"]:
        """[B, T, features]; or [B, T, parts, features / parts], where each part's features are split over devices."""
        numerics = self.numerics
        apart = self.parts > 1 and splits("heads")
        shape = (self.parts, self.features // self.parts)
        kernel: Any
        bias: Any = None
        if numerics.mode == "serve":
            kernel = stored(self, "kernel")
            if apart:
                kernel = in_parts(kernel, shape)
        else:
            init = nn.with_logical_partitioning(nn.initializers.normal(self.stddev), self.axes)
            kernel = self.param("kernel", init, (x_BTI.shape[-1], self.features), jnp.float32)
            if apart:
                # Stored side by side, a device's share is no whole heads: the weights move, not the activations.
                kernel = constrain(kernel.reshape(-1, *shape), "embed", None, "heads")
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            bias = self.param("bias", init, (self.features,), jnp.float32)
            if apart:
                bias = constrain(bias.reshape(shape), None, "heads")
        if numerics.is_integer:
            return checkpoint_name(self._integer(x_BTI, kernel, bias), str(self.name))
        if isinstance(kernel, QuantizedTensor):
            y_BTO = int8_dot(x_BTI, kernel, numerics.quant.activation_bits)
        else:
            y_BTO = matmul(x_BTI, kernel, 0, quantized_dot_general(numerics, self.has_rng(ROUNDING)), numerics)
        if bias is not None:
            y_BTO = y_BTO + as_row(bias.astype(y_BTO.dtype), y_BTO.ndim)
        return checkpoint_name(y_BTO.astype(numerics.dtype), str(self.name))

    def _integer(self, x_BTI: Float[Array, "B T I"], kernel: Any, bias: Array | None) -> Float[Array, "B T *O"]:
        """The same in integer arithmetic; the gradient is the mixed one's."""
        bits = (self.input_bits, self.output_bits)
        if isinstance(kernel, QuantizedTensor):  # what it is multiplied by is part of it
            exponent = integer.exponent_of(kernel.scale)
            return integer.linear(x_BTI, kernel.codes, exponent, kernel.codes.ndim - 1, bias, *bits)
        if self.first_factor != 1.0:
            is_first = jnp.arange(self.features).reshape(kernel.shape[1:]) < self.features // self.parts
            factors = jnp.where(is_first, jnp.float32(self.first_factor), jnp.float32(1))
            kernel = kernel * factors[None]
            bias = None if bias is None else bias * factors
        dot_general = quantized_dot_general(self.numerics, self.has_rng(ROUNDING))
        y_BTO = matmul(x_BTI, kernel, 0, dot_general, self.numerics)
        if bias is not None:
            y_BTO = y_BTO + as_row(bias.astype(y_BTO.dtype), y_BTO.ndim)
        codes, exponent = integer.quantize_weight(kernel, 0, self.numerics.quant.weight_granularity)
        return integer.carry(integer.linear(x_BTI, codes, exponent, 0, bias, *bits), y_BTO)


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
            self.dot_general = quantized_dot_general(self.numerics, self.has_rng(ROUNDING))

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... C"]:
        ids = constrain(ids, "tokens", None)
        if self.numerics.is_integer:
            codes, exponent = self._codes()
            # An exponent for each row, or one in all.
            rows = integer.lookup(codes[ids], exponent[ids] if exponent.size > 1 else exponent[None])
            if not isinstance(self.table, QuantizedTensor):
                rows = integer.carry(rows, self.table[ids])
        elif isinstance(self.table, QuantizedTensor):
            # Only the rows that are looked up are computed: the product is fused into the look-up. Compiled into the
            # LayerNorm that follows, it would change the order of its sums, and so the last bit against training.
            rows = self.table.dequantize()[ids]
        elif self.numerics.mode == "float":
            rows = self.table[ids]
        elif self.numerics.quant.weight_granularity == "per_channel" and ids.size < self.rows:
            rows = fake_quantize(self.table[ids], "per_channel")  # a row has its own scale: the same, of fewer rows
        else:
            rows = fake_quantize(self.table, self.numerics.quant.weight_granularity)[ids]
        dtype = jnp.float32 if self.numerics.is_integer else self.numerics.dtype
        return constrain(rows.astype(dtype), "tokens", None, "embed")

    def _codes(self) -> tuple[Array, Array]:
        """The table's codes and exponents, in integer arithmetic."""
        if isinstance(self.table, QuantizedTensor):
            return self.table.codes, integer.exponent_of(self.table.scale)
        return integer.quantize_weight(self.table, 1, self.numerics.quant.weight_granularity)

    def multiplied(self) -> Table:
        """What `attend` multiplies by, whole on each device along the width; for calls that need no gradient of it."""
        numerics = self.numerics
        if numerics.mode == "float":
            return constrain(self.table.astype(numerics.dtype), "vocab", None)
        if numerics.is_integer:
            codes, exponent = self._codes()
            table = QuantizedTensor(codes, integer.power(exponent))
        else:
            table = quantize(self.table, numerics.quant.weight_granularity)
        return QuantizedTensor(constrain(table.codes, "vocab", None), table.scale)

    def attend(self, x_BTC: Float[Array, "B T C"], table: Table | None = None) -> Float[Array, "B T V"]:
        """The logits; `table`: what `multiplied` has made."""
        numerics, table = self.numerics, self.table if table is None else table
        if not isinstance(table, QuantizedTensor):
            logits_BTV = matmul(x_BTC, table, 1, self.dot_general, numerics)
            if numerics.is_integer:
                integers_BTV = integer.linear(x_BTC, *self._codes(), 1, None, 64, integer.LOGIT_BITS)
                logits_BTV = integer.carry(integers_BTV, logits_BTV)
        elif numerics.is_integer:
            exponent = integer.exponent_of(table.scale)
            logits_BTV = integer.linear(x_BTC, table.codes, exponent, 1, None, 64, integer.LOGIT_BITS)
        else:
            logits_BTV = int8_dot(x_BTC, table, numerics.quant.activation_bits)
        if self.used is None or self.used == self.rows:
            return logits_BTV
        # The logits of padding are zeros. Added to, they have the gradient as it comes: no copy of it is masked.
        padding_V = jnp.where(jnp.arange(self.rows) < self.used, 0.0, jnp.finfo(logits_BTV.dtype).min)
        return logits_BTV + as_row(padding_V.astype(logits_BTV.dtype), logits_BTV.ndim)


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
