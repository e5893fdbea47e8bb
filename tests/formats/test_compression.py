"""Compressed files come back byte for byte, in any runtime, and damaged ones are refused."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from picogpt_jax.config import ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.formats import compression
from picogpt_jax.formats.compression import compress, decompress, encode, frequencies
from picogpt_jax.formats.onnx_export import onnx_model
from picogpt_jax.int8.integer_model import IntegerModel, integer_model
from picogpt_jax.runtimes.jax_model import JaxGPT
from picogpt_jax.runtimes.numpy_integer import NumpyIntegerGPT
from picogpt_jax.runtimes.onnx_model import OnnxGPT
from picogpt_jax.runtimes.torch_integer import TorchIntegerGPT
from picogpt_jax.text.vocabulary import TokenIds, Vocabulary

LETTERS = Vocabulary(tuple(sorted("\n abcdeé")))
CONFIG = ModelConfig(
    n_layer=1,
    n_head=2,
    n_embd=16,
    block_size=8,
    vocab_size=LETTERS.size,
    mlp_ratio=2,
    bias=False,
    activation="gelu",
    layer_norm_epsilon=1e-5,
    dropout=0.0,
)
DIGEST = bytes(range(16))


def random_model() -> IntegerModel:
    generator = np.random.default_rng(0)
    arrays = {f"{name}.weight": generator.normal(0, 0.4, shape) for name, shape in CONFIG.matrix_shapes().items()}
    arrays |= {name: np.ones(shape) for name, shape in CONFIG.vector_shapes().items()}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    return integer_model(CONFIG, "per_channel", arrays, LETTERS, {})


def in_numpy(model: IntegerModel) -> NumpyIntegerGPT:
    config = {
        **{"format": "picogpt-int8", "format_version": 2, "arithmetic": "integer"},
        "model": dataclasses.asdict(CONFIG),
        "quantization": {"weight_granularity": "per_channel"},
    }
    return NumpyIntegerGPT(config, model.tensors)


MODEL = random_model()
RUNTIME = in_numpy(MODEL)
CONTENTS = {
    "empty": b"",
    "one byte": b"a",
    "another byte": b"\xff",
    "ascii": b"abc\nde bad" * 9,
    "unknown": "abé 雪 xyz é\n😀".encode() * 3,
    "binary": np.random.default_rng(1).bytes(700),
    "half a character": b"ab\xc3",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("block_size", [1, 7, 30, 4096])
def test_every_content_comes_back(content: bytes, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = compress(content, RUNTIME, LETTERS, DIGEST, block_size)
    assert decompress(data, RUNTIME, LETTERS, DIGEST) == content
    monkeypatch.setattr(compression, "SIDE_BY_SIDE", 2)
    monkeypatch.setattr(compression, "LOGITS_AT_ONCE", 1)
    assert compress(content, RUNTIME, LETTERS, DIGEST, block_size) == data
    assert decompress(data, RUNTIME, LETTERS, DIGEST) == content


def test_ids_without_a_text_are_all_bytes() -> None:
    ids = TokenIds.of_size(LETTERS.size, "here")
    assert decompress(compress(b"abc", RUNTIME, ids, DIGEST), RUNTIME, ids, DIGEST) == b"abc"


class Pairs(Vocabulary):
    """A vocabulary of tokens of one or two letters."""

    def encode(self, text: str, source: str = "the text", first: int = 0) -> np.ndarray:
        if set(text) - set("ab"):
            raise UserError("no such token")
        return np.array([["ab", "a", "b"].index(token) for token in re.findall("ab|a|b", text)], np.uint16)

    def decode(self, ids: Any) -> str:
        return "".join(["ab", "a", "b"][index] for index in ids)


def test_a_tokenizers_text_and_what_is_none() -> None:
    pairs = Pairs(LETTERS.itos)
    assert compression.items_of(b"abba\xff\xfeba", pairs) == [0, 2, 1, b"\xff\xfe", 2, 1]
    for content in (b"abba\xff\xfeba", b"", b"abc\xff", b"\xed\xa0\x80a"):
        assert decompress(compress(content, RUNTIME, pairs, DIGEST), RUNTIME, pairs, DIGEST) == content


def test_binary_content_hardly_grows() -> None:
    """Letters that come by chance interrupt a run of bytes."""
    assert len(compress(CONTENTS["binary"], RUNTIME, LETTERS, DIGEST)) < 820
    assert len(compress(b"\xff" * 700, RUNTIME, LETTERS, DIGEST)) < 700 + 60 + 12 + 3 * 3 + 4


def test_the_frequencies_add_up() -> None:
    for logits in (np.zeros((1, 60_000)), np.random.default_rng(0).normal(0, 4, (9, 11)), [[4096.0, -4096.0]]):
        found = frequencies(np.asarray(logits, np.float32))
        assert set(found.sum(-1).tolist()) == {1 << 24}
        assert found.min() >= 1
        assert set(found[:, -1].tolist()) == {1 << 12}


def test_a_likely_symbol_takes_few_bits() -> None:
    half = (0, 1 << 23)
    assert len(encode([half] * 3200)[1]) == pytest.approx(100, abs=1)


DATA = compress(CONTENTS["ascii"], RUNTIME, LETTERS, DIGEST, 30)


@pytest.mark.parametrize("position", range(60))
def test_no_changed_byte_of_the_header_passes(position: int) -> None:
    changed = bytearray(DATA)
    changed[position] ^= 1 + position % 255
    with pytest.raises(UserError, match=r"begins with|version|header has another checksum"):
        decompress(bytes(changed), RUNTIME, LETTERS, DIGEST)


@pytest.mark.parametrize("position", range(60, len(DATA), 5))
def test_no_changed_byte_after_it_passes(position: int) -> None:
    changed = bytearray(DATA)
    changed[position] ^= 16
    with pytest.raises(UserError, match="damaged"):
        decompress(bytes(changed), RUNTIME, LETTERS, DIGEST)


@pytest.mark.parametrize(
    ("data", "digest", "message"),
    [
        (b"", DIGEST, "begins with b''"),
        (b"pgz", DIGEST, "version none"),
        (DATA[:40], DIGEST, "is cut: 40 bytes"),
        (DATA[:-1], DIGEST, "damaged or cut"),
        (DATA + b"\0", DIGEST, "followed by other bytes"),
        (DATA, bytes(16), f"compressed with the model {DIGEST.hex()}; this one is {bytes(16).hex()}"),
    ],
)
def test_what_is_refused(data: bytes, digest: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        decompress(data, RUNTIME, LETTERS, digest)
    with pytest.raises(UserError, match="block_size=0 is not in 1 to 1048576"):
        compress(b"a", RUNTIME, LETTERS, DIGEST, 0)


@pytest.mark.parametrize("runtime", ["jax", "onnx", "torch"])
def test_every_runtime_writes_the_same_bytes_and_reads_them(runtime: str) -> None:
    computing: Any = {
        "jax": JaxGPT.from_int8,
        "onnx": lambda model: OnnxGPT(onnx_model(model).SerializeToString()),
        "torch": TorchIntegerGPT,
    }[runtime](MODEL)
    content = b"abc\nde bad deed, a cab" * 4
    data = compress(content, RUNTIME, LETTERS, DIGEST, block_size=30)
    assert compress(content, computing, LETTERS, DIGEST, block_size=30) == data
    assert decompress(data, computing, LETTERS, DIGEST) == content
