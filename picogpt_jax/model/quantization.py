"""Int8 numerics: what is quantized, on which grid, and how the gradient passes through. AQT is imported here alone.

Which products.  Every matmul with a weight: `c_attn`, `attn.c_proj`, `c_fc`, `mlp.c_proj` and the head, tied to the
token embedding, whose codes it shares. Both operands are int8, the product accumulates in int32. The two embedding
tables are int8 as well: a looked-up row is its codes times its scale.

The grid.  Symmetric, no zero point, 127 steps on each side:

    scale = absmax / 127                     (1 / 127 for a slice of zeros)
    codes = round_half_to_even(clip(x * (1 / scale), -127, 127))

A weight [in, out] carries one scale per output channel (absmax over `in`), an embedding [rows, C] one per row; with
`weight_granularity="per_tensor"` each matrix carries a single one. An activation [..., features] carries one scale per
token, taken from the very values that are multiplied ("dynamic"): nothing is calibrated, so training and serving cannot
disagree. `absmax / 127` is AQT's `preserve_max_val=True`; its default, absmax / 127.5, is not what other runtimes use.

The product.  y = int32 * activation_scale * weight_scale in float32, then the bias, then the cast to the compute type.
Where that is bfloat16, the int32 sum is rounded to it before.
Scales and codes always come from float32 values, so the codes do not depend on the compute type.

The gradient.  Straight-through: quantization has gradient one, so dL/dx = g w^T and dL/dw = x^T g are the float
layer's, at the float operands, in the compute type or in a narrower one (`train.backward_dtype`);
`quant.backward_bits=8` makes these products int8 too, with stochastic rounding (AQT, arXiv 2105.03536).

What stays float.  LayerNorm, softmax, GELU, the residual stream, query-key scores and the attention-value product.
With `activation_bits=None` the activations do too, and only the weights are int8.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from aqt.jax.v2 import aqt_dot_general, aqt_quantizer, aqt_tensor
from aqt.jax.v2 import config as aqt_config
from aqt.jax.v2.flax import aqt_flax
from aqt.jax.v2.numerics import utils as aqt_numerics
from aqt.jax.v2.utils import QuantMode
from flax import linen as nn
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int8

from picogpt_jax.config import Granularity
from picogpt_jax.kernels import products
from picogpt_jax.kernels.int8_product import int8_dot_general
from picogpt_jax.model.numerics import Numerics

INT8_COLLECTION = "int8"
ROUNDING = "stochastic_rounding"  # the random numbers of `quant.backward_bits`


@struct.dataclass
class QuantizedTensor:
    """int8 codes and the float32 scale that broadcasts against them; the value is codes * scale."""

    codes: Int8[Array, "..."]
    scale: Float[Array, "..."]

    def dequantize(self) -> Float[Array, "..."]:
        """float32 codes * scale, rounded once, wherever it is computed.

        A sum that follows could otherwise be compiled into one fused multiply-add, which does not round the product:
        the last bit would depend on the code around it. The selection, which changes no value, keeps them apart.
        """
        product = self.codes.astype(jnp.float32) * self.scale
        return jnp.where(self.codes == 0, 0.0, product)


def quantize(x: Float[Array, "..."], granularity: Granularity = "per_channel") -> QuantizedTensor:
    """Quantizes `x` with one scale per row (per slice of the last dimension), or one for all of it ("per_tensor")."""
    quantizer = aqt_quantizer.quantizer_make(8, preserve_max_val=True)
    axes = list(range(x.ndim)) if granularity == "per_tensor" else [x.ndim - 1]
    tensor, _ = quantizer.quant(x.astype(jnp.float32), calibration_axes=axes)
    return QuantizedTensor(codes=tensor.qvalue, scale=tensor.scale[0])


def straight_through(value: Float[Array, "..."], source: Float[Array, "..."]) -> Float[Array, "..."]:
    """`value` in the forward pass, exactly; the gradient goes to `source` unchanged."""
    return lax.stop_gradient(value) + (source - lax.stop_gradient(source))


def fake_quantize(x: Float[Array, "..."], granularity: Granularity) -> Float[Array, "..."]:
    """Quantizes and dequantizes, with the straight-through gradient: how an embedding table is trained."""
    return straight_through(quantize(x, granularity).dequantize(), x)


def int8_dot(
    x: Float[Array, "... features"], weight: QuantizedTensor, activation_bits: int | None
) -> Float[Array, "..."]:
    """Serving: `x` times an int8 weight stored [out, in], with int32 accumulation.

    Args:
        x: activations, any float type; quantized here, one scale per token, unless `activation_bits` is None.
        weight: codes [out, in], scale [out, 1] or [1, 1]; `out` may be several dimensions.

    Returns:
        float32 [..., out]: with int8 activations bit for bit what the training forward pass computes; with float ones
        to rounding, because a float sum depends on its order.
    """
    contract_last = (((x.ndim - 1,), (weight.codes.ndim - 1,)), ((), ()))
    weight_scale = weight.scale.reshape((1,) * (x.ndim - 1) + weight.scale.shape[:-1])
    if activation_bits is None:
        product = lax.dot_general(x.astype(jnp.float32), weight.codes.astype(jnp.float32), contract_last)
        return product * weight_scale
    activations = quantize(x)
    product = _rounded(int8_dot_general(activations.codes, weight.codes, contract_last), x.dtype)
    activation_scale = activations.scale.reshape(*x.shape[:-1], *(1,) * (weight.codes.ndim - 1))
    return product.astype(jnp.float32) * activation_scale * weight_scale


def quantized_dot_general(numerics: Numerics, draws: bool = False) -> nn.Module | None:
    """AQT's dot_general as a linen module: lhs are activations, rhs a float32 weight; both float32, as is the result.

    In mode "convert" it leaves the weight's codes in the collection "aqt". In mode "float" there is none.

    Args:
        draws: whether there are random numbers, `ROUNDING`; the gradients of `quant.backward_bits` need them.
    """
    if numerics.mode == "float":
        return None
    convert = numerics.mode == "convert"
    return aqt_flax.AqtDotGeneral(
        cfg=_aqt_config(numerics),
        prng_name=ROUNDING if numerics.quant.backward_bits and draws else None,
        rhs_quant_mode=QuantMode.CONVERT if convert else QuantMode.TRAIN,
        lhs_freeze_mode=aqt_flax.FreezerMode.NONE,
        rhs_freeze_mode=aqt_flax.FreezerMode.CALIBRATION_AND_VALUE if convert else aqt_flax.FreezerMode.NONE,
        use_legacy_freezer=False,
    )


def converted(collection: Any) -> QuantizedTensor:
    """The weight that a "convert" pass left in a module's part of the collection "aqt"; its own orientation."""
    (tensor,) = jax.tree.leaves(collection, is_leaf=lambda leaf: isinstance(leaf, aqt_tensor.QTensor))
    return QuantizedTensor(codes=tensor.qvalue, scale=tensor.scale[0])


def _aqt_config(numerics: Numerics) -> aqt_dot_general.DotGeneral:
    quant = numerics.quant
    aqt = aqt_dot_general.dot_general_make(quant.activation_bits, 8, quant.backward_bits, use_fwd_quant=False)
    for side, bits in ((aqt.fwd.dg_quantizer.lhs, quant.activation_bits), (aqt.fwd.dg_quantizer.rhs, 8)):
        side.numerics = aqt_numerics.get_numerics(bits, preserve_max_val=True)
    if quant.weight_granularity == "per_tensor":
        aqt.fwd.dg_quantizer.rhs.calib_shared_axes = "per_tensor"
    product = _bfloat16_dot if numerics.dtype == jnp.bfloat16 else _dot
    aqt.fwd.dot_general = product
    if quant.backward_bits is None:
        aqt.dlhs.dot_general = aqt.drhs.dot_general = _backward_dot(numerics.dtype, numerics.backward_dtype)
    else:
        # AQT's own grid clips the largest value of each slice, which would bias the stochastic rounding.
        for dot in (aqt.dlhs, aqt.drhs):
            dot.dot_general = product
            for side in (dot.dg_quantizer.lhs, dot.dg_quantizer.rhs):
                side.numerics = aqt_numerics.get_numerics(8, preserve_max_val=True)
        aqt_config.set_stochastic_rounding(aqt, True, True, implementation="jax.uniform")
    return aqt


def _dot(
    lhs: Array, rhs: Array, dimension_numbers: Any, preferred_element_type: Any = None, precision: Any = None
) -> Array:
    """int8 x int8 -> int32, or float32 activations times int8 codes (weight-only)."""
    if lhs.dtype == rhs.dtype == jnp.int8:
        return int8_dot_general(lhs, rhs, dimension_numbers)
    rhs = rhs.astype(lhs.dtype)
    return lax.dot_general(
        lhs, rhs, dimension_numbers, precision=precision, preferred_element_type=preferred_element_type
    )


def _bfloat16_dot(lhs: Array, rhs: Array, dimension_numbers: Any, **options: Any) -> Array:
    """`_dot`, whose int32 sums are rounded."""
    return _rounded(_dot(lhs, rhs, dimension_numbers, **options), jnp.bfloat16)


def _rounded(product: Array, compute_dtype: Any) -> Array:
    """int32 sums as they are; in bfloat16 rounded to it, as the float layer's are.

    GPU compilers write the sums to memory and read them where they are scaled: rounded, they are half as many bytes.
    float16 would overflow.
    """
    return product.astype(jnp.bfloat16) if (product.dtype, compute_dtype) == (jnp.int32, jnp.bfloat16) else product


@functools.cache  # the same object for the same type: AQT compares its static fields by identity
def _backward_dot(compute_dtype: jnp.dtype, backward_dtype: jnp.dtype | None) -> Callable[..., Array]:
    """Float gradients in the compute type, or of operands rounded to `backward_dtype`, as the float layer's."""

    def dot(
        lhs: Array, rhs: Array, dimension_numbers: Any, preferred_element_type: Any = None, precision: Any = None
    ) -> Array:
        del preferred_element_type
        if backward_dtype is not None:
            return products.of_rounded(lhs, rhs, dimension_numbers, backward_dtype)
        return lax.dot_general(
            lhs.astype(compute_dtype),
            rhs.astype(compute_dtype),
            dimension_numbers,
            precision=precision,
            preferred_element_type=compute_dtype,
        ).astype(jnp.float32)

    return dot
