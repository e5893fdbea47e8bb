"""picoGPT's int8 `.pt`: ours, which carries an int8 model exactly, and picoGPT's own (extra: torch).

    model_state_dict     <module>.weight_int8 int8 [out, in], .weight_scale float32 (a scalar, or [out, 1]),
                         .weight_zero_point int64 scalar 0, .bias, for each linear layer and `lm_head`;
                         float32 embeddings (the dequantized int8 ones) and LayerNorms
    quantization_stats, model_args, quantization_type ("full_int8")
    picogpt_jax          what that layout has no place for: config.json, vocab.json, the codes and scales of wpe

picoGPT's own files lack `picogpt_jax`, and have float embeddings: they give float parameters.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from picogpt_jax.config import Granularity, ModelConfig
from picogpt_jax.errors import UserError, errors_in
from picogpt_jax.formats.gpt2_tensors import TABLE, FloatCheckpoint, renamed
from picogpt_jax.formats.torch_checkpoint import check_expressible, model_args_of, model_from_args
from picogpt_jax.formats.torch_file import (
    EXTRA_KEY,
    check_keys,
    check_plain,
    checkpoint_kind,
    load_content,
    save_content,
    stored_tensors,
    torch,
)
from picogpt_jax.int8.int8_model import EMBEDDINGS, Int8Model, Int8Tensor, config_from_json, config_to_json
from picogpt_jax.int8.layout import Stored, check_depth, float_layout, read_as
from picogpt_jax.text.reading import vocabulary_from_json

QUANTIZATION_TYPE = "full_int8"
POSITIONS = "transformer.wpe"
# picoGPT rounds w / scale to a code: none is further from it than half a step, and float32's rounding.
HALF_STEP = np.float32(0.5001)


def save_int8_checkpoint(model: Int8Model, path: str | os.PathLike[str]) -> None:
    """Writes picoGPT's int8 file, with the model's codes as they are.

    Raises:
        UserError: picoGPT cannot compute the model's activation or LayerNorm, or the file cannot be written.
    """
    check_expressible(model.model)
    wpe = model.matrices[POSITIONS]
    config = json.loads(json.dumps(config_to_json(model)))  # a numpy float would need more than plain values to load
    content = {
        "model_state_dict": _state_dict(model),
        "quantization_stats": _quantization_stats(model),
        "model_args": model_args_of(model.model),
        "quantization_type": QUANTIZATION_TYPE,
        EXTRA_KEY: {
            "config": config,
            "vocabulary": model.vocabulary.to_json(),
            "wpe_int8": torch.tensor(wpe.codes),
            "wpe_scale": torch.tensor(wpe.scale),
        },
    }
    save_content(content, path)


def load_int8_checkpoint(path: str | os.PathLike[str]) -> Int8Model:
    """Reads an int8 file of `save_int8_checkpoint`, with the very codes and scales that were saved.

    Raises:
        UserError: the file is damaged, unsafe or of another kind; a tensor is unknown, missing or mis-shaped; an
            embedding is not the dequantized one; or the file is picoGPT's own, whose embeddings were never int8.
    """
    content = load_content(path)
    kind = checkpoint_kind(content, path)
    with errors_in(path):
        if kind != "torch-int8":
            what = "a float checkpoint" if kind == "torch-float" else "picoGPT's own int8 file, with float embeddings"
            raise UserError(f"this is {what}; expected an int8 one of ours: make a workdir of it, and quantize that")
        _check_type(content)
        extra = content[EXTRA_KEY]
        check_keys(EXTRA_KEY, extra, "config", "vocabulary", "wpe_int8", "wpe_scale")
        check_plain(f"{EXTRA_KEY}.config", extra["config"])
        check_plain(f"{EXTRA_KEY}.vocabulary", extra["vocabulary"])
        config, quantization, training = config_from_json(extra["config"])
        if content["model_args"] != model_args_of(config):
            raise UserError(f"model_args is {content['model_args']!r:.140}; {EXTRA_KEY} says {model_args_of(config)!r}")
        of_wpe = {f"{EXTRA_KEY}.{name}": extra[name] for name in ("wpe_int8", "wpe_scale")}
        found = _stored(content["model_state_dict"] | of_wpe, path)
        arrays = _read(config, quantization.weight_granularity, found, with_wpe=True)
        model = Int8Model(
            model=config,
            quantization=quantization,
            training=training,
            vocabulary=vocabulary_from_json(extra["vocabulary"], "vocabulary"),
            matrices={name: _int8_tensor(arrays, name) for name in config.matrix_shapes()},
            vectors={name: arrays[name] for name in config.vector_shapes()},
        )
        for name in EMBEDDINGS:
            if not np.array_equal(arrays[f"{name}.weight"], model.matrices[name].dequantize()):
                raise UserError(f"{name}.weight is not its int8 codes times their scales, but other values")
        return model


def load_picogpt_int8(path: str | os.PathLike[str]) -> FloatCheckpoint:
    """Reads the file of picoGPT's own quantization as float parameters: codes * scale, and the embeddings as they are.

    The head of our model is `wte`; picoGPT quantized its head from `wte`, so its codes are checked against it and left
    out. picoGPT writes the `model_args` of its Shakespeare model whatever it quantized: sizes are therefore those of
    the tensors. With the width the number of heads is believed, so the width must agree.

    Raises:
        UserError: the file is damaged, unsafe or of another kind; a tensor is unknown, missing or mis-shaped, or not
            finite; or the head is not the quantized token embedding.
    """
    content = load_content(path)
    kind = checkpoint_kind(content, path)
    with errors_in(path):
        if kind != "picogpt-int8":
            raise UserError("this is not an int8 file of picoGPT's own")
        _check_type(content)
        known = {key: x for key, x in content["model_args"].items() if key in ("n_embd", "n_head", "dropout")}
        found = _stored(content["model_state_dict"], path)
        model = model_from_args(known, found, path)
        arrays = _read(model, "per_tensor", found)
        for name, array in arrays.items():
            if name.endswith(".weight_scale") and array <= 0:
                raise UserError(f"{found[name].name} is {array}; expected a positive scale")
        head, table = _int8_tensor(arrays, "transformer.wte"), arrays[TABLE]
        distance = np.abs(table - head.dequantize()).max() / head.scale.item()
        if distance > HALF_STEP:
            raise UserError(
                f"lm_head is {distance:.3g} quantization steps away from {TABLE}; expected at most half a step: the "
                "head is tied to the embedding here, and this one is another matrix"
            )
        linear = [name for name in model.matrix_shapes() if name not in EMBEDDINGS]
        dequantized = {f"{name}.weight": _int8_tensor(arrays, name).dequantize() for name in linear}
        return FloatCheckpoint(model, {name: (arrays | dequantized)[name] for name in float_layout(model)})


def _stored(tensors: Any, path: str | os.PathLike[str]) -> dict[str, Stored]:
    return renamed(stored_tensors("model_state_dict", tensors, Path(path).stat().st_size))


def _read(
    model: ModelConfig, granularity: Granularity, found: Mapping[str, Stored], with_wpe: bool = False
) -> dict[str, np.ndarray]:
    """The tensors of the state dict, and the two of wpe that are ours alone, when they are exactly those expected."""
    check_depth(model, found)
    arrays = read_as(_layout(model, granularity, with_wpe), found)
    for name, array in arrays.items():
        if name.endswith(".weight_zero_point") and array != 0:
            raise UserError(f"{found[name].name} is {array}; expected 0: the grid is symmetric")
    return arrays


def _check_type(content: Mapping[Any, Any]) -> None:
    check_keys("the file", content, "model_state_dict", "quantization_type", "model_args")
    check_keys("model_state_dict", content["model_state_dict"])
    check_keys("model_args", content["model_args"])
    check_plain("model_args", content["model_args"])
    check_plain("quantization_type", content["quantization_type"])
    if content["quantization_type"] != QUANTIZATION_TYPE:
        raise UserError(f"quantization_type is {content['quantization_type']!r:.60}; expected {QUANTIZATION_TYPE!r}")


def _int8_tensor(arrays: Mapping[str, np.ndarray], name: str) -> Int8Tensor:
    codes, scale = _names(name)
    return Int8Tensor(arrays[codes], arrays[scale].reshape(-1, 1))


def _names(name: str) -> tuple[str, str]:
    """What the file calls the codes and the scales of a matrix: of the table in the head, of the positions in ours."""
    if name == POSITIONS:
        return f"{EXTRA_KEY}.wpe_int8", f"{EXTRA_KEY}.wpe_scale"
    return f"{_module(name)}.weight_int8", f"{_module(name)}.weight_scale"


def _module(name: str) -> str:
    return "lm_head" if name == "transformer.wte" else name


def _layout(model: ModelConfig, granularity: Granularity, with_wpe: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in model.matrix_shapes().items():
        codes, scale = _names(name)
        if name in EMBEDDINGS:
            layout[f"{name}.weight"] = ("float32", shape)
        if name != POSITIONS:
            layout[f"{_module(name)}.weight_zero_point"] = ("int64", ())
        if name != POSITIONS or with_wpe:
            whole = (1, 1) if name == POSITIONS else ()
            layout[codes] = ("int8", shape)
            layout[scale] = ("float32", (shape[0], 1) if granularity == "per_channel" else whole)
    return layout | {name: ("float32", shape) for name, shape in model.vector_shapes().items()}


def _state_dict(model: Int8Model) -> dict[str, torch.Tensor]:
    state = {name: torch.tensor(array) for name, array in model.vectors.items()}
    for name, matrix in model.matrices.items():
        if name in EMBEDDINGS:
            state[f"{name}.weight"] = torch.tensor(matrix.dequantize())
        if name != POSITIONS:
            codes, scale = _names(name)
            state[codes], state[scale] = torch.tensor(matrix.codes), torch.tensor(matrix.scale)
            if model.quantization.weight_granularity == "per_tensor":
                state[scale] = state[scale].reshape(())
            state[f"{_module(name)}.weight_zero_point"] = torch.tensor(0, dtype=torch.int64)
    return state


def _quantization_stats(model: Int8Model) -> dict[str, dict[str, Any]]:
    """Sizes of each int8 layer, and of all of them under `_summary`; bytes, scales included."""
    matrices = {_module(name): matrix for name, matrix in model.matrices.items() if name != POSITIONS}
    summary: dict[str, Any] = {"quantized_layers": len(matrices), "total_parameters": model.model.n_parameters}
    return {name: _sizes(x) for name, x in matrices.items()} | {"_summary": summary | _sizes(*matrices.values())}


def _sizes(*matrices: Int8Tensor) -> dict[str, Any]:
    original = sum(4 * x.codes.size for x in matrices)
    quantized = sum(x.codes.nbytes + x.scale.nbytes for x in matrices)
    return {"original_bytes": original, "quantized_bytes": quantized, "compression_ratio": original / quantized}
