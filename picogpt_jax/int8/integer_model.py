"""The integer model: format version 2 of the int8 folder, which README.md beside this file specifies.

Every tensor holds integers; a scale is a power of two. Nothing here needs more than numpy and safetensors.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt_jax.config import Granularity, ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.int8.int8_model import (
    FORMAT,
    QUANTIZATION_CHOICES,
    Int8Model,
    Int8Tensor,
    Quantization,
    check_json,
    check_version,
    read_sections,
)
from picogpt_jax.int8.layout import Layout, check_depth, check_layout, layout_of
from picogpt_jax.text.vocabulary import Vocabulary

INTEGER_VERSION = 2  # of the format
INTEGER_CHOICES = {**QUANTIZATION_CHOICES, "activation_bits": (8,), "quantize_attention": (True,)}

# Fraction bits of the outputs of a linear layer.
RESIDUAL_BITS = LOGIT_BITS = 10
HEAD_BITS = NORM_BITS = 12  # q, k, v; the bias of a LayerNorm
HIDDEN_BITS = {"relu": 10, "gelu": 8, "gelu_tanh": 8}

EXPONENTS = (-24, 15)  # of a scale
MANTISSA = (2048, 4096)  # the largest of a LayerNorm's
LARGEST_BIAS = 1 << 22
# Beyond these the integers could leave the bounds that are proven: sums of LayerNorm, of products, of attention.
LARGEST = {"n_embd": 8192, "n_hidden": 1 << 15, "block_size": 4096, "head_size": 1024}


def query_factors(config: ModelConfig, name: str, rows: int) -> npt.NDArray[np.float32]:
    """What each output of the module `name` is stored multiplied by, [rows].

    Those of the queries by log2(e) / sqrt(D): a score is then a logarithm to the base 2. All others by 1.
    """
    factors = np.ones(rows, np.float32)
    if name.endswith(".attn.c_attn"):
        factors[: rows // 3] = math.log2(math.e) / math.sqrt(config.head_size)
    return factors


def bias_bits(config: ModelConfig, name: str) -> int:
    """Fraction bits of the bias of `name`, such as transformer.h.0.mlp.c_fc, and of what it is added to."""
    kind = name.rsplit(".", 1)[-1]
    return {"c_attn": HEAD_BITS, "c_proj": RESIDUAL_BITS, "c_fc": HIDDEN_BITS[config.activation]}.get(kind, NORM_BITS)


def integer_layout(config: ModelConfig, granularity: Granularity) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What `model.safetensors` holds in version 2, complete: tensor name -> (dtype, shape)."""
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in config.matrix_shapes().items():
        layout[f"{name}.weight"] = ("int8", shape)
        layout[f"{name}.weight_exponent"] = ("int8", (shape[0] if granularity == "per_channel" else 1, 1))
    for name, length in config.vector_shapes().items():
        layout[name] = ("int16" if name.endswith(".weight") else "int32", length)
        if name.endswith(".weight"):
            layout[f"{name}_exponent"] = ("int8", (1,))
    return layout


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class IntegerModel:
    """A model as it is served in integers. Construction checks every name, dtype, shape and value.

    Attributes:
        model: the architecture.
        weight_granularity: one exponent per row, or one per matrix.
        training: where the model comes from (step, val_loss, dataset, ...); JSON values.
        vocabulary: as many entries as `model.vocab_size`.
        tensors: as in `model.safetensors`; exactly `integer_layout`.

    Raises:
        UserError: on construction, naming the tensor, what was found and what was expected.
    """

    model: ModelConfig
    weight_granularity: Granularity
    training: dict[str, Any]
    vocabulary: Vocabulary
    tensors: dict[str, npt.NDArray[Any]]

    def __post_init__(self) -> None:
        check_sizes(self.model)
        if self.vocabulary.size != self.model.vocab_size:
            raise UserError(
                f"the vocabulary has {self.vocabulary.size} entries, but model.vocab_size={self.model.vocab_size}"
            )
        check_json("training", self.training)
        check_depth(self.model, self.tensors)
        found: Layout = layout_of(self.tensors)
        check_layout(found, integer_layout(self.model, self.weight_granularity))
        for name, array in self.tensors.items():
            _check_values(name, array)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors, as `model.safetensors` has them."""
        return sum(array.nbytes for array in self.tensors.values())

    def mixed(self) -> Int8Model:
        """The same codes for mixed arithmetic (version 1), with float functions between the products.

        For formats that know no integer functions. Scales are per channel, since those of the queries differ.
        """
        matrices, vectors = {}, {}
        for name, (rows, _) in self.model.matrix_shapes().items():
            exponent_O1 = np.broadcast_to(self.tensors[f"{name}.weight_exponent"].astype(np.int32), (rows, 1))
            scale_O1 = np.ldexp(np.float32(1), exponent_O1) / query_factors(self.model, name, rows)[:, None]
            matrices[name] = Int8Tensor(self.tensors[f"{name}.weight"], scale_O1)
        for name, shape in self.model.vector_shapes().items():
            module, kind = name.rsplit(".", 1)
            exponent = -bias_bits(self.model, module)
            if kind == "weight":
                exponent = int(self.tensors[f"{name}_exponent"][0])
            vectors[name] = np.ldexp(self.tensors[name].astype(np.float32), exponent) / query_factors(
                self.model, module, shape[0]
            )
        return Int8Model(
            model=self.model,
            quantization=Quantization(weight_granularity="per_channel", activation_bits=8),
            training=self.training,
            vocabulary=self.vocabulary,
            matrices=matrices,
            vectors=vectors,
        )


def integer_config_to_json(model: IntegerModel) -> dict[str, Any]:
    """The contents of config.json."""
    quantization = {name: choices[0] for name, choices in INTEGER_CHOICES.items()}
    return {
        "format": FORMAT,
        "format_version": INTEGER_VERSION,
        "arithmetic": "integer",
        "model": dataclasses.asdict(model.model),
        "quantization": quantization | {"weight_granularity": model.weight_granularity},
        "training": model.training,
    }


def integer_config_from_json(value: Any) -> tuple[ModelConfig, Granularity, dict[str, Any]]:
    """Reads what `integer_config_to_json` wrote.

    Raises:
        UserError: another format or version, an unknown or missing key, a value of the wrong type or out of range.
    """
    check_version(value, INTEGER_VERSION)
    model, quantization, training = read_sections(value, INTEGER_CHOICES, "arithmetic")
    if value["arithmetic"] != "integer":
        raise UserError(f"arithmetic is {value['arithmetic']!r:.60}; expected 'integer'")
    check_sizes(model)
    return model, quantization["weight_granularity"], training


def check_sizes(config: ModelConfig) -> None:
    """Raises a UserError where the bounds of the integers are not proven for a model of this size."""
    for name, limit in LARGEST.items():
        if getattr(config, name) > limit:
            raise UserError(f"{name} is {getattr(config, name)}; integer arithmetic goes up to {limit}: use mixed")


def _check_values(name: str, array: npt.NDArray[Any]) -> None:
    low, high, largest = int(array.min()), int(array.max()), int(np.abs(array.astype(np.int64)).max())
    if name.endswith("_exponent"):
        if low < EXPONENTS[0] or high > EXPONENTS[1]:
            wrong = low if low < EXPONENTS[0] else high
            raise UserError(f"{name} holds the exponent {wrong}; expected {EXPONENTS[0]} to {EXPONENTS[1]}")
    elif array.dtype == np.int16:
        if not MANTISSA[0] <= largest <= MANTISSA[1]:
            raise UserError(f"{name}: the largest mantissa is {largest}; expected {MANTISSA[0]} to {MANTISSA[1]}")
    elif name.endswith(".bias"):
        if largest > LARGEST_BIAS:
            raise UserError(f"{name} holds {low if -low == largest else high}; expected at most {LARGEST_BIAS}")
    elif low < -127:
        raise UserError(f"{name} holds the code -128; expected codes in [-127, 127]")


def integer_model(
    config: ModelConfig,
    granularity: Granularity,
    arrays: dict[str, npt.NDArray[np.float32]],
    vocabulary: Vocabulary,
    training: dict[str, Any],
) -> IntegerModel:
    """Quantizes float parameters: the codes that training in integers computes from them.

    Args:
        arrays: under nanoGPT's names, matrices [out, in]; rows of the token table beyond the vocabulary are left out.

    Raises:
        UserError: the model is larger than the bounds allow, or a parameter is.
    """
    check_sizes(config)
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name in config.matrix_shapes():
        weight_OI = arrays[f"{name}.weight"] * query_factors(config, name, len(arrays[f"{name}.weight"]))[:, None]
        codes, exponent = quantize_weight(weight_OI, granularity)
        if name == "transformer.wte":
            codes, exponent = codes[: vocabulary.size], exponent[: vocabulary.size]
        tensors[f"{name}.weight"], tensors[f"{name}.weight_exponent"] = codes, exponent
    for name in config.vector_shapes():
        module, kind = name.rsplit(".", 1)
        if kind == "weight":
            tensors[name], tensors[f"{name}_exponent"] = mantissas_of(arrays[name])
        else:
            bias = arrays[name] * query_factors(config, module, len(arrays[name]))
            tensors[name] = _fixed(name, bias, bias_bits(config, module))
    return IntegerModel(
        model=dataclasses.replace(config, vocab_size=vocabulary.size),
        weight_granularity=granularity,
        training=training,
        vocabulary=vocabulary,
        tensors=tensors,
    )


def quantize_weight(
    weight_OI: npt.NDArray[np.float32], granularity: Granularity
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """Codes [O, I] and exponents [O, 1] or [1, 1]: the smallest power of two that keeps codes within 127.

    codes = round_half_to_even(w * 2^-exponent).
    """
    absmax = np.abs(weight_OI).max(1 if granularity == "per_channel" else None, keepdims=True)
    fraction, exponent = np.frexp(absmax)
    exponent = exponent - 7 + (fraction >= 255 / 256)
    if exponent.max() > EXPONENTS[1] or not np.isfinite(absmax).all():
        raise UserError(f"a weight of {absmax.max():.3g} is too large for integers; expected below 2^22")
    exponent = np.maximum(exponent, EXPONENTS[0])
    return np.rint(np.ldexp(weight_OI, -exponent)).astype(np.int8), exponent.astype(np.int8)


def mantissas_of(weight_C: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int8]]:
    """A vector as int16 mantissas, the largest from 2048 to 4096, and one exponent [1]."""
    exponent = np.clip(np.frexp(np.abs(weight_C).max(keepdims=True))[1] - 12, *EXPONENTS)
    return np.rint(np.ldexp(weight_C, -exponent)).astype(np.int16), exponent.astype(np.int8)


def _fixed(name: str, values: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.int32]:
    fixed = np.rint(np.ldexp(values.astype(np.float64), bits))
    if np.abs(fixed).max() > LARGEST_BIAS:
        raise UserError(f"{name} holds {np.abs(values).max():.3g}; integers go up to {LARGEST_BIAS >> bits}")
    return fixed.astype(np.int32)
