"""The int8 model as a GGUF file for llama.cpp: architecture `gpt2`, matrices in Q8_0 (extra: gguf).

A Q8_0 block is 32 codes of a row and their scale in float16. Our codes are stored unchanged, and every block of a row
has the row's scale (per_tensor: the matrix's). LayerNorms and biases are float32. llama.cpp asks for every bias, so
those that the model does not have are zeros. The tied head is `token_embd.weight` and not stored twice.

What differs from the other runtimes, because the format or llama.cpp has it so:

- scales are rounded to float16, which moves each by at most 2**-11 of its value;
- activations are quantized in blocks of 32 with a float16 scale each, not with one scale per token, whatever
  `activation_bits` says;
- GELU is the tanh form, on CPUs from a table in float16;
- keys and values are kept in float16, unless llama.cpp is told otherwise;
- text is a byte-level BPE vocabulary: a character is one token if it is one byte in UTF-8, and llama.cpp drops
  characters that are not in the vocabulary;
- there is always a token that ends a text: id 11 where a file names none. This file names a character that is rare in
  texts (`end_token`); llama.cpp's own programs stop when it is drawn, or never draw it, with --ignore-eos.

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
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-14, 65504.0  # of float16; below, it loses bits of the 11 that it has

# llama.cpp refuses a vocabulary without merges. Text starts as single characters, and nothing makes a "no" of them.
NEVER_MERGED = "no merge"
# How text is cut before BPE: any would do, since nothing is merged. With this one llama.cpp does not "clean up" spaces.
PRE_TOKENIZER = "qwen2"
RARE_CHARACTERS = (*map(chr, (*range(9), 11, 12, *range(14, 32), 127)), *"`~^|\\$@#%&{}<>*+=_/[]")

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
    """A character of one byte as GPT-2 writes bytes: printable ones as they are, the others from U+0100 on."""
    return char if "!" <= char <= "~" else chr(0x100 + min(ord(char), 33))  # 0 to 32, and 127 follows


def end_token(vocabulary: Vocabulary) -> int:
    """The id that llama.cpp is given as the end of a text: the first rare character that there is, else the last id."""
    present = [char for char in RARE_CHARACTERS if char in vocabulary.itos]
    return vocabulary.itos.index(present[0]) if present else vocabulary.size - 1


def q8_0_blocks(name: str, tensor: Int8Tensor) -> np.ndarray:
    """The matrix as Q8_0: uint8 [rows, cols / 32 * 34], each block a little-endian float16 scale and 32 int8 codes.

    Raises:
        UserError: 32 does not divide the columns, or float16 does not hold a scale with all its bits.
    """
    rows, cols = tensor.codes.shape
    if cols % BLOCK:
        raise UserError(
            f"{name} has rows of {cols}; Q8_0 holds blocks of {BLOCK}: train with a model.n_embd that {BLOCK} divides"
        )
    smallest, largest = tensor.scale.min(), tensor.scale.max()
    if smallest < SMALLEST_SCALE or largest > LARGEST_SCALE:
        found = smallest if smallest < SMALLEST_SCALE else largest
        raise UserError(
            f"{name} has a scale of {found:.3g}; Q8_0 stores it in float16, which holds {SMALLEST_SCALE:.3g} to "
            f"{LARGEST_SCALE:.0f} with all its bits: use another format"
        )
    scale = np.broadcast_to(tensor.scale.astype("<f2"), (rows, cols // BLOCK))
    blocks = np.empty((rows, cols // BLOCK, 2 + BLOCK), np.uint8)
    blocks[..., :2] = np.ascontiguousarray(scale)[..., None].view(np.uint8)
    blocks[..., 2:] = tensor.codes.reshape(rows, -1, BLOCK).view(np.uint8)
    return blocks.reshape(rows, -1)


def save_gguf(model: Int8Model, path: str | os.PathLike[str]) -> None:
    """Writes the file.

    Raises:
        UserError: llama.cpp or Q8_0 cannot hold the model (the message says what and why), or `path` cannot be written.
    """
    _check_expressible(model)
    vectors = {
        name: model.vectors.get(name, np.zeros(shape, np.float32))
        for name, shape in dataclasses.replace(model.model, bias=True).vector_shapes().items()
    }
    matrices = {f"{name}.weight": q8_0_blocks(name, matrix) for name, matrix in model.matrices.items()}
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "gpt2")
        _add_description(writer, model)
        _add_architecture(writer, model.model)
        _add_vocabulary(writer, model.vocabulary)
        for name, gguf_name in gguf_names(model.model).items():
            if name in matrices:
                writer.add_tensor(gguf_name, matrices[name], raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            else:
                writer.add_tensor(gguf_name, vectors[name])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


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
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list([token_string(char) for char in vocabulary.itos])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocabulary.size)
    writer.add_token_merges([NEVER_MERGED])
    writer.add_bos_token_id(end_token(vocabulary))
    writer.add_eos_token_id(end_token(vocabulary))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
