"""The portable int8 model: its files, and what a reader refuses."""

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
from safetensors.numpy import load_file, save_file

from picogpt_jax.config import Granularity, ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.int8.folder import file_bytes, is_int8_folder, load_int8_model, save_int8_model
from picogpt_jax.int8.int8_model import Int8Model, Int8Tensor, Quantization, requantize_per_tensor
from picogpt_jax.text.vocabulary import Vocabulary

SMALL: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "block_size": 16,
    "vocab_size": 11,
    "mlp_ratio": 2,
    "bias": False,
    "activation": "gelu",
    "layer_norm_epsilon": 1e-5,
    "dropout": 0.0,
}


def random_model(
    granularity: Granularity = "per_channel", activation_bits: int | None = 8, seed: int = 0, **changes: Any
) -> Int8Model:
    """A small model whose scales make activations of about unit size."""
    generator = np.random.default_rng(seed)
    config = ModelConfig(**(SMALL | changes))
    matrices = {}
    for name, (rows, cols) in config.matrix_shapes().items():
        scale_rows = rows if granularity == "per_channel" else 1
        typical = 3.0 / (127 * np.sqrt(cols)) if ".h." in name else 1.0 / 127
        matrices[name] = Int8Tensor(
            codes=generator.integers(-127, 128, (rows, cols)).astype(np.int8),
            scale=(typical * generator.uniform(0.5, 1.5, (scale_rows, 1))).astype(np.float32),
        )
    vectors = {}
    for name, shape in config.vector_shapes().items():
        around = 1.0 if name.endswith(".weight") else 0.0
        vectors[name] = generator.normal(around, 0.1, shape).astype(np.float32)
    return Int8Model(
        model=config,
        quantization=Quantization(weight_granularity=granularity, activation_bits=activation_bits),
        training={"step": 250, "val_loss": 1.9, "dataset": "shakespeare_char"},
        vocabulary=Vocabulary(itos=tuple("\nabcdefghijklmnopqrstuvwxyz"[: config.vocab_size])),
        matrices=matrices,
        vectors=vectors,
    )


def rewrite_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewrite_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_int8_model(random_model(), tmp_path / "int8")
    return tmp_path / "int8"


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, granularity: Granularity, bias: bool) -> None:
    model = random_model(granularity, activation_bits=None, bias=bias)
    save_int8_model(model, tmp_path / "int8")
    loaded = load_int8_model(tmp_path / "int8")

    for field in ("model", "quantization", "training", "vocabulary"):
        assert getattr(loaded, field) == getattr(model, field)
    assert loaded.tensors().keys() == model.tensors().keys()
    for name, array in model.tensors().items():
        np.testing.assert_array_equal(loaded.tensors()[name], array, err_msg=name, strict=True)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_rows_that_stand_for_no_token_are_left_out(tmp_path: Path, granularity: Granularity) -> None:
    """Such folders were written, of models with a tokenizer."""
    whole = random_model(granularity)
    save_int8_model(whole, tmp_path / "int8")
    Vocabulary(whole.vocabulary.itos[:7]).save(tmp_path / "int8/vocab.json")
    model = load_int8_model(tmp_path / "int8")
    assert model.model == dataclasses.replace(whole.model, vocab_size=7)
    names = ("transformer.wte.weight", "transformer.wte.weight_scale")
    for name, array in model.tensors().items():
        np.testing.assert_array_equal(array, whole.tensors()[name][: 7 if name in names else None], err_msg=name)
    save_int8_model(model, tmp_path / "again")
    assert load_int8_model(tmp_path / "again").model == model.model


def test_the_files_are_what_the_format_says(folder: Path) -> None:
    """Read with nothing of ours: struct, json and numpy.frombuffer."""
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    layer = {"attn.c_attn": [96, 32], "attn.c_proj": [32, 32], "mlp.c_fc": [64, 32], "mlp.c_proj": [32, 64]}
    shapes = {f"transformer.h.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    shapes |= {"transformer.wte": [11, 32], "transformer.wpe": [16, 32]}
    expected = {f"{name}.weight": ("I8", shape) for name, shape in shapes.items()}
    expected |= {f"{name}.weight_scale": ("F32", [shape[0], 1]) for name, shape in shapes.items()}
    norms = ["h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f"]
    expected |= {f"transformer.{norm}.weight": ("F32", [32]) for norm in norms}
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == expected

    start, end = (8 + length + offset for offset in header["transformer.wte.weight"]["data_offsets"])
    codes = np.frombuffer(data[start:end], np.int8).reshape(11, 32)
    np.testing.assert_array_equal(codes, random_model().matrices["transformer.wte"].codes)

    assert json.loads((folder / "config.json").read_text()) == {
        "format": "picogpt-int8",
        "format_version": 1,
        "model": SMALL,
        "quantization": {
            "weight_bits": 8,
            "weight_granularity": "per_channel",
            "activation_bits": 8,
            "activation_granularity": "per_token",
            "symmetric": True,
            "quantize_attention": False,
        },
        "training": {"step": 250, "val_loss": 1.9, "dataset": "shakespeare_char"},
    }
    assert json.loads((folder / "vocab.json").read_text()) == {"type": "char", "itos": list("\nabcdefghij")}


def test_dequantize_multiplies_each_row_by_its_scale() -> None:
    tensor = Int8Tensor(np.array([[1, -127], [2, 0]], np.int8), np.array([[0.5], [2.0]], np.float32))
    np.testing.assert_array_equal(tensor.dequantize(), np.array([[0.5, -63.5], [4, 0]], np.float32), strict=True)


def nested(section: str, **changes: Any) -> Callable[[dict], object]:
    return lambda config: config[section].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(format="gguf"), "format is 'gguf'; expected 'picogpt-int8'"),
        (lambda config: config.update(format_version=3), "format_version is 3; this picogpt_jax reads 1 and 2: update"),
        (lambda config: config.update(format_version=2), r"config.json lacks the keys \['arithmetic'\]"),
        (lambda config: config.update(format_version=True), "format_version is True"),
        (lambda config: config.pop("training"), r"lacks the keys \['training'\]"),
        (lambda config: config.update(colour="red"), r"unknown keys \['colour'\]"),
        (lambda config: config.update(training=[]), "training is a list; expected a dict"),
        (lambda config: config["training"].update(loss=float("nan")), "training cannot be written as JSON"),
        (nested("model", n_layers=2), r"unknown keys \['n_layers'\]"),
        (lambda config: config["model"].pop("bias"), r"lacks the keys \['bias'\]"),
        (nested("model", n_layer="2"), "n_layer='2' is a str; expected int"),
        (nested("model", n_layer=1 << 19), "n_layer=524288, but there are only 25 tensors"),
        (nested("model", n_embd=1 << 40), "n_embd=1099511627776 is not between"),
        (nested("model", n_head=3), "n_embd=32 is not a multiple of"),
        (nested("model", bias=True), r"missing tensors: .*attn.c_attn.bias.* and 10 more"),
        (nested("model", mlp_ratio=4), r"c_fc.weight is int8 \[64, 32\]; expected int8 \[128, 32\]"),
        (nested("model", vocab_size=12), r"wte.weight is int8 \[11, 32\]; expected int8 \[12, 32\]"),
        (nested("quantization", weight_bits=4), "quantization.weight_bits=4 is not one of 8"),
        (nested("quantization", activation_bits=16), "activation_bits=16 is not one of 8, None"),
        (nested("quantization", activation_bits="8"), "activation_bits='8' is not one of 8, None"),
        (nested("quantization", group_size=64), r"quantization has unknown keys \['group_size'\]; it knows"),
        (
            lambda config: config.update(quantization=None),
            "quantization must be a mapping .*, found NoneType",
        ),
        (nested("quantization", symmetric=1), "symmetric=1 is not one of True"),
        (nested("quantization", quantize_attention=True), "quantize_attention=True is not one of False"),
        (nested("quantization", weight_granularity="per_tensor"), r"weight_scale is float32 \[.*, 1\]; .* \[1, 1\]"),
    ],
)
def test_a_wrong_config_is_refused(folder: Path, change: Callable[[dict], object], message: str) -> None:
    rewrite_json(folder / "config.json", change)
    with pytest.raises(UserError, match=message):
        load_int8_model(folder)


def test_a_wrong_vocabulary_is_refused(folder: Path) -> None:
    rewrite_json(folder / "vocab.json", lambda vocabulary: vocabulary["itos"].append("z"))
    with pytest.raises(UserError, match=r"vocabulary has 12 entries, but model\.vocab_size=11"):
        load_int8_model(folder)


def put(name: str, array: np.ndarray) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.update({name: array})


def poke(name: str, value: float) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors[name].__setitem__((0,) * tensors[name].ndim, value)


WTE, SCALE, NORM = "transformer.wte.weight", "transformer.wte.weight_scale", "transformer.ln_f.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(SCALE), f"unknown tensors: none; missing tensors: {SCALE}"),
        (put("lm_head.weight", np.zeros((11, 32), np.int8)), "unknown tensors: lm_head.weight; missing tensors: none"),
        (put(WTE, np.zeros((11, 32), np.uint8)), rf"{WTE} is U8 \[11, 32\]; expected int8 \[11, 32\]"),
        (put(WTE, np.zeros((32, 11), np.int8)), rf"{WTE} is int8 \[32, 11\]; expected int8 \[11, 32\]"),
        (put(SCALE, np.ones((11, 1), np.float64)), rf"{SCALE} is F64 \[11, 1\]; expected float32"),
        (put(SCALE, np.ones(11, np.float32)), rf"{SCALE} is float32 \[11\]; expected float32 \[11, 1\]"),
        (poke(WTE, -128), f"{WTE} holds the code -128"),
        (poke(SCALE, 0), f"{SCALE} holds a scale of 0.0; expected positive"),
        (poke(SCALE, -1), f"{SCALE} holds a scale of -1.0"),
        (poke(SCALE, np.inf), f"{SCALE} holds values that are not finite"),
        (poke(SCALE, np.nan), f"{SCALE} holds values that are not finite"),
        (poke(NORM, np.nan), f"{NORM} holds values that are not finite"),
    ],
)
def test_wrong_tensors_are_refused(
    folder: Path, change: Callable[[dict[str, np.ndarray]], object], message: str
) -> None:
    rewrite_tensors(folder, change)
    with pytest.raises(UserError, match=message):
        load_int8_model(folder)


def with_header(header: bytes) -> Callable[[bytes], bytes]:
    return lambda data: struct.pack("<Q", len(header)) + header + data[-64:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: data[:4],
        lambda data: b"",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: struct.pack("<Q", 1 << 40) + data[8:],
        with_header(b"no json"),
        with_header(b'{"a": {"dtype": "I8", "shape": [1099511627776], "data_offsets": [0, 1099511627776]}}'),
        with_header(b'{"a": {"dtype": "I8", "shape": [99999999999], "data_offsets": [0, 64]}}'),
    ],
)
def test_a_damaged_tensor_file_is_refused(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"model.safetensors: is no readable safetensors file"):
        load_int8_model(folder)


def test_a_tensor_stored_twice_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    again = json.dumps({WTE: header[WTE]}).encode()[1:-1]
    twice = json.dumps(header).encode()[:-1] + b", " + again + b"}"
    path.write_bytes(struct.pack("<Q", len(twice)) + twice + data[8 + length :])
    with pytest.raises(UserError, match=f"stored more than once: {WTE}"):
        load_int8_model(folder)


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        load_int8_model(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is not a folder"):
        load_int8_model(tmp_path / "nothing")


def test_construction_checks_as_loading_does() -> None:
    model = random_model()
    with pytest.raises(UserError, match=r"missing tensors: transformer\.ln_f\.weight"):
        dataclasses.replace(model, vectors={name: x for name, x in model.vectors.items() if name != NORM})
    with pytest.raises(UserError, match=rf"{NORM} is float64 \[32\]; expected float32"):
        dataclasses.replace(model, vectors=model.vectors | {NORM: np.ones(32)})
    with pytest.raises(UserError, match="training cannot be written as JSON"):
        dataclasses.replace(model, training={"val_loss": np.float32(1.0)})


def test_an_int8_folder_is_recognised(folder: Path, tmp_path: Path) -> None:
    assert is_int8_folder(folder)
    assert not is_int8_folder(tmp_path)
    assert not is_int8_folder(folder / "config.json")
    (folder / "config.json").write_text("{")  # damaged: still one, so that loading it can say what is wrong
    assert is_int8_folder(folder)
    (folder / "config.json").write_text('{"model": {}}')  # a training run's
    assert not is_int8_folder(folder)


def test_saving_replaces_the_folder_as_a_whole(folder: Path) -> None:
    (folder / "stale.txt").write_text("of an earlier model")
    save_int8_model(random_model(n_layer=1), folder)
    assert load_int8_model(folder).model.n_layer == 1
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "vocab.json"]


def test_requantizing_per_tensor_puts_each_matrix_on_one_grid() -> None:
    model = random_model()
    per_tensor = requantize_per_tensor(model)
    assert per_tensor.quantization.weight_granularity == "per_tensor"
    for name, matrix in model.matrices.items():
        values, found = matrix.dequantize(), per_tensor.matrices[name]
        scale = np.abs(values).max() / np.float32(127)
        assert found.scale.item() == scale
        assert np.abs(found.codes).max() == 127
        assert np.abs(found.dequantize() - values).max() <= scale * 0.5001
    assert requantize_per_tensor(per_tensor) is per_tensor


def test_requantizing_rounds_half_to_even_and_keeps_zeros() -> None:
    model = random_model()
    codes, scale = np.zeros((11, 32), np.int8), np.ones((11, 1), np.float32)
    codes[0, :4], codes[1, :2], scale[1] = [127, 1, 3, -1], [1, 3], 0.5
    halves = Int8Tensor(codes, scale)
    zeros = Int8Tensor(np.zeros((16, 32), np.int8), np.ones((16, 1), np.float32))
    changed = {"transformer.wte": halves, "transformer.wpe": zeros}
    matrices = requantize_per_tensor(dataclasses.replace(model, matrices=model.matrices | changed)).matrices
    assert matrices["transformer.wte"].codes[0, :4].tolist() == [127, 1, 3, -1]
    assert matrices["transformer.wte"].codes[1, :2].tolist() == [0, 2]  # 0.5 and 1.5
    assert not matrices["transformer.wpe"].codes.any()


def test_the_sizes_add_up(folder: Path) -> None:
    model = random_model()
    n_codes = 2 * (96 * 32 + 32 * 32 + 2 * 64 * 32) + 11 * 32 + 16 * 32
    n_scales = 2 * (96 + 32 + 64 + 32) + 11 + 16
    n_floats = 5 * 32
    assert model.n_bytes == n_codes + 4 * (n_scales + n_floats)
    assert model.model.n_parameters == n_codes + n_floats
    assert model.model.int8_share == pytest.approx(n_codes / (n_codes + n_floats))
    assert file_bytes(folder) == sum(path.stat().st_size for path in folder.iterdir())


def test_the_module_needs_neither_jax_nor_torch() -> None:
    """An exporter, or a machine that only serves, must not need what trained the model."""
    code = "import sys, picogpt_jax.int8.int8_model; print([name for name in ('jax', 'torch') if name in sys.modules])"
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
