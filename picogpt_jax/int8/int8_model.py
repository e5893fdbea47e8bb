"""The int8 model: format version 1 of the int8 folder, which README.md beside this file specifies.

A value is code * scale, with codes in [-127, 127] and one scale per row ([rows, 1]) or per matrix ([1, 1]). The head is
`transformer.wte` again and is not stored. Nothing here needs more than numpy and safetensors.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from picogpt_jax.config import Granularity, ModelConfig, check_names, section_from_dict
from picogpt_jax.errors import UserError, reason
from picogpt_jax.int8.layout import check_depth, check_finite, check_layout, int8_layout, layout_of
from picogpt_jax.text.vocabulary import Vocabulary

FORMAT = "picogpt-int8"
FORMAT_VERSION = 1
MAX_CODE = 127
EMBEDDINGS = ("transformer.wte", "transformer.wpe")

# A matrix whose largest value is below this is one of zeros: 1 / scale would overflow float32.
SMALLEST_ABSMAX = np.float32(2.0**-119)

# The `quantization` section of config.json: key -> the values that this version computes.
Choices = Mapping[str, tuple[Any, ...]]
QUANTIZATION_CHOICES: Choices = {
    "weight_bits": (8,),
    "weight_granularity": ("per_channel", "per_tensor"),
    "activation_bits": (8, None),
    "activation_granularity": ("per_token",),
    "symmetric": (True,),
    "quantize_attention": (False,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """What varies in how an int8 model computes: one scale per row or per matrix, and int8 or float32 activations."""

    weight_granularity: Granularity
    activation_bits: int | None

    def __post_init__(self) -> None:
        _check_quantization(dataclasses.asdict(self), QUANTIZATION_CHOICES)


@dataclasses.dataclass(frozen=True, eq=False)
class Int8Tensor:
    """A matrix on an int8 grid.

    Attributes:
        codes: int8 [rows, cols], in [-127, 127].
        scale: float32 [rows, 1], or [1, 1] for one scale in all.
    """

    codes: np.ndarray
    scale: np.ndarray

    def dequantize(self) -> np.ndarray:
        """float32 [rows, cols]: codes * scale."""
        return self.codes.astype(np.float32) * self.scale


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Int8Model:
    """A model as it is served. Construction checks every name, dtype, shape and value.

    Rows of the token table beyond the vocabulary, which pad it in training, are left out: of codes that are there
    already, so that a scale of the whole table stays that of the training.

    Attributes:
        model: the architecture.
        quantization: the granularity of the scales, and whether activations are int8.
        training: where the model comes from (step, val_loss, dataset, ...); JSON values.
        vocabulary: as many entries as `model.vocab_size`.
        matrices: nanoGPT's name without `.weight` -> matrix; exactly `model.matrix_shapes()`.
        vectors: LayerNorm weights and biases, float32; exactly `model.vector_shapes()`.

    Raises:
        UserError: on construction, naming the tensor, what was found and what was expected.
    """

    model: ModelConfig
    quantization: Quantization
    training: dict[str, Any]
    vocabulary: Vocabulary
    matrices: dict[str, Int8Tensor]
    vectors: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        if self.vocabulary.size > self.model.vocab_size:
            raise UserError(
                f"the vocabulary has {self.vocabulary.size} entries, but model.vocab_size={self.model.vocab_size}"
            )
        check_json("training", self.training)
        tensors = self.tensors()
        check_depth(self.model, tensors)
        check_layout(layout_of(tensors), int8_layout(self.model, self.quantization.weight_granularity))
        for name, array in tensors.items():
            _check_values(name, array)
        size, table = self.vocabulary.size, self.matrices["transformer.wte"]
        if size < self.model.vocab_size:
            table = Int8Tensor(table.codes[:size], table.scale[:size])  # of one scale, this is all of it
            object.__setattr__(self, "model", dataclasses.replace(self.model, vocab_size=size))
            object.__setattr__(self, "matrices", self.matrices | {"transformer.wte": table})

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors under the names of `model.safetensors`."""
        named = dict(self.vectors)
        for name, matrix in self.matrices.items():
            named[f"{name}.weight"] = matrix.codes
            named[f"{name}.weight_scale"] = matrix.scale
        return named

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors, as `model.safetensors` has them."""
        return sum(array.nbytes for array in self.tensors().values())

    def mixed(self) -> "Int8Model":
        """This model: its arithmetic is mixed, integers in the products and floats between them."""
        return self


def check_json(name: str, value: Any) -> None:
    """Raises a UserError if `value` is no dict of strict JSON (no NaN or infinity, no arrays of another library)."""
    if not isinstance(value, dict):
        raise UserError(f"{name} is a {type(value).__name__}; expected a dict")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{name} cannot be written as JSON: {reason(error)}") from None


def config_to_json(model: Int8Model) -> dict[str, Any]:
    """The contents of config.json."""
    varying = dataclasses.asdict(model.quantization)
    quantization = {name: varying.get(name, choices[0]) for name, choices in QUANTIZATION_CHOICES.items()}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(model.model),
        "quantization": quantization,
        "training": model.training,
    }


def config_from_json(value: Any) -> tuple[ModelConfig, Quantization, dict[str, Any]]:
    """Reads what `config_to_json` wrote.

    Raises:
        UserError: another format or version, an unknown or missing key, a value of the wrong type or out of range.
    """
    check_version(value, FORMAT_VERSION)
    model, quantization, training = read_sections(value, QUANTIZATION_CHOICES)
    varying = {field.name: quantization[field.name] for field in dataclasses.fields(Quantization)}
    return model, Quantization(**varying), training


def check_version(value: Any, *known: int) -> int:
    """The version that the contents of config.json state.

    Raises:
        UserError: another format, or a version that is not `known`.
    """
    found = value.get("format") if isinstance(value, dict) else None
    if found != FORMAT:
        raise UserError(f"format is {found!r:.60}; expected {FORMAT!r}: this is another kind of model")
    version = value.get("format_version")
    if type(version) is not int or version not in known:
        reads = " and ".join(map(str, known))
        raise UserError(f"format_version is {version!r:.40}; this picogpt_jax reads {reads}: update it")
    return version


def read_sections(
    value: dict[str, Any], choices: Choices, *more: str
) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
    """The sections model, quantization (values among `choices`) and training of config.json.

    Args:
        more: keys beside those that every version has.

    Raises:
        UserError: an unknown or missing key, a value of the wrong type or out of range.
    """
    check_names("config.json", value, ("format", "format_version", *more, "model", "quantization", "training"))
    check_json("training", value["training"])
    model, quantization = section_from_dict(ModelConfig, "model", value["model"]), value["quantization"]
    check_names("quantization", quantization, choices)
    _check_quantization(quantization, choices)
    return model, quantization, value["training"]


def _check_quantization(values: Mapping[str, Any], known: Choices) -> None:
    for name, value in values.items():
        choices = known[name]
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise UserError(f"quantization.{name}={value!r:.60} is not one of {', '.join(map(repr, choices))}")


def requantize_per_tensor(model: Int8Model) -> Int8Model:
    """The same model with one scale per matrix, for readers that know no other; its codes and its numbers change.

    Each matrix is dequantized and quantized again: scale = absmax / 127, codes = round_half_to_even(x * (1 / scale)).
    """
    if model.quantization.weight_granularity == "per_tensor":
        return model
    matrices = {name: _quantize_per_tensor(matrix.dequantize()) for name, matrix in model.matrices.items()}
    quantization = dataclasses.replace(model.quantization, weight_granularity="per_tensor")
    return dataclasses.replace(model, quantization=quantization, matrices=matrices)


def _quantize_per_tensor(values: np.ndarray) -> Int8Tensor:
    absmax = np.abs(values).max(keepdims=True)
    scale = np.where(absmax < SMALLEST_ABSMAX, np.float32(1), absmax) / np.float32(MAX_CODE)
    codes = np.rint(np.clip(values * (np.float32(1) / scale), -MAX_CODE, MAX_CODE))
    return Int8Tensor(codes.astype(np.int8), scale)


def _check_values(name: str, array: np.ndarray) -> None:
    if array.dtype == np.int8:
        if array.min() < -MAX_CODE:
            raise UserError(f"{name} holds the code -128; expected codes in [-{MAX_CODE}, {MAX_CODE}]")
        return
    check_finite(name, array)
    if name.endswith(".weight_scale") and not (array > 0).all():
        raise UserError(f"{name} holds a scale of {array.min()}; expected positive scales")
