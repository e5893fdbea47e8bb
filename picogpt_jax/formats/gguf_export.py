"""The int8 model as a GGUF file for llama.cpp: architecture `gpt2`, matrices in Q8_0 (extra: gguf).

A Q8_0 block is 32 codes of a row and their scale in float16, which moves it by at most 2**-11 of its value, a tiny one
by 2**-8; a matrix whose scales float16 cannot hold is float32. llama.cpp asks for every bias: zeros where there is
none. No token ends a text: llama.cpp would take id 11 of GPT-2's kind of tokenizer for it where a file names none, so
the tokenizer is RWKV's, a plain list of byte strings without special tokens.

Formats: ggml's docs/gguf.md; llama.cpp's src/llama-vocab.cpp and src/models/gpt2.cpp.
"""

import dataclasses
import json
import os
from typing import Any

import numpy as np

try:
    import gguf
except ImportError as error:
    raise ImportError("this needs gguf; install it with: pip install 'picogpt_jax[gguf]'") from error

from picogpt_jax.config import ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.files import atomic_path
from picogpt_jax.int8.int8_model import Int8Model, Int8Tensor, config_to_json
from picogpt_jax.text.tokenizer import TokenizerVocabulary
from picogpt_jax.text.vocabulary import Vocabulary

BLOCK = 32  # codes that share a scale
ROUNDING, LARGEST_ERROR = 2.0**-11, 2.0**-8  # of a scale in float16, relative: with all its bits, and where it will do

BLOCK_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def gguf_names(model: ModelConfig) -> dict[str, str]:
    """All tensors that llama.cpp's gpt2 loads: our name -> its name; every bias, also where `model.bias` is false."""
    modules = {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"}
    for layer in range(model.n_layer):
        for ours, theirs in BLOCK_NAMES.items():
            modules[f"transformer.h.{layer}.{ours}"] = f"blk.{layer}.{theirs}"
    vectors = dataclasses.replace(model, bias=True).vector_shapes()
    names = [*(f"{matrix}.weight" for matrix in model.matrix_shapes()), *vectors]
    return {name: f"{modules[module]}.{kind}" for name in names for module, kind in [name.rsplit(".", 1)]}


def token_string(char: str) -> str:
    """A character of one byte as RWKV's vocabulary writes it: printable ones as they are, but for the backslash."""
    return char if " " <= char <= "~" and char != "\\" else f"\\x{ord(char):02x}"


def scale_error(tensor: Int8Tensor) -> float:
    """By how much of its value float16 moves a scale, at most."""
    with np.errstate(over="ignore"):  # a scale beyond float16 becomes infinite, and so does its error
        return float(np.abs(tensor.scale.astype(np.float16) / tensor.scale - 1).max())


def q8_0_blocks(name: str, tensor: Int8Tensor) -> np.ndarray:
    """The matrix as Q8_0: uint8 [rows, cols / 32 * 34], each block a little-endian float16 scale and 32 int8 codes.

    Raises:
        UserError: 32 does not divide the columns.
    """
    rows, cols = tensor.codes.shape
    if cols % BLOCK:
        raise UserError(
            f"{name} has rows of {cols}; Q8_0 holds blocks of {BLOCK}: train with a model.n_embd that {BLOCK} divides"
        )
    scale = np.broadcast_to(tensor.scale.astype("<f2"), (rows, cols // BLOCK))
    blocks = np.empty((rows, cols // BLOCK, 2 + BLOCK), np.uint8)
    blocks[..., :2] = np.ascontiguousarray(scale)[..., None].view(np.uint8)
    blocks[..., 2:] = tensor.codes.reshape(rows, -1, BLOCK).view(np.uint8)
    return blocks.reshape(rows, -1)


def save_gguf(model: Int8Model, path: str | os.PathLike[str]) -> str:
    """Writes the file.

    Returns:
        what float16 costs where scales are too small or too large for all its bits, as a line; "": nothing.

    Raises:
        UserError: llama.cpp or Q8_0 cannot hold the model (the message says what and why), or `path` cannot be written.
    """
    _check_expressible(model)
    vectors = {
        name: model.vectors.get(name, np.zeros(shape, np.float32))
        for name, shape in dataclasses.replace(model.model, bias=True).vector_shapes().items()
    }
    errors = {name: scale_error(matrix) for name, matrix in model.matrices.items()}
    tensors = vectors | {
        f"{name}.weight": q8_0_blocks(name, matrix) if errors[name] <= LARGEST_ERROR else matrix.dequantize()
        for name, matrix in model.matrices.items()
    }
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "gpt2")
        _add_description(writer, model)
        _add_architecture(writer, model.model)
        _add_vocabulary(writer, model.vocabulary)
        for name, gguf_name in gguf_names(model.model).items():
            kind = gguf.GGMLQuantizationType.Q8_0 if tensors[name].dtype == np.uint8 else None
            writer.add_tensor(gguf_name, tensors[name], raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return _cost(model, errors)


def _cost(model: Int8Model, errors: dict[str, float]) -> str:
    """A line about the matrices whose scales float16 moves by more than rounding, by these errors."""
    tiny = [error for error in errors.values() if ROUNDING < error <= LARGEST_ERROR]
    wide = [name for name, error in errors.items() if error > LARGEST_ERROR]
    parts = []
    if tiny:
        parts.append(f"float16 moves the scales of {len(tiny)} of {len(errors)} matrices by up to {max(tiny):.2%}")
    if wide:
        more = sum(model.matrices[name].codes.size for name in wide) * (3 * BLOCK - 2) // BLOCK
        others = f" and {len(wide) - 1} more" if len(wide) > 1 else ""
        parts.append(f"float16 does not hold the scales of {wide[0]}{others}: float32 instead, {more:,} bytes more")
    return "; ".join(parts)


def _check_expressible(model: Int8Model) -> None:
    if model.model.activation == "relu":
        raise UserError("model.activation='relu' cannot be a GGUF of GPT-2: llama.cpp computes GELU there")
    model.vocabulary.require_text()
    if isinstance(model.vocabulary, TokenizerVocabulary):
        raise UserError(
            "the vocabulary is one of byte pairs, imported with its model; a GGUF is written of characters only: "
            "convert the original model with llama.cpp's own script"
        )
    wide = [char for char in model.vocabulary.itos if not char.isascii()]
    if wide:
        raise UserError(
            f"the vocabulary has {len(wide)} characters such as {wide[0]!r} (U+{ord(wide[0]):04X}) of more than one "
            "byte in UTF-8, which cannot be one token of a GGUF of GPT-2; use another format, or train on ASCII text"
        )


def _add_description(writer: gguf.GGUFWriter, model: Int8Model) -> None:
    training = model.training
    dataset = training.get("dataset")
    parts = [f"A character-level GPT with {model.model.n_parameters:,} parameters, int8 codes as trained"]
    if dataset:
        parts.append(f"on {dataset}")
        writer.add_dataset_count(1)
        writer.add_dataset_name(0, str(dataset))
    if isinstance(training.get("val_loss"), float):
        parts.append(f"to a validation loss of {training['val_loss']:.4f} nats per character")
    writer.add_type("model")
    writer.add_name(f"picogpt_jax {dataset}" if dataset else "picogpt_jax")
    writer.add_description(" ".join(parts))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, value in training.items():
        _add_value(writer, f"picogpt_jax.training.{name}", value)
    writer.add_string("picogpt_jax.config", json.dumps(config_to_json(model)))  # which format, and how it computes


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds a JSON value; what is no number, string or truth value as JSON."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int) and abs(value) < 1 << 63:
        writer.add_int64(key, value)
    elif isinstance(value, float):
        writer.add_float64(key, value)
    else:
        writer.add_string(key, value if isinstance(value, str) else json.dumps(value))


def _add_architecture(writer: gguf.GGUFWriter, model: ModelConfig) -> None:
    writer.add_context_length(model.block_size)
    writer.add_embedding_length(model.n_embd)
    writer.add_block_count(model.n_layer)
    writer.add_feed_forward_length(model.n_hidden)
    writer.add_head_count(model.n_head)
    writer.add_layer_norm_eps(model.layer_norm_epsilon)
    writer.add_vocab_size(model.vocab_size)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([token_string(char) for char in vocabulary.itos])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocabulary.size)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
