"""PyTorch checkpoint files: picoGPT's int8 `.pt`, and nanoGPT's and picoGPT's float `ckpt.pt` (extra: torch).

A `.pt` file is a zip of a pickle and raw tensors. It is read with `weights_only=True`, which builds tensors and plain
values and runs nothing else; before that, the zip must declare no more bytes than the file has, and after it, every key
is accounted for.

The int8 file, as picoGPT's own sampler loads it:

    model_state_dict     <module>.weight_int8 int8 [out, in], .weight_scale float32 (a scalar, or [out, 1]),
                         .weight_zero_point int64 scalar 0, .bias, for each linear layer and `lm_head`;
                         float32 embeddings (the dequantized int8 ones) and LayerNorms
    quantization_stats, model_args, quantization_type ("full_int8")
    picogpt_jax          what that layout has no place for: config.json, vocab.json, the codes and scales of wpe

picoGPT dequantizes and computes in float, so its logits are close to ours, not equal. It loads a scalar scale only: for
it, write with `requantize="per_tensor"`, unless the model is per_tensor already.
"""

import dataclasses
import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError("this needs PyTorch; install it with: pip install 'picogpt_jax[torch]'") from error

from picogpt_jax.config import ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.files import atomic_path
from picogpt_jax.int8_model import (
    Int8Model,
    Int8Tensor,
    Quantization,
    check_depth,
    check_finite,
    check_layout,
    config_from_json,
    config_to_json,
    errors_in,
    requantize_per_tensor,
)
from picogpt_jax.vocabulary import Vocabulary

OLDEST_SAFE_TORCH = (2, 10)
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
QUANTIZATION_TYPE = "full_int8"
EXTRA_KEY = "picogpt_jax"
EMBEDDINGS = ("transformer.wte", "transformer.wpe")
HEAD = "lm_head"

# The layer norm of picoGPT and nanoGPT; they know the exact GELU alone, too.
THEIR_EPSILON = 1e-5

COMPILED_PREFIX = "_orig_mod."  # torch.compile puts it in front of every key
CAUSAL_MASK = re.compile(r"transformer\.h\.\d+\.attn\.bias")  # a buffer of old nanoGPT releases, not a parameter

DTYPES = (torch.float32, torch.int8, torch.int64)
MAX_PLAIN_VALUES = 1 << 20


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
    _check_expressible(model.model)
    if requantize == "per_tensor":
        model = requantize_per_tensor(model)
    wpe = model.matrices["transformer.wpe"]
    config = json.loads(json.dumps(config_to_json(model)))  # a numpy float would need more than plain values to load
    content = {
        "model_state_dict": _int8_state_dict(model),
        "quantization_stats": _quantization_stats(model),
        "model_args": _model_args(model.model),
        "quantization_type": QUANTIZATION_TYPE,
        EXTRA_KEY: {
            "config": config,
            "vocabulary": model.vocabulary.to_json(),
            "wpe_int8": torch.tensor(wpe.codes),
            "wpe_scale": torch.tensor(wpe.scale),
        },
    }
    _save(content, path)


def load_int8_checkpoint(path: str | os.PathLike[str]) -> Int8Model:
    """Reads an int8 file of `save_int8_checkpoint`, with the very codes and scales that were saved.

    Raises:
        UserError: the file is damaged, unsafe or of another kind; a tensor is unknown, missing or mis-shaped; an
            embedding is not the dequantized one; or the file is picoGPT's own, whose embeddings were never int8.
    """
    content = _load(path)
    with errors_in(path):
        if _kind(content) != "int8":
            raise UserError("this is a float checkpoint; expected an int8 one: quantize it first")
        if EXTRA_KEY not in content:
            raise UserError(
                "this is picoGPT's own int8 file: its embeddings are float32 and its head is untied, so it cannot be "
                "read without quantizing it again, which is not supported; train or convert with picogpt_jax instead"
            )
        _check_keys("the file", content, "model_state_dict", "quantization_type", "model_args", EXTRA_KEY)
        _check_keys("model_state_dict", content["model_state_dict"])
        _check_plain("model_args", content["model_args"])
        _check_plain("quantization_type", content["quantization_type"])
        if content["quantization_type"] != QUANTIZATION_TYPE:
            raise UserError(f"quantization_type is {content['quantization_type']!r}; expected {QUANTIZATION_TYPE!r}")
        extra = content[EXTRA_KEY]
        _check_keys(EXTRA_KEY, extra, "config", "vocabulary", "wpe_int8", "wpe_scale")
        _check_plain(f"{EXTRA_KEY}.config", extra["config"])
        _check_plain(f"{EXTRA_KEY}.vocabulary", extra["vocabulary"])
        config, quantization, training = config_from_json(extra["config"])
        if content["model_args"] != _model_args(config):
            raise UserError(f"model_args is {content['model_args']!r}; {EXTRA_KEY} says {_model_args(config)!r}")
        tensors = dict(content["model_state_dict"])
        tensors |= {f"{EXTRA_KEY}.{name}": extra[name] for name in ("wpe_int8", "wpe_scale")}
        arrays = _checked_arrays(tensors, Path(path).stat().st_size)
        check_depth(config, arrays)
        check_layout(_layout(arrays), _int8_file_layout(config, quantization))
        model = Int8Model(
            model=config,
            quantization=quantization,
            training=training,
            vocabulary=Vocabulary.from_json(extra["vocabulary"], "vocabulary"),
            matrices={name: _int8_tensor(arrays, name) for name in config.matrix_shapes()},
            vectors={name: arrays[name] for name in config.vector_shapes()},
        )
        _check_int8_redundancy(model, arrays)
        return model


def _int8_tensor(arrays: Mapping[str, np.ndarray], name: str) -> Int8Tensor:
    if name == "transformer.wpe":
        return Int8Tensor(arrays[f"{EXTRA_KEY}.wpe_int8"], arrays[f"{EXTRA_KEY}.wpe_scale"])
    module = _module(name)
    return Int8Tensor(arrays[f"{module}.weight_int8"], arrays[f"{module}.weight_scale"].reshape(-1, 1))


def _check_int8_redundancy(model: Int8Model, arrays: Mapping[str, np.ndarray]) -> None:
    """What the file says twice must agree, and every zero point must be 0."""
    for name, array in arrays.items():
        if name.endswith(".weight_zero_point") and array != 0:
            raise UserError(f"{name} is {array}; expected 0: the grid is symmetric")
    for name in EMBEDDINGS:
        if not np.array_equal(arrays[f"{name}.weight"], model.matrices[name].dequantize()):
            raise UserError(f"{name}.weight is not its int8 codes times their scales; expected exactly these values")


def save_float_checkpoint(
    model: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    path: str | os.PathLike[str],
    *,
    iter_num: int,
    best_val_loss: float,
    config: dict[str, Any],
    vocabulary: Vocabulary,
) -> None:
    """Writes nanoGPT's and picoGPT's float `ckpt.pt`, without an optimizer state.

    Args:
        model: the architecture.
        tensors: float32, nanoGPT's names, matrices [out, in], without the tied `lm_head.weight`, which is added.
        path: the file.
        iter_num: optimizer steps made.
        best_val_loss: nats per token.
        config: the training configuration; plain values.
        vocabulary: the tokens.

    Raises:
        UserError: a tensor is unknown, missing or mis-shaped, their code cannot compute the model's activation or
            LayerNorm, or the file cannot be written.
    """
    _check_expressible(model)
    _check_plain("config", config)
    check_layout(_layout(tensors), _float_layout(model))
    state = {name: torch.tensor(array) for name, array in tensors.items()}
    state[f"{HEAD}.weight"] = state["transformer.wte.weight"]  # one storage, as their tied modules have it
    content = {
        "model": state,
        "model_args": _model_args(model),
        "iter_num": int(iter_num),
        "best_val_loss": float(best_val_loss),  # a numpy float would need more than plain values to load
        "config": config,
        EXTRA_KEY: {"vocabulary": vocabulary.to_json()},
    }
    _save(content, path)


@dataclasses.dataclass(frozen=True, eq=False)
class FloatCheckpoint:
    """A float `ckpt.pt`.

    Attributes:
        model: the architecture; `mlp_ratio` is inferred from the tensors.
        tensors: float32, nanoGPT's names, matrices [out, in], without the tied `lm_head.weight`.
        iter_num: optimizer steps made.
        best_val_loss: nats per token.
        config: the training configuration, as it was stored.
        vocabulary: None where another program wrote the file.
    """

    model: ModelConfig
    tensors: dict[str, np.ndarray]
    iter_num: int
    best_val_loss: float
    config: dict[str, Any]
    vocabulary: Vocabulary | None


def load_float_checkpoint(path: str | os.PathLike[str]) -> FloatCheckpoint:
    """Reads nanoGPT's or picoGPT's float `ckpt.pt`.

    Ignored on purpose: the optimizer state and any other top-level key, and the causal masks of old nanoGPT releases.

    Raises:
        UserError: the file is damaged, unsafe or of another kind; a tensor is unknown, missing, mis-shaped, not float32
            or not finite; or the head is not tied to the token embedding.
    """
    content = _load(path)
    with errors_in(path):
        if _kind(content) != "float":
            raise UserError("this is an int8 checkpoint; expected a float one")
        _check_keys("the file", content, "model", "model_args", "iter_num", "best_val_loss", "config")
        _check_plain("model_args", content["model_args"])
        _check_plain("config", content["config"])
        tensors = _without_prefix(content["model"])
        masks = {name for name in tensors if CAUSAL_MASK.fullmatch(name)}
        parameters = {name: tensor for name, tensor in tensors.items() if name not in masks}
        arrays = _checked_arrays(parameters, Path(path).stat().st_size)
        model = _float_config(content["model_args"], arrays)
        check_depth(model, arrays)
        head = ("float32", (model.vocab_size, model.n_embd))
        check_layout(_layout(arrays), _float_layout(model) | {f"{HEAD}.weight": head})
        for name, array in arrays.items():
            check_finite(name, array)
        if not np.array_equal(arrays.pop(f"{HEAD}.weight"), arrays["transformer.wte.weight"]):
            raise UserError(f"{HEAD}.weight differs from transformer.wte.weight; expected a head tied to the embedding")
        return FloatCheckpoint(
            model=model,
            tensors=arrays,
            iter_num=_number(content, "iter_num", int),
            best_val_loss=_number(content, "best_val_loss", float),
            config=content["config"],
            vocabulary=_vocabulary(content.get(EXTRA_KEY)),
        )


def _number(content: Mapping[str, Any], key: str, kind: type) -> Any:
    """A number of the file; nanoGPT stores its best loss as a tensor of one element."""
    value = content[key]
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type == "cpu":
        value = value.item()
    if type(value) not in (int, float):
        raise UserError(f"{key} is {type(value).__name__}; expected a number")
    return kind(value)


def _vocabulary(extra: Any) -> Vocabulary | None:
    if extra is None:
        return None
    _check_keys(EXTRA_KEY, extra, "vocabulary")
    _check_plain(f"{EXTRA_KEY}.vocabulary", extra["vocabulary"])
    return Vocabulary.from_json(extra["vocabulary"], f"{EXTRA_KEY}.vocabulary")


def _float_config(model_args: Any, arrays: Mapping[str, np.ndarray]) -> ModelConfig:
    _check_keys("model_args", model_args, *MODEL_ARGS)
    unknown = sorted(map(str, set(model_args) - set(MODEL_ARGS)))
    if unknown:
        raise UserError(f"model_args has unknown keys {unknown}; it knows {sorted(MODEL_ARGS)}")
    fixed: dict[str, Any] = {"activation": "gelu", "layer_norm_epsilon": THEIR_EPSILON}
    model = ModelConfig(**model_args, mlp_ratio=1, **fixed)
    hidden = arrays.get("transformer.h.0.mlp.c_fc.weight")
    if hidden is None or hidden.ndim != 2 or len(hidden) % model.n_embd:
        found = "missing" if hidden is None else f"of shape {list(hidden.shape)}"
        raise UserError(
            f"transformer.h.0.mlp.c_fc.weight is {found}; expected [a multiple of {model.n_embd}, {model.n_embd}]"
        )
    return dataclasses.replace(model, mlp_ratio=len(hidden) // model.n_embd)


def _without_prefix(tensors: Any) -> dict[Any, Any]:
    _check_keys("model", tensors)
    renamed = {name.removeprefix(COMPILED_PREFIX) if isinstance(name, str) else name: x for name, x in tensors.items()}
    if len(renamed) < len(tensors):
        raise UserError(f"tensors occur twice, with and without the prefix {COMPILED_PREFIX!r}")
    return renamed


def is_torch_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is, or by its name means to be, a PyTorch file; loading a damaged one says what is wrong."""
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix in (".pt", ".pth"):
        return True
    try:
        return any(record.filename.endswith("/data.pkl") for record in _records(path))
    except UserError:
        return False


def checkpoint_kind(path: str | os.PathLike[str]) -> Literal["int8", "float"]:
    """Which of the two layouts the file has.

    Raises:
        UserError: it has neither, or is damaged or unsafe.
    """
    content = _load(path)
    with errors_in(path):
        return _kind(content)


def _kind(content: Mapping[Any, Any]) -> Literal["int8", "float"]:
    if "model_state_dict" in content and "quantization_type" in content:
        return "int8"
    if "model" in content and "model_args" in content:
        return "float"
    raise UserError(f"it has the keys {sorted(map(str, content))}; expected picoGPT's int8 file or nanoGPT's ckpt.pt")


def _load(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Reads tensors and plain values, and nothing else; tensors stay on disk until they are used."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_SAFE_TORCH:
        raise UserError(
            f"torch {torch.__version__} can be made to run code by a .pt file (CVE-2026-24747); install torch >= 2.10"
        )
    _check_archive(Path(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a malformed pickle may raise anything: UnpicklingError, RuntimeError, KeyError, ...
        raise UserError(
            f"{path} cannot be read as tensors and plain values ({type(error).__name__}): it is damaged, or holds "
            "other Python objects, which are never loaded because they can run code; save the model again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a dict")
    return content


def _records(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (
        Exception
    ) as error:  # a malformed table may raise anything: BadZipFile, UnicodeDecodeError, struct.error, ...
        raise UserError(f"{path} is no PyTorch checkpoint, or is truncated ({error}); save the model again") from None


def _check_archive(path: Path) -> None:
    """PyTorch stores its records uncompressed: together they cannot be larger than the file, or this is a zip bomb."""
    records = _records(path)
    declared, size = sum(record.file_size for record in records), path.stat().st_size
    if declared > size or any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise UserError(
            f"{path} has {size} bytes but declares {declared}, or is compressed; PyTorch writes neither: not loaded"
        )


def _checked_arrays(tensors: Mapping[Any, Any], file_size: int) -> dict[str, np.ndarray]:
    """The tensors in memory. Views can repeat a few stored bytes without end, so their sizes are bounded first."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{name!r} is a {type(tensor).__name__}; expected a tensor under a name")
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{name} is {tensor.dtype} ({tensor.layout}); expected one of {DTYPES}")
    declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if declared > 2 * file_size:  # tied tensors are stored once and named twice
        raise UserError(f"the tensors declare {declared} bytes in a file of {file_size}; it is not loaded")
    in_order = torch.contiguous_format
    return {name: tensor.detach().clone(memory_format=in_order).numpy() for name, tensor in tensors.items()}


def _check_plain(name: str, value: Any) -> None:
    """Numbers, strings, None, dicts and lists of them; bounded, as a few nested lists can stand for billions."""
    pending, seen = [value], 0
    while pending:
        item = pending.pop()
        seen += 1
        if seen + len(pending) > MAX_PLAIN_VALUES:
            raise UserError(f"{name} has more than {MAX_PLAIN_VALUES} values; it is not loaded")
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            pending += item
        elif type(item) not in (bool, int, float, str, type(None)):
            raise UserError(f"{name} holds a {type(item).__name__}; expected plain values")


def _save(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)  # into an open file, so that its name is not part of the content


def _check_keys(where: str, found: Any, *expected: str) -> None:
    if not isinstance(found, dict):
        raise UserError(f"{where} is a {type(found).__name__}; expected a dict")
    missing = [key for key in expected if key not in found]
    if missing:
        raise UserError(f"{where} lacks the keys {missing}")


def _check_expressible(model: ModelConfig) -> None:
    """Their checkpoints do not name these; their code has one of each."""
    if model.activation != "gelu":
        raise UserError(f"model.activation={model.activation!r}, but picoGPT and nanoGPT compute 'gelu' only")
    if model.layer_norm_epsilon != THEIR_EPSILON:
        raise UserError(
            f"model.layer_norm_epsilon={model.layer_norm_epsilon}, but picoGPT and nanoGPT use {THEIR_EPSILON} only"
        )


def _model_args(model: ModelConfig) -> dict[str, Any]:
    return {name: getattr(model, name) for name in MODEL_ARGS}


def _module(name: str) -> str:
    """The module that holds the int8 codes of the matrix `name`."""
    return HEAD if name == "transformer.wte" else name


def _layout(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(array.dtype), array.shape) for name, array in arrays.items()}


def _float_layout(model: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    matrices = {f"{name}.weight": ("float32", shape) for name, shape in model.matrix_shapes().items()}
    return matrices | {name: ("float32", shape) for name, shape in model.vector_shapes().items()}


def _int8_file_layout(model: ModelConfig, quantization: Quantization) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of the state dict, and the two of the extra key."""
    per_channel = quantization.weight_granularity == "per_channel"
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in model.matrix_shapes().items():
        if name in EMBEDDINGS:
            layout[f"{name}.weight"] = ("float32", shape)
        if name != "transformer.wpe":
            layout[f"{_module(name)}.weight_int8"] = ("int8", shape)
            layout[f"{_module(name)}.weight_scale"] = ("float32", (shape[0], 1) if per_channel else ())
            layout[f"{_module(name)}.weight_zero_point"] = ("int64", ())
    layout[f"{EXTRA_KEY}.wpe_int8"] = ("int8", (model.block_size, model.n_embd))
    layout[f"{EXTRA_KEY}.wpe_scale"] = ("float32", (model.block_size if per_channel else 1, 1))
    return layout | {name: ("float32", shape) for name, shape in model.vector_shapes().items()}


def _int8_state_dict(model: Int8Model) -> dict[str, torch.Tensor]:
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
