"""picoGPT's int8 `.pt`: ours, which carries an int8 model exactly, and picoGPT's own (extra: torch).

As picoGPT's sampler loads it:

    model_state_dict     <module>.weight_int8 int8 [out, in], .weight_scale float32 (a scalar, or [out, 1]),
                         .weight_zero_point int64 scalar 0, .bias, for each linear layer and `lm_head`;
                         float32 embeddings (the dequantized int8 ones) and LayerNorms
    quantization_stats, model_args, quantization_type ("full_int8")
    picogpt_jax          what that layout has no place for: config.json, vocab.json, the codes and scales of wpe

picoGPT dequantizes and computes in float, so its logits are close to ours, not equal. It loads a scalar scale only: for
it, write with `requantize="per_tensor"`, unless the model is per_tensor already.

The files that picoGPT writes itself lack `picogpt_jax`, have float embeddings that were never int8, and a head that is
another matrix than `wte`: they are no int8 model of ours, but they give float parameters (`load_picogpt_int8`).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError("this needs PyTorch; install it with: pip install 'picogpt_jax[torch]'") from error

from picogpt_jax.config import Granularity, ModelConfig
from picogpt_jax.errors import UserError, errors_in
from picogpt_jax.formats.torch_checkpoint import (
    HEAD,
    HIDDEN,
    FloatCheckpoint,
    check_expressible,
    model_args_of,
    model_from_args,
)
from picogpt_jax.formats.torch_file import (
    EXTRA_KEY,
    check_keys,
    check_plain,
    checked_arrays,
    content_kind,
    load_content,
    save_content,
    without_prefix,
)
from picogpt_jax.int8.int8_model import (
    EMBEDDINGS,
    Int8Model,
    Int8Tensor,
    config_from_json,
    config_to_json,
    requantize_per_tensor,
)
from picogpt_jax.int8.layout import check_depth, check_finite, check_layout, layout_of
from picogpt_jax.text.reading import vocabulary_from_json

QUANTIZATION_TYPE = "full_int8"
# picoGPT rounds w / scale to a code: none is further from it than half a step, and float32's rounding.
HALF_STEP = np.float32(0.5001)


def save_int8_checkpoint(
    model: Int8Model, path: str | os.PathLike[str], requantize: Literal["per_tensor"] | None = None
) -> None:
    """Writes picoGPT's int8 file.

    Args:
        model: the int8 model; its codes are written unchanged, unless `requantize` is given.
        path: the file.
        requantize: "per_tensor" gives a per_channel model one scale per matrix first, as picoGPT's loader wants it.

    Raises:
        UserError: picoGPT cannot compute the model's activation or LayerNorm, or the file cannot be written.
    """
    if requantize not in (None, "per_tensor"):
        raise UserError(f"requantize={requantize!r} is not one of None, 'per_tensor'")
    check_expressible(model.model)
    if requantize == "per_tensor":
        model = requantize_per_tensor(model)
    wpe = model.matrices["transformer.wpe"]
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
    with errors_in(path):
        if content_kind(content) == "float":
            raise UserError("this is a float checkpoint; expected an int8 one: quantize it first")
        if content_kind(content) == "picogpt-int8":
            raise UserError(
                "this is picoGPT's own int8 file: its embeddings are float32 and its head is untied, so it is no int8 "
                "model of ours; make a float workdir of it with scripts/convert.py --to=checkpoint --data=DIR, and "
                "quantize that"
            )
        _check_type(content)
        extra = content[EXTRA_KEY]
        check_keys(EXTRA_KEY, extra, "config", "vocabulary", "wpe_int8", "wpe_scale")
        check_plain(f"{EXTRA_KEY}.config", extra["config"])
        check_plain(f"{EXTRA_KEY}.vocabulary", extra["vocabulary"])
        config, quantization, training = config_from_json(extra["config"])
        if content["model_args"] != model_args_of(config):
            raise UserError(f"model_args is {content['model_args']!r}; {EXTRA_KEY} says {model_args_of(config)!r}")
        tensors = dict(content["model_state_dict"])
        tensors |= {f"{EXTRA_KEY}.{name}": extra[name] for name in ("wpe_int8", "wpe_scale")}
        arrays = checked_arrays(tensors, Path(path).stat().st_size)
        check_depth(config, arrays)
        granularity = quantization.weight_granularity
        check_layout(layout_of(arrays), _state_layout(config, granularity) | _extra_layout(config, granularity))
        _check_zero_points(arrays)
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
                raise UserError(
                    f"{name}.weight is not its int8 codes times their scales; expected exactly these values"
                )
        return model


def load_picogpt_int8(path: str | os.PathLike[str]) -> FloatCheckpoint:
    """Reads the file of picoGPT's own quantization as float parameters: codes * scale, and the embeddings as they are.

    The head of our model is `wte`; picoGPT quantized its head from `wte`, so its codes are checked against it and left
    out. picoGPT writes the `model_args` of its Shakespeare model whatever it quantized: the size of the vocabulary is
    therefore taken from `wte`, and everything else must agree with the tensors.

    Raises:
        UserError: the file is damaged, unsafe or of another kind; a tensor is unknown, missing or mis-shaped, or not
            finite; or the head is not the quantized token embedding.
    """
    content = load_content(path)
    with errors_in(path):
        if content_kind(content) != "picogpt-int8":
            raise UserError("this is not an int8 file of picoGPT's own")
        _check_type(content)
        tensors = without_prefix(content["model_state_dict"], "model_state_dict")
        arrays = checked_arrays(tensors, Path(path).stat().st_size)
        table = arrays.get("transformer.wte.weight")
        model_args = content["model_args"]
        if isinstance(model_args, dict) and table is not None and table.ndim == 2:
            model_args = model_args | {"vocab_size": len(table)}
        model = model_from_args(model_args, arrays, f"{HIDDEN}.weight_int8")
        check_depth(model, arrays)
        check_layout(layout_of(arrays), _state_layout(model, "per_tensor"))
        _check_zero_points(arrays)
        for name, array in arrays.items():
            check_finite(name, array)
            if name.endswith(".weight_scale") and array <= 0:
                raise UserError(f"{name} is {array}; expected a positive scale")
        head = Int8Tensor(arrays[f"{HEAD}.weight_int8"], arrays[f"{HEAD}.weight_scale"].reshape(1, 1))
        distance = np.abs(arrays["transformer.wte.weight"] - head.dequantize()).max() / head.scale.item()
        if distance > HALF_STEP:
            raise UserError(
                f"{HEAD} is {distance:.3g} quantization steps away from transformer.wte.weight; expected at most half "
                "a step: the head is tied to the embedding here, and this one is another matrix"
            )
        parameters = {name: arrays[name] for name in model.vector_shapes()}
        for name in model.matrix_shapes():
            is_float = name in EMBEDDINGS
            parameters[f"{name}.weight"] = (
                arrays[f"{name}.weight"] if is_float else _int8_tensor(arrays, name).dequantize()
            )
        return FloatCheckpoint(model, parameters, iter_num=0, best_val_loss=float("inf"), config={}, vocabulary=None)


def _check_type(content: Mapping[Any, Any]) -> None:
    check_keys("the file", content, "model_state_dict", "quantization_type", "model_args")
    check_keys("model_state_dict", content["model_state_dict"])
    check_plain("model_args", content["model_args"])
    check_plain("quantization_type", content["quantization_type"])
    if content["quantization_type"] != QUANTIZATION_TYPE:
        raise UserError(f"quantization_type is {content['quantization_type']!r}; expected {QUANTIZATION_TYPE!r}")


def _check_zero_points(arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if name.endswith(".weight_zero_point") and array != 0:
            raise UserError(f"{name} is {array}; expected 0: the grid is symmetric")


def _int8_tensor(arrays: Mapping[str, np.ndarray], name: str) -> Int8Tensor:
    if name == "transformer.wpe":
        return Int8Tensor(arrays[f"{EXTRA_KEY}.wpe_int8"], arrays[f"{EXTRA_KEY}.wpe_scale"])
    module = _module(name)
    return Int8Tensor(arrays[f"{module}.weight_int8"], arrays[f"{module}.weight_scale"].reshape(-1, 1))


def _module(name: str) -> str:
    """The module that holds the int8 codes of the matrix `name`."""
    return HEAD if name == "transformer.wte" else name


def _state_layout(model: ModelConfig, granularity: Granularity) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of the state dict."""
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in model.matrix_shapes().items():
        if name in EMBEDDINGS:
            layout[f"{name}.weight"] = ("float32", shape)
        if name != "transformer.wpe":
            layout[f"{_module(name)}.weight_int8"] = ("int8", shape)
            layout[f"{_module(name)}.weight_scale"] = ("float32", (shape[0], 1) if granularity == "per_channel" else ())
            layout[f"{_module(name)}.weight_zero_point"] = ("int64", ())
    return layout | {name: ("float32", shape) for name, shape in model.vector_shapes().items()}


def _extra_layout(model: ModelConfig, granularity: Granularity) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The two tensors under `EXTRA_KEY`."""
    rows = model.block_size if granularity == "per_channel" else 1
    return {
        f"{EXTRA_KEY}.wpe_int8": ("int8", (model.block_size, model.n_embd)),
        f"{EXTRA_KEY}.wpe_scale": ("float32", (rows, 1)),
    }


def _state_dict(model: Int8Model) -> dict[str, torch.Tensor]:
    state = {name: torch.tensor(array) for name, array in model.vectors.items()}
    for name, matrix in model.matrices.items():
        if name in EMBEDDINGS:
            state[f"{name}.weight"] = torch.tensor(matrix.dequantize())
        if name != "transformer.wpe":
            scale = torch.tensor(matrix.scale)
            per_tensor = model.quantization.weight_granularity == "per_tensor"
            state[f"{_module(name)}.weight_int8"] = torch.tensor(matrix.codes)
            state[f"{_module(name)}.weight_scale"] = scale.reshape(()) if per_tensor else scale
            state[f"{_module(name)}.weight_zero_point"] = torch.tensor(0, dtype=torch.int64)
    return state


def _quantization_stats(model: Int8Model) -> dict[str, dict[str, Any]]:
    """Sizes of each int8 layer, and of all of them under `_summary`; bytes, scales included."""
    matrices = {_module(name): matrix for name, matrix in model.matrices.items() if name != "transformer.wpe"}
    stats = {name: _sizes(4 * x.codes.size, x.codes.nbytes + x.scale.nbytes) for name, x in matrices.items()}
    totals = [sum(layer[key] for layer in stats.values()) for key in ("original_bytes", "quantized_bytes")]
    summary: dict[str, Any] = {"quantized_layers": len(stats), "total_parameters": model.model.n_parameters}
    return stats | {"_summary": summary | _sizes(*totals)}


def _sizes(original_bytes: int, quantized_bytes: int) -> dict[str, Any]:
    ratio = original_bytes / quantized_bytes
    return {"original_bytes": original_bytes, "quantized_bytes": quantized_bytes, "compression_ratio": ratio}
