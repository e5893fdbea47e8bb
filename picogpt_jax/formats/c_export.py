"""The integer model as a folder of C: its weights in `model.h`, and the program of `runtimes/c`, ready for `make`.

The weights of a large model are a file instead, `model.bin`, which a compiler need not read.
"""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt_jax.files import atomic_folder, check_replaceable
from picogpt_jax.int8.integer_model import IntegerModel, integer_config_to_json
from picogpt_jax.runtimes import draws
from picogpt_jax.runtimes.c_weights import MATRICES, NORMS, SOURCES, arrays, packed, sizes
from picogpt_jax.runtimes.numpy_integer import NumpyIntegerGPT
from picogpt_jax.text.vocabulary import TokenIds

LARGEST_HEADER = 8 << 20  # bytes of weights; a compiler takes seconds for as many
HEADER_FILE, WEIGHTS_FILE = "model.h", "model.bin"
PROGRAM_FILES = ("picogpt.c", "picogpt.h", "avx512.h", "main.c", "Makefile", "README.md")
BUILT = {"picogpt", "picogpt.exe", "picogpt.o", "main.o"}
CHECKED_TOKENS = 16


def save_c(model: IntegerModel, folder: str | os.PathLike[str]) -> list[str]:
    """Writes the folder in one step; an earlier one is replaced as a whole.

    Returns:
        the names of the files that hold the model.

    Raises:
        UserError: `folder` cannot be written or holds other files.
    """
    check_replaceable(folder, {HEADER_FILE, WEIGHTS_FILE, *PROGRAM_FILES, *BUILT})
    digest = logits_digest(model)
    in_a_file = model.n_bytes > LARGEST_HEADER
    with atomic_folder(folder) as temporary:
        lines = _header(model, digest, in_a_file)
        (temporary / HEADER_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
        if in_a_file:
            (temporary / WEIGHTS_FILE).write_bytes(packed(model, digest))
        for name in PROGRAM_FILES:
            shutil.copyfile(SOURCES / name, temporary / name)
    return [HEADER_FILE, WEIGHTS_FILE] if in_a_file else [HEADER_FILE]


def logits_digest(model: IntegerModel) -> int:
    """What `picogpt_digest` of picogpt.c must give: FNV-1a, 32 bits, of logits and draws, by NumPy."""
    count = min(CHECKED_TOKENS, model.model.block_size)
    i = np.arange(count)
    ids = (7 * i * i + 3 * i + 1) % model.model.vocab_size
    first = (count + 1) // 2 - 1  # what is before is the prompt
    numpy = NumpyIntegerGPT(integer_config_to_json(model), model.tensors)
    logits_TV = numpy.forward(ids[None])[0, first:]
    bits_T = draws.random_bits(1337, first, count - first, 2)[:, 1]
    drawn_T = draws.draw(logits_TV, bits_T, draws.Scale.of(1.0), 5)
    digest = 2166136261
    for byte in np.concatenate([draws.fixed(logits_TV), drawn_T[:, None].astype(np.int32)], 1).astype("<i4").tobytes():
        digest = (digest ^ byte) * 16777619 & 0xFFFFFFFF
    return digest


def _header(model: IntegerModel, digest: int, in_a_file: bool) -> Iterator[str]:
    """The lines of model.h."""
    members = sizes(model)
    yield f"/* A model of picogpt_jax: {model.model.n_parameters:,} parameters. One file of a program includes it. */"
    yield from ("#ifndef PICOGPT_MODEL_H", "#define PICOGPT_MODEL_H", "", '#include "picogpt.h"', "")
    yield f"#define PICOGPT_VOCAB_SIZE {model.model.vocab_size}"
    yield f"#define PICOGPT_DIGEST 0x{digest:08x}u"
    layers, *rest = [members[name] for name in ("n_layer", "n_head", "n_embd", "n_hidden", "block_size", "vocab_size")]
    heads, width, hidden, block_size, vocab_size = rest
    yield "/* The type of the memory of a text. */"
    yield "#define PICOGPT_MEMORY(chunk) \\"
    yield "    struct { \\"
    yield f"        int32_t words[PICOGPT_WORDS({heads}, {width}, {hidden}, {block_size}, {vocab_size}, chunk)]; \\"
    yield f"        uint8_t bytes[PICOGPT_BYTES({layers}, {heads}, {width}, {hidden}, {block_size}, chunk)]; \\"
    yield "    }"
    yield from _vocabulary(model)
    if in_a_file:
        yield from (f'#define PICOGPT_WEIGHTS_FILE "{WEIGHTS_FILE}"', "", "#endif")
        return
    found = arrays(model)
    for name, array in found.items():
        yield from _array(f"{array.dtype.name}_t", f"picogpt_{name.replace('.', '_')}", array)
    yield "static const picogpt_model picogpt_weights = {"
    yield f"    {', '.join(map(str, members.values()))}, PICOGPT_DIGEST,"
    for part in (*MATRICES, *NORMS):
        parts = ("codes", "exponents", "biases", "sums") if part in MATRICES else ("mantissas", "exponents", "biases")
        values = (f"picogpt_{part}_{name}" if f"{part}.{name}" in found else "0" for name in parts)
        yield f"    {{{', '.join(values)}}}, /* {part} */"
    yield from ("};", "", "#endif")


def _vocabulary(model: IntegerModel) -> Iterator[str]:
    vocabulary = model.vocabulary
    has_text = vocabulary.to_json()["type"] == "char"
    yield f"#define PICOGPT_HAS_TEXT {int(has_text)}"
    yield ""
    prompt = [0] if isinstance(vocabulary, TokenIds) else vocabulary.encode(vocabulary.default_prompt)
    yield from _array("int32_t", "picogpt_default_prompt", np.asarray(prompt))
    if has_text:
        yield "/* The character of each token. */"
        yield from _array("uint32_t", "picogpt_characters", np.array([ord(char) for char in vocabulary.itos]))


def _array(kind: str, name: str, values: npt.NDArray[Any]) -> Iterator[str]:
    """A constant array, 24 numbers a line."""
    numbers = values.tolist()
    yield f"static const {kind} {name}[{len(numbers)}] = {{"
    for first in range(0, len(numbers), 24):
        yield f"    {', '.join(map(str, numbers[first : first + 24]))},"
    yield from ("};", "")
