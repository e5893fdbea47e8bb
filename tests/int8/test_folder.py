"""The int8 folder of version 2: what is written is read, and both readers refuse what is damaged."""

import dataclasses
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from test_int8_model import SMALL, nested, poke, put, random_model, rewrite_json, rewrite_tensors

from picogpt_jax.config import Granularity, ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.int8.folder import load_int8_model, save_int8_model, stored_version
from picogpt_jax.int8.integer_model import IntegerModel, integer_config_to_json, integer_layout, integer_model
from picogpt_jax.int8.layout import float_layout
from picogpt_jax.runtimes.numpy_integer import NumpyIntegerGPT
from picogpt_jax.runtimes.numpy_model import NumpyGPT
from picogpt_jax.text.vocabulary import Vocabulary

GPT2_LIKE = {"bias": True, "activation": "gelu_tanh", "mlp_ratio": 4}
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 16))


def random_integer_model(granularity: Granularity = "per_channel", seed: int = 0, **changes: Any) -> IntegerModel:
    """A small model of random weights."""
    config, generator = ModelConfig(**(SMALL | changes)), np.random.default_rng(seed)
    arrays = {}
    for name, (_, shape) in float_layout(config).items():
        around, size = (1.0, 0.1) if ".ln_" in name and name.endswith(".weight") else (0.0, 1.5 / np.sqrt(shape[-1]))
        arrays[name] = generator.normal(around, size, shape).astype(np.float32)
    vocabulary = Vocabulary(itos=tuple("\nabcdefghijklmnopqrstuvwxyz"[: config.vocab_size]))
    return integer_model(config, granularity, arrays, vocabulary, {"step": 250, "val_loss": 1.9})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_int8_model(random_integer_model(**GPT2_LIKE), tmp_path / "int8")
    return tmp_path / "int8"


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("changes", [{}, GPT2_LIKE, {"activation": "relu"}], ids=str)
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, granularity: Granularity, changes: dict[str, Any]) -> None:
    model = random_integer_model(granularity, **changes)
    save_int8_model(model, tmp_path / "int8")
    loaded = load_int8_model(tmp_path / "int8")
    assert isinstance(loaded, IntegerModel)
    for field in ("model", "weight_granularity", "training", "vocabulary"):
        assert getattr(loaded, field) == getattr(model, field)
    assert loaded.tensors.keys() == model.tensors.keys()
    for name, array in model.tensors.items():
        np.testing.assert_array_equal(loaded.tensors[name], array, err_msg=name, strict=True)
    expected = NumpyIntegerGPT(integer_config_to_json(model), model.tensors).forward(TOKENS)
    assert expected.std() > 0.1
    np.testing.assert_array_equal(NumpyIntegerGPT.load(tmp_path / "int8").forward(TOKENS), expected)


def test_the_files_are_what_the_format_says(folder: Path) -> None:
    """Read with nothing of ours."""
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    types = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    layer = {"attn.c_attn": [96, 32], "attn.c_proj": [32, 32], "mlp.c_fc": [128, 32], "mlp.c_proj": [32, 128]}
    shapes = {f"transformer.h.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    expected = {f"{name}.bias": ("I32", shape[:1]) for name, shape in shapes.items()}
    shapes |= {"transformer.wte": [11, 32], "transformer.wpe": [16, 32]}
    expected |= {f"{name}.weight": ("I8", shape) for name, shape in shapes.items()}
    expected |= {f"{name}.weight_exponent": ("I8", [shape[0], 1]) for name, shape in shapes.items()}
    for norm in ("h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f"):
        expected |= {f"transformer.{norm}.weight": ("I16", [32]), f"transformer.{norm}.bias": ("I32", [32])}
        expected |= {f"transformer.{norm}.weight_exponent": ("I8", [1])}
    assert types == expected
    assert json.loads((folder / "config.json").read_text()) == {
        "format": "picogpt-int8",
        "format_version": 2,
        "arithmetic": "integer",
        "model": SMALL | GPT2_LIKE,
        "quantization": {
            "weight_bits": 8,
            "weight_granularity": "per_channel",
            "activation_bits": 8,
            "activation_granularity": "per_token",
            "symmetric": True,
            "quantize_attention": True,
        },
        "training": {"step": 250, "val_loss": 1.9},
    }
    assert stored_version(folder) == 2


WTE, EXPONENT, NORM = "transformer.wte.weight", "transformer.wte.weight_exponent", "transformer.ln_f.weight"
BIAS, NORM_BIAS = "transformer.h.1.mlp.c_fc.bias", "transformer.ln_f.bias"


def other_version(folder: Path, version: int, **more: Any) -> None:
    save_int8_model(random_model() if version == 1 else random_integer_model(), folder)
    config = json.loads((folder / "config.json").read_text()) | {"format_version": 3 - version} | more
    config["quantization"]["quantize_attention"] = version == 1
    if version == 2:
        del config["arithmetic"]
    (folder / "config.json").write_text(json.dumps(config))


def config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: rewrite_json(folder / "config.json", change)


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    return lambda folder: rewrite_tensors(folder, change)


def content(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    path = lambda folder: folder / "model.safetensors"  # noqa: E731
    return lambda folder: path(folder).write_bytes(change(path(folder).read_bytes()))


def twice(data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    again = json.dumps({WTE: header[WTE]}).encode()[1:-1]
    text = json.dumps(header).encode()[:-1] + b", " + again + b"}"
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


UNREADABLE, NO_FOLDER = "is no readable safetensors file", "is no int8 folder that can be read"
NONE_COMPUTED = "is none that this runtime computes"
REFUSED: list[tuple[Callable[[Path], object], str, str]] = [
    # the change, what our reader says, what NumPy's says
    (config(lambda c: c.update(format_version=3)), "format_version is 3; this picogpt_jax reads 1 and 2", "8', 3, 'i"),
    (config(lambda c: c.update(arithmetic="mixed")), "arithmetic is 'mixed'; expected 'integer'", "2, 'mixed'"),
    (config(lambda c: c.pop("arithmetic")), r"lacks the keys \['arithmetic'\]", "2, None"),
    (config(lambda c: c.pop("model")), r"lacks the keys \['model'\]", "KeyError"),
    (config(nested("quantization", quantize_attention=False)), "=False is not one of True", NONE_COMPUTED),
    (config(nested("quantization", activation_bits=None)), "activation_bits=None is not one of 8", NONE_COMPUTED),
    (config(nested("quantization", weight_granularity="per_row")), "is not one of 'per_channel', 'per_", "per_row"),
    (config(nested("quantization", weight_granularity="per_tensor")), r"expected int8 \[1, 1\]", r"int8 \[1, 1\]"),
    (config(nested("model", n_embd=8208)), "n_embd is 8208; integer arithmetic goes up to 8192", NONE_COMPUTED),
    (config(nested("model", mlp_ratio=2000)), "n_hidden is 64000; integer arithmetic goes up to", NONE_COMPUTED),
    (config(nested("model", block_size=4097)), "block_size is 4097", NONE_COMPUTED),
    (config(nested("model", n_embd=2048, n_head=1)), "head_size is 2048", "n_head=1 are none"),
    (config(nested("model", n_layer=1 << 19)), "n_layer=524288, but there are only", "h.2.ln_1.weight is missing"),
    (config(nested("model", bias=False)), "unknown tensors", "unknown tensors"),
    (config(nested("model", bias=1)), "bias=1 is a int; expected bool", NONE_COMPUTED),
    (config(nested("model", activation="silu")), "silu", "silu"),
    (config(nested("model", vocab_size=10)), "11 entries, but|expected int8", r"expected int8 \[10, 32\]"),
    (tensors(lambda t: t.pop(EXPONENT)), f"missing tensors: {EXPONENT}", f"{EXPONENT} is missing"),
    (tensors(put("more", np.ones(1, np.int32))), "unknown tensors: more", "unknown tensors: .*more"),
    (tensors(put(NORM, np.full(32, 4096, np.int32))), rf"{NORM} is int32 \[32\]; expected int16", "expected int16"),
    (tensors(put(NORM, np.ones(32, np.float32))), rf"{NORM} is float32 \[32\]; expected int16", "expected int16"),
    (tensors(put(BIAS, np.ones(128, np.int16))), rf"{BIAS} is int16 \[128\]; expected int32", "expected int32"),
    (tensors(put(NORM, np.full(33, 4096, np.int16))), r"int16 \[33\]; expected int16 \[32\]", r"expected int16 \[32\]"),
    (tensors(poke(WTE, -128)), f"{WTE} holds the code -128", f"{WTE} holds -128"),
    (tensors(poke(EXPONENT, -25)), f"{EXPONENT} holds the exponent -25; expected -24 to 15", f"{EXPONENT} holds -25"),
    (tensors(poke(EXPONENT, 16)), f"{EXPONENT} holds the exponent 16", f"{EXPONENT} holds .* to 16"),
    (tensors(poke(f"{NORM}_exponent", 16)), "holds the exponent 16", f"{NORM}_exponent holds 16"),
    (tensors(poke(NORM, 4097)), "largest mantissa is 4097; expected 2049 to 4096", f"{NORM} holds .* to 4097"),
    (tensors(poke(NORM, -32768)), "largest mantissa is 32768; expected 2049 to 4096", f"{NORM} holds -32768"),
    (tensors(put(NORM, np.full(32, 2047, np.int16))), "largest mantissa is 2047", "largest mantissa is 2047"),
    (tensors(poke(BIAS, (1 << 22) + 1)), f"{BIAS} holds 4194305; expected at most 4194304", f"{BIAS} holds .*4194305"),
    (tensors(poke(NORM_BIAS, -(1 << 31))), f"{NORM_BIAS} holds -2147483648", f"{NORM_BIAS} holds -2147483648"),
    (content(lambda data: data[:-1]), UNREADABLE, NO_FOLDER),
    (content(lambda data: data + b"\0"), UNREADABLE, "its header expects"),
    (content(lambda data: data[:100]), UNREADABLE, NO_FOLDER),
    (content(lambda data: b""), UNREADABLE, NO_FOLDER),
    (content(lambda data: b"\xff" * 8 + data[8:]), UNREADABLE, NO_FOLDER),
    (content(lambda data: data.replace(b"[0,", b"[1,", 1)), UNREADABLE, "follow the tensor before|not a multiple"),
    (content(twice), f"tensors stored more than once: {WTE}", f"holds {WTE} more than once"),
    (lambda folder: (folder / "config.json").write_text("["), "config.json is not valid JSON", NO_FOLDER),
    (lambda folder: (folder / "config.json").unlink(), "config.json does not exist", "No such file"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: is no readable", "No such file"),
    (lambda folder: other_version(folder, 1, arithmetic="integer"), "unknown tensors: .*_scale", "missing|expected"),
]


@pytest.mark.parametrize(("change", "ours", "numpy"), REFUSED)
def test_a_wrong_folder_is_refused_by_both_readers(
    folder: Path, change: Callable[[Path], object], ours: str, numpy: str
) -> None:
    change(folder)
    for read, message in ((load_int8_model, ours), (NumpyIntegerGPT.load, numpy)):
        with pytest.raises(UserError, match=message) as refusal:
            read(folder)
        assert len(str(refusal.value)) < 300 + 2 * len(str(folder))


def test_tensors_of_version_2_are_none_of_version_1(folder: Path) -> None:
    other_version(folder, 2)
    with pytest.raises(UserError, match=r"unknown tensors: .*_exponent"):
        load_int8_model(folder)
    with pytest.raises(UserError, match=r"missing|expected float32"):
        NumpyGPT.load(folder)


def test_each_numpy_runtime_refuses_the_version_of_the_other(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="version 2 is not picogpt-int8 version 1"):
        NumpyGPT.load(folder)
    save_int8_model(random_model(), tmp_path / "mixed")
    with pytest.raises(UserError, match=r"\('picogpt-int8', 1, None\) is not picogpt-int8 version 2"):
        NumpyIntegerGPT.load(tmp_path / "mixed")


def test_a_vocabulary_of_another_size_is_refused(folder: Path) -> None:
    rewrite_json(folder / "vocab.json", lambda vocabulary: vocabulary["itos"].pop())
    with pytest.raises(UserError, match=r"vocabulary has 10 entries, but model\.vocab_size=11"):
        load_int8_model(folder)


def test_construction_checks_as_loading_does() -> None:
    model = random_integer_model()
    with pytest.raises(UserError, match=f"{WTE} is int16 .*; expected int8"):
        dataclasses.replace(model, tensors=model.tensors | {WTE: model.tensors[WTE].astype(np.int16)})
    assert integer_layout(model.model, "per_tensor")[EXPONENT] == ("int8", (1, 1))


def test_integers_need_neither_jax_nor_safetensors_in_numpy(folder: Path) -> None:
    code = (
        "import sys; from picogpt_jax.runtimes.numpy_integer import NumpyIntegerGPT; NumpyIntegerGPT.load(sys.argv[1]);"
        "print(sorted({'jax', 'torch', 'safetensors', 'picogpt_jax.int8'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(folder)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"
