"""The GGUF file, read back by gguf's own reader; what llama.cpp makes of it is in test_llama_cpp_model.py."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RunScript
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from test_int8_model import random_model

from picogpt_jax.config import Granularity
from picogpt_jax.errors import UserError
from picogpt_jax.formats.gguf_export import gguf_names, save_gguf
from picogpt_jax.int8.folder import file_bytes, save_int8_model
from picogpt_jax.int8.int8_model import Int8Model, Int8Tensor
from picogpt_jax.text.vocabulary import Vocabulary

# What llama.cpp's loader of `gpt2` asks for, written down from its source.
TENSORS = {"token_embd.weight", "position_embd.weight", "output_norm.weight", "output_norm.bias"} | {
    f"blk.{layer}.{part}.{kind}"
    for layer in (0, 1)
    for part in ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
    for kind in ("weight", "bias")
}
ASCII = Vocabulary(tuple(map(chr, range(128))))

both = pytest.mark.parametrize(
    "changes",
    [{}, dict(granularity="per_tensor", bias=True, activation="gelu_tanh", mlp_ratio=4)],
    ids=["bare", "full"],
)


def with_scale(model: Int8Model, name: str, scale: Any) -> Int8Model:
    """With the scales of a matrix multiplied by these."""
    matrix = model.matrices[name]
    changed = Int8Tensor(matrix.codes, (matrix.scale * scale).astype(np.float32))
    return dataclasses.replace(model, matrices=model.matrices | {name: changed})


def with_vocabulary(vocabulary: Vocabulary) -> Int8Model:
    model, generator = random_model(), np.random.default_rng(1)
    codes = generator.integers(-127, 128, (vocabulary.size, model.model.n_embd)).astype(np.int8)
    wte = Int8Tensor(codes, np.full((vocabulary.size, 1), 0.01, np.float32))
    return dataclasses.replace(
        model,
        model=dataclasses.replace(model.model, vocab_size=vocabulary.size),
        vocabulary=vocabulary,
        matrices=model.matrices | {"transformer.wte": wte},
    )


def save(model: Int8Model, path: Path) -> GGUFReader:
    save_gguf(model, path)
    return GGUFReader(path)


def tensors(reader: GGUFReader) -> dict[str, Any]:
    named = {tensor.name: tensor for tensor in reader.tensors}
    assert len(named) == len(reader.tensors)
    return named


@both
def test_the_codes_are_ours_and_the_scales_ours_in_float16(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = random_model(**changes)
    read = tensors(save(model, tmp_path / "m.gguf"))
    names = gguf_names(model.model)
    for name, matrix in model.matrices.items():
        tensor = read.pop(names[f"{name}.weight"])
        assert tensor.tensor_type == GGMLQuantizationType.Q8_0
        rows, cols = matrix.codes.shape
        assert tensor.shape.tolist() == [cols, rows], "ggml's order: the row's length first"
        blocks = np.frombuffer(tensor.data.tobytes(), np.dtype([("d", "<f2"), ("qs", "i1", 32)])).reshape(rows, -1)
        np.testing.assert_array_equal(blocks["qs"].reshape(rows, cols), matrix.codes, err_msg=name)
        scale = np.broadcast_to(matrix.scale, (rows, 1)).astype(np.float16)
        np.testing.assert_array_equal(blocks["d"], np.broadcast_to(scale, blocks["d"].shape), err_msg=name)
        values = dequantize(tensor.data, GGMLQuantizationType.Q8_0)
        np.testing.assert_allclose(values, matrix.dequantize(), rtol=2**-11, atol=0, err_msg=name)
    for name, vector in model.vectors.items():
        tensor = read.pop(names[name])
        assert tensor.tensor_type == GGMLQuantizationType.F32
        np.testing.assert_array_equal(tensor.data, vector, err_msg=name)
    assert all(name.endswith(".bias") and not tensor.data.any() for name, tensor in read.items())


@both
def test_every_tensor_that_llama_cpp_loads_is_there(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = random_model(**changes)
    read = tensors(save(model, tmp_path / "m.gguf"))
    assert set(read) == TENSORS
    width, hidden = model.model.n_embd, model.model.n_hidden
    sizes = {"attn_qkv": 3 * width, "ffn_up": hidden}
    for layer in (0, 1):
        for part in ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"):
            assert read[f"blk.{layer}.{part}.bias"].shape.tolist() == [sizes.get(part, width)]
    assert read["blk.1.ffn_down.weight"].shape.tolist() == [hidden, width]


def test_the_metadata_says_what_it_is_and_where_it_comes_from(tmp_path: Path) -> None:
    model = random_model()
    reader = save(model, tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "gpt2",
        "general.type": "model",
        "general.name": "picogpt_jax shakespeare_char",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "general.dataset.count": 1,
        "general.dataset.0.name": "shakespeare_char",
        "gpt2.context_length": 16,
        "gpt2.embedding_length": 32,
        "gpt2.block_count": 2,
        "gpt2.feed_forward_length": 64,
        "gpt2.attention.head_count": 4,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "gpt2.vocab_size": 11,
        "picogpt_jax.training.step": 250,
        "picogpt_jax.training.val_loss": 1.9,
        "picogpt_jax.training.dataset": "shakespeare_char",
        "tokenizer.ggml.model": "rwkv",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.token_type": [1] * 11,
    }
    assert {name: fields.get(name) for name in expected} == expected
    assert not [name for name in fields if name.endswith("_token_id")], "no token begins or ends a text"
    assert "validation loss of 1.9000 nats" in fields["general.description"]
    assert "general.author" not in fields
    config = json.loads(fields["picogpt_jax.config"])
    assert (config["format"], config["quantization"]["weight_granularity"]) == ("picogpt-int8", "per_channel")


def test_a_model_whose_origin_is_unknown_is_written_too(tmp_path: Path) -> None:
    training = {"val_loss": None, "quantization_aware": True, "big": 1 << 70, "list": [1], "empty": ""}
    reader = save(dataclasses.replace(random_model(), training=training), tmp_path / "m.gguf")
    assert reader.fields["general.name"].contents() == "picogpt_jax"
    assert "loss" not in reader.fields["general.description"].contents()
    assert reader.fields["picogpt_jax.training.quantization_aware"].contents() is True
    assert reader.fields["picogpt_jax.training.big"].contents() == str(1 << 70)
    assert reader.fields["picogpt_jax.training.list"].contents() == "[1]"


def test_the_tokens_are_bytes_as_rwkv_writes_them(tmp_path: Path) -> None:
    """Escaped as in Python; a quarter of them is not printable, and must not end the string of a C program."""
    reader = save(with_vocabulary(ASCII), tmp_path / "m.gguf")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert [token.encode().decode("unicode_escape") for token in tokens] == list(ASCII.itos)
    assert all(token.isprintable() for token in tokens)
    assert [tokens[ord(char)] for char in "\n a\\"] == [r"\x0a", " ", "a", r"\x5c"]


@both
def test_the_file_is_hardly_larger_than_the_int8_folder(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = random_model(n_embd=256, **changes)
    save_gguf(model, tmp_path / "m.gguf")
    save_int8_model(model, tmp_path / "int8")
    ratio = (tmp_path / "m.gguf").stat().st_size / file_bytes(tmp_path / "int8")
    assert ratio < 1.1, "2 bytes for every 32, against 4 for a row"


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_scales_that_float16_holds_nearly_stay_beside_our_codes(tmp_path: Path, granularity: Granularity) -> None:
    """A projection that was initialised for 48 layers, or that weight decay has shrunk, has such scales."""
    name = "transformer.h.1.mlp.c_proj"
    model = random_model(granularity)
    model = with_scale(model, name, 3e-5 / model.matrices[name].scale.mean())
    cost = save_gguf(model, tmp_path / "m.gguf")
    assert re.fullmatch(r"float16 moves the scales of 1 of 10 matrices by up to 0\.\d+%", cost)
    tensor = tensors(GGUFReader(tmp_path / "m.gguf"))["blk.1.ffn_down.weight"]
    assert tensor.tensor_type == GGMLQuantizationType.Q8_0
    values, expected = dequantize(tensor.data, GGMLQuantizationType.Q8_0), model.matrices[name].dequantize()
    np.testing.assert_allclose(values, expected, rtol=2**-8, atol=0)
    assert np.abs(values - expected).max() <= float(cost.split()[-1][:-1]) * 0.0105 * np.abs(expected).max()


@pytest.mark.parametrize("scale", [1e-4, 1e-9, 1e8], ids=["small", "zero", "infinite"])
def test_a_matrix_whose_scales_float16_does_not_hold_is_float32(tmp_path: Path, scale: float) -> None:
    names = ["transformer.h.0.attn.c_proj", "transformer.wpe"]
    model = random_model()
    usual = save_gguf(model, tmp_path / "usual.gguf")
    factors = np.ones((32, 1))
    factors[-1] = scale  # one row will do
    changed = with_scale(with_scale(model, names[0], factors), names[1], scale)
    cost = save_gguf(changed, tmp_path / "m.gguf")
    read = tensors(GGUFReader(tmp_path / "m.gguf"))
    for name, theirs in zip(names, ("blk.0.attn_output.weight", "position_embd.weight"), strict=True):
        assert read[theirs].tensor_type == GGMLQuantizationType.F32
        np.testing.assert_array_equal(read[theirs].data, changed.matrices[name].dequantize(), err_msg=name)
    others = [tensor.tensor_type for name, tensor in read.items() if name.endswith("attn_qkv.weight")]
    assert others == [GGMLQuantizationType.Q8_0] * 2, "the other matrices are as they were"
    more = (tmp_path / "m.gguf").stat().st_size - (tmp_path / "usual.gguf").stat().st_size
    expected = f"float16 does not hold the scales of transformer.wpe and 1 more: float32 instead, {more:,} bytes more"
    assert cost == expected
    assert usual == "", "nothing to say where float16 holds all"


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            random_model(n_embd=48),
            r"transformer\.wte has rows of 48; Q8_0 holds blocks of 32: train with a",
        ),
        (random_model(n_embd=16, mlp_ratio=2), r"transformer\.wte has rows of 16"),
        (random_model(activation="relu"), r"activation='relu' cannot be a GGUF of GPT-2: llama.cpp computes GELU"),
        (
            dataclasses.replace(random_model(), vocabulary=Vocabulary(tuple("\nabcdefghé日"))),
            r"has 2 characters such as 'é' \(U\+00E9\) of more than one byte in UTF-8, which cannot be one token",
        ),
    ],
    ids=["width", "narrow", "relu", "vocabulary"],
)
def test_what_cannot_be_represented_is_refused(tmp_path: Path, model: Int8Model, message: str) -> None:
    with pytest.raises(UserError, match=message):
        save_gguf(model, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir()), "nothing half-written is left"


def test_convert_writes_it_from_an_int8_model_only(tmp_path: Path, run_script: RunScript) -> None:
    model = random_model()
    save_int8_model(model, tmp_path / "int8")
    done = run_script("scripts/convert.py", "--input=int8", "--to=gguf", "--output=m.gguf")
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "m.gguf").stat().st_size
    assert done.stdout == f"wrote m.gguf: {size:,} bytes, Q8_0 for llama.cpp\n"
    assert set(tensors(GGUFReader(tmp_path / "m.gguf"))) == TENSORS

    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    done = run_script("scripts/convert.py", "--input=run", "--to=gguf", "--output=other.gguf")
    assert (done.returncode, done.stdout) == (2, "")
    assert "run holds float parameters; make an int8 model of it with: python" in done.stderr
    assert not (tmp_path / "other.gguf").exists()
