"""PyTorch checkpoint files: read back by picoGPT's way of loading, and hostile or damaged ones refused."""

import dataclasses
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_int8_model import random_model
from torch import Tensor, nn

from picogpt_jax.config import ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.int8_model import Int8Model, requantize_per_tensor
from picogpt_jax.torch_checkpoint import (
    checkpoint_kind,
    is_torch_checkpoint,
    load_float_checkpoint,
    load_int8_checkpoint,
    save_float_checkpoint,
    save_int8_checkpoint,
)
from picogpt_jax.torch_model import Int8GPT

MODEL_ARGS = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "block_size": 16,
    "bias": False,
    "vocab_size": 11,
    "dropout": 0.0,
}


# picoGPT's model with its int8 loader, written anew from the layout of its files: nanoGPT's names, scalar scales.


class PicoInt8Linear(nn.Module):
    def __init__(self, cols: int, rows: int, bias: bool) -> None:
        super().__init__()
        self.register_buffer("weight_int8", torch.zeros(rows, cols, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.tensor(1.0))
        self.register_buffer("weight_zero_point", torch.tensor(0, dtype=torch.int64))
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight_int8.float() - self.weight_zero_point) * self.weight_scale
        return F.linear(x, weight, self.bias)


class PicoBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        c_attn, attn_proj = PicoInt8Linear(width, 3 * width, bias), PicoInt8Linear(width, width, bias)
        c_fc, mlp_proj = PicoInt8Linear(width, mlp_ratio * width, bias), PicoInt8Linear(mlp_ratio * width, width, bias)
        self.attn = nn.ModuleDict({"c_attn": c_attn, "c_proj": attn_proj})
        self.mlp = nn.ModuleDict({"c_fc": c_fc, "c_proj": mlp_proj})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.attn["c_attn"](self.ln_1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).flatten(-2))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class PicoGPT(nn.Module):
    def __init__(self, args: dict[str, Any], mlp_ratio: int) -> None:
        super().__init__()
        width, bias = args["n_embd"], args["bias"]
        blocks = [PicoBlock(width, args["n_head"], mlp_ratio, bias) for _ in range(args["n_layer"])]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(args["vocab_size"], width),
                "wpe": nn.Embedding(args["block_size"], width),
                "h": nn.ModuleList(blocks),
                "ln_f": nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = PicoInt8Linear(width, args["vocab_size"], bias=False)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def load_as_picogpt_does(path: Path) -> PicoGPT:
    content = torch.load(path, weights_only=True)
    model = PicoGPT(content["model_args"], mlp_ratio=2)
    model.load_state_dict(content["model_state_dict"], strict=True)
    return model


def random_tokens(batch: int, time: int) -> Tensor:
    return torch.randint(11, (batch, time), generator=torch.Generator().manual_seed(0))


def without_activation_quantization(model: Int8Model) -> Int8Model:
    return dataclasses.replace(model, quantization=dataclasses.replace(model.quantization, activation_bits=None))


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def assert_same(found: Int8Model, expected: Int8Model) -> None:
    for field in ("model", "quantization", "training", "vocabulary"):
        assert getattr(found, field) == getattr(expected, field)
    for name, array in expected.tensors().items():
        np.testing.assert_array_equal(found.tensors()[name], array, err_msg=name, strict=True)


@pytest.fixture
def int8_file(tmp_path: Path) -> Path:
    save_int8_checkpoint(random_model(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def float_tensors(model: Int8Model) -> dict[str, np.ndarray]:
    return {f"{name}.weight": matrix.dequantize() for name, matrix in model.matrices.items()} | model.vectors


def save_float(path: Path, **changes: Any) -> Int8Model:
    model = random_model(**changes)
    save_float_checkpoint(
        model.model,
        float_tensors(model),
        path,
        iter_num=250,
        best_val_loss=1.5,
        config={"dataset": "shakespeare_char"},
        vocabulary=model.vocabulary,
    )
    return model


@pytest.fixture
def float_file(tmp_path: Path) -> Path:
    save_float(tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_picogpt_loads_the_int8_file_and_computes_our_numbers(tmp_path: Path, granularity: Any, bias: bool) -> None:
    model = random_model(granularity, bias=bias)
    save_int8_checkpoint(model, tmp_path / "model.pt", requantize="per_tensor")
    tokens = random_tokens(4, 16)
    theirs = load_as_picogpt_does(tmp_path / "model.pt")(tokens)

    weight_only = Int8GPT(without_activation_quantization(requantize_per_tensor(model)))
    torch.testing.assert_close(theirs, weight_only(tokens), atol=1e-4, rtol=0)
    difference = (theirs - Int8GPT(model)(tokens)).abs().mean()  # they quantize no activations
    assert 0 < difference < 0.05 * theirs.std()


def test_the_int8_file_has_picogpts_layout(tmp_path: Path) -> None:
    model = random_model("per_tensor")
    save_int8_checkpoint(model, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert content["quantization_type"] == "full_int8"
    assert content["model_args"] == MODEL_ARGS
    state = content["model_state_dict"]
    assert state["lm_head.weight_int8"].dtype == torch.int8
    assert state["lm_head.weight_scale"].shape == ()
    assert state["lm_head.weight_scale"].dtype == torch.float32
    assert state["lm_head.weight_zero_point"].shape == ()
    assert state["lm_head.weight_zero_point"].dtype == torch.int64
    np.testing.assert_array_equal(state["transformer.wpe.weight"], model.matrices["transformer.wpe"].dequantize())
    np.testing.assert_array_equal(state["transformer.wte.weight"], model.matrices["transformer.wte"].dequantize())

    n_codes = 2 * (96 * 32 + 32 * 32 + 2 * 64 * 32) + 11 * 32
    summary = content["quantization_stats"]["_summary"]
    assert summary["quantized_layers"] == 9
    assert (summary["original_bytes"], summary["quantized_bytes"]) == (4 * n_codes, n_codes + 4 * 9)
    assert summary["compression_ratio"] == pytest.approx(4, rel=0.01)
    assert content["quantization_stats"]["lm_head"]["original_bytes"] == 4 * 11 * 32


def test_per_channel_scales_are_columns(int8_file: Path) -> None:
    state = torch.load(int8_file, weights_only=True)["model_state_dict"]
    assert state["transformer.h.1.mlp.c_fc.weight_scale"].shape == (64, 1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_as_picogpt_does(int8_file)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("bias", [False, True])
def test_an_int8_file_gives_back_the_same_model(tmp_path: Path, granularity: Any, bias: bool) -> None:
    model = random_model(granularity, bias=bias, mlp_ratio=3)
    save_int8_checkpoint(model, tmp_path / "model.pt")
    assert_same(load_int8_checkpoint(tmp_path / "model.pt"), model)
    save_int8_checkpoint(model, tmp_path / "model.pt", requantize="per_tensor")
    assert_same(load_int8_checkpoint(tmp_path / "model.pt"), requantize_per_tensor(model))


def test_numpy_numbers_in_the_training_record_can_be_read_back(tmp_path: Path) -> None:
    """np.float64 is a float, and JSON takes it, but in a pickle it is a foreign object."""
    model = dataclasses.replace(random_model(), training={"val_loss": np.float64(1.5)})
    save_int8_checkpoint(model, tmp_path / "model.pt")
    assert load_int8_checkpoint(tmp_path / "model.pt").training == {"val_loss": 1.5}


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        save_int8_checkpoint(random_model(), tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "model.activation='relu', but picoGPT and nanoGPT compute 'gelu' only"),
        ({"activation": "gelu_tanh"}, "model.activation='gelu_tanh'"),
        ({"layer_norm_epsilon": 1e-6}, "model.layer_norm_epsilon=1e-06, but picoGPT and nanoGPT use 1e-05 only"),
    ],
)
def test_what_picogpt_cannot_compute_is_not_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        save_int8_checkpoint(random_model(**change), tmp_path / "model.pt")
    with pytest.raises(UserError, match=message):
        save_float(tmp_path / "ckpt.pt", **change)
    assert not list(tmp_path.iterdir())


def put(section: str, **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[section].update({name.replace("__", "."): value for name, value in values.items()})


def drop(section: str, name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[section].pop(name)


STATE = "model_state_dict"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("picogpt_jax"), "this is picoGPT's own int8 file"),
        (lambda content: content.pop("quantization_stats"), None),
        (lambda content: content.update(quantization_type="int4"), "quantization_type is 'int4'"),
        (lambda content: content.update(quantization_type=torch.ones(2)), "quantization_type holds a Tensor"),
        (lambda content: content.update(model_state_dict=[]), "model_state_dict is a list; expected a dict"),
        (lambda content: content.update(model_args=None), "model_args is None; picogpt_jax says"),
        (put("model_args", n_embd=1 << 60), "model_args is .*1152921504606846976"),
        (put("model_args", n_embd=torch.ones(3)), "model_args holds a Tensor"),
        (drop("picogpt_jax", "wpe_scale"), r"picogpt_jax lacks the keys \['wpe_scale'\]"),
        (lambda content: content["picogpt_jax"]["config"].update(format_version=9), "format_version is 9"),
        (lambda content: content["picogpt_jax"]["vocabulary"]["itos"].pop(), "vocabulary has 10 entries"),
        (drop(STATE, "lm_head.weight_scale"), "missing tensors: lm_head.weight_scale"),
        (put(STATE, head__weight=torch.ones(1)), "unknown tensors: head.weight"),
        (put(STATE, lm_head__weight_scale=torch.tensor(1.0)), r"lm_head.weight_scale is float32 \[\]; .* \[11, 1\]"),
        (put(STATE, lm_head__weight_scale=torch.zeros(11, 1)), "wte.weight_scale holds a scale of 0.0"),
        (put(STATE, lm_head__weight_scale=torch.full((11, 1), torch.nan)), "not finite"),
        (put(STATE, lm_head__weight_zero_point=torch.tensor(3)), "lm_head.weight_zero_point is 3; expected 0"),
        (put(STATE, lm_head__weight_int8=torch.ones(11, 32)), r"weight_int8 is float32 \[11, 32\]; expected int8"),
        (put(STATE, lm_head__weight_int8=torch.ones(11, 32).half()), "lm_head.weight_int8 is torch.float16"),
        (put(STATE, lm_head__weight_int8=torch.ones(11, 32).to_sparse()), "torch.sparse_coo"),
        (put(STATE, lm_head__weight_int8=[1]), "'lm_head.weight_int8' is a list; expected a tensor"),
        (put(STATE, transformer__wte__weight=torch.ones(11, 32)), "wte.weight is not its int8 codes times"),
        (put(STATE, transformer__wpe__weight=torch.ones(16, 32)), "wpe.weight is not its int8 codes times"),
        (put(STATE, x=torch.zeros(1).expand(1 << 20, 1 << 20)), "the tensors declare 43980.* bytes in a file of"),
    ],
)
def test_a_wrong_int8_file_is_refused(
    int8_file: Path, change: Callable[[dict[str, Any]], object], message: str | None
) -> None:
    rewrite(int8_file, change)
    if message is None:  # of use to people only
        assert_same(load_int8_checkpoint(int8_file), random_model())
        return
    with pytest.raises(UserError, match=message):
        load_int8_checkpoint(int8_file)


class NanoGPT(nn.Module):
    """The float model as nanoGPT names it, tied head included; only its state dict matters here."""

    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__()
        width, bias = args["n_embd"], args["bias"]

        def block() -> nn.ModuleDict:
            linear = {"c_attn": nn.Linear(width, 3 * width, bias), "c_proj": nn.Linear(width, width, bias)}
            hidden = {"c_fc": nn.Linear(width, 2 * width, bias), "c_proj": nn.Linear(2 * width, width, bias)}
            norms = {f"ln_{i}": nn.LayerNorm(width, bias=bias) for i in (1, 2)}
            return nn.ModuleDict(norms | {"attn": nn.ModuleDict(linear), "mlp": nn.ModuleDict(hidden)})

        tables = {
            "wte": nn.Embedding(args["vocab_size"], width),
            "wpe": nn.Embedding(args["block_size"], width),
        }
        blocks = nn.ModuleList(block() for _ in range(args["n_layer"]))
        self.transformer = nn.ModuleDict(tables | {"h": blocks, "ln_f": nn.LayerNorm(width, bias=bias)})
        self.lm_head = nn.Linear(width, args["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer["wte"].weight


@pytest.mark.parametrize("bias", [False, True])
def test_nanogpt_loads_the_float_file(tmp_path: Path, bias: bool) -> None:
    model = save_float(tmp_path / "ckpt.pt", bias=bias)
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert content["model_args"] == MODEL_ARGS | {"bias": bias}
    assert (content["iter_num"], content["best_val_loss"]) == (250, 1.5)
    assert content["config"] == {"dataset": "shakespeare_char"}
    head, table = (content["model"][name] for name in ("lm_head.weight", "transformer.wte.weight"))
    assert head.data_ptr() == table.data_ptr()

    theirs = NanoGPT(content["model_args"])
    theirs.load_state_dict(content["model"], strict=True)
    for name, array in float_tensors(model).items():
        np.testing.assert_array_equal(theirs.state_dict()[name], array, err_msg=name)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [False, True])
def test_nanogpts_own_file_is_read(tmp_path: Path, prefix: str, bias: bool) -> None:
    """As its train.py saves it: an optimizer, a loss that is a tensor, torch.compile's prefix, old causal masks."""
    args = MODEL_ARGS | {"bias": bias}
    theirs = NanoGPT(args)
    optimizer = torch.optim.AdamW(theirs.parameters())
    sum(parameter.sum() for parameter in theirs.parameters()).backward()
    optimizer.step()
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    state = theirs.state_dict() | masks
    content = {
        "model": {f"{prefix}{name}": tensor for name, tensor in state.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char"},
    }
    torch.save(content, tmp_path / "ckpt.pt")
    loaded = load_float_checkpoint(tmp_path / "ckpt.pt")
    assert loaded.model == ModelConfig(**args, mlp_ratio=2, activation="gelu", layer_norm_epsilon=1e-5)
    assert (loaded.iter_num, loaded.best_val_loss, loaded.vocabulary) == (250, 1.5, None)
    assert loaded.config == {"dataset": "shakespeare_char"}
    assert loaded.tensors.keys() == set(theirs.state_dict()) - {"lm_head.weight"}
    for name, array in loaded.tensors.items():
        np.testing.assert_array_equal(array, theirs.state_dict()[name], err_msg=name)


def test_a_float_file_gives_back_the_same_model(tmp_path: Path) -> None:
    model = save_float(tmp_path / "ckpt.pt", mlp_ratio=4, bias=True)
    loaded = load_float_checkpoint(tmp_path / "ckpt.pt")
    assert (loaded.model, loaded.vocabulary) == (model.model, model.vocabulary)
    for name, array in float_tensors(model).items():
        np.testing.assert_array_equal(loaded.tensors[name], array, err_msg=name, strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model", "transformer.ln_f.weight"), "missing tensors: transformer.ln_f.weight"),
        (drop("model", "lm_head.weight"), "missing tensors: lm_head.weight"),
        (
            drop("model", "transformer.h.0.mlp.c_fc.weight"),
            r"c_fc.weight is missing; expected \[a multiple of 32, 32\]",
        ),
        (put("model", transformer__h__0__mlp__c_fc__weight=torch.ones(65, 32)), r"c_fc.weight is of shape \[65, 32\]"),
        (put("model", transformer__ln_f__bias=torch.zeros(32)), "unknown tensors: transformer.ln_f.bias"),
        (put("model", transformer__ln_f__weight=torch.zeros(31)), r"is float32 \[31\]; expected float32 \[32\]"),
        (put("model", transformer__ln_f__weight=torch.zeros(32).double()), "ln_f.weight is torch.float64"),
        (put("model", transformer__ln_f__weight=torch.full((32,), torch.inf)), "ln_f.weight holds values that are not"),
        (put("model", lm_head__weight=torch.zeros(11, 32)), "lm_head.weight differs from transformer.wte.weight"),
        (put("model", _orig_mod__lm_head__weight=torch.zeros(11, 32)), "tensors occur twice"),
        (drop("model_args", "bias"), r"model_args lacks the keys \['bias'\]"),
        (put("model_args", colour="red"), r"model_args has unknown keys \['colour'\]"),
        (put("model_args", n_layer=1 << 19), "n_layer=524288, but there are only 16 tensors"),
        (put("model_args", n_embd=-32), "n_embd=-32 is not between"),
        (put("model_args", n_head="4"), "n_head='4' is a str"),
        (lambda content: content.update(best_val_loss="low"), "best_val_loss is str; expected a number"),
        (lambda content: content.update(config=torch.ones(1)), "config holds a Tensor; expected plain values"),
        (lambda content: content.update(model=None), "model is a NoneType; expected a dict"),
        (lambda content: content.pop("iter_num"), r"the file lacks the keys \['iter_num'\]"),
    ],
)
def test_a_wrong_float_file_is_refused(
    float_file: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(float_file, change)
    with pytest.raises(UserError, match=message):
        load_float_checkpoint(float_file)


def test_wrong_tensors_are_not_saved(tmp_path: Path) -> None:
    model = random_model()
    tensors = float_tensors(model) | {"lm_head.weight": np.zeros((11, 32), np.float32)}
    with pytest.raises(UserError, match=r"unknown tensors: lm_head\.weight"):
        save_float_checkpoint(
            model.model,
            tensors,
            tmp_path / "x.pt",
            iter_num=0,
            best_val_loss=0.0,
            config={},
            vocabulary=model.vocabulary,
        )


def test_the_kinds_are_told_apart(int8_file: Path, float_file: Path, tmp_path: Path) -> None:
    assert checkpoint_kind(int8_file) == "int8"
    assert checkpoint_kind(float_file) == "float"
    with pytest.raises(UserError, match="this is a float checkpoint; expected an int8 one"):
        load_int8_checkpoint(float_file)
    with pytest.raises(UserError, match="this is an int8 checkpoint; expected a float one"):
        load_float_checkpoint(int8_file)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"it has the keys \['weights'\]"):
        checkpoint_kind(tmp_path / "other.pt")
    torch.save([1], tmp_path / "other.pt")
    with pytest.raises(UserError, match="holds a list; expected a dict"):
        checkpoint_kind(tmp_path / "other.pt")


def test_a_torch_file_is_recognised(int8_file: Path, tmp_path: Path) -> None:
    assert is_torch_checkpoint(int8_file)
    renamed = int8_file.rename(tmp_path / "model.bin")
    assert is_torch_checkpoint(renamed)
    np.savez(tmp_path / "arrays.npz", np.ones(3))
    (tmp_path / "text.txt").write_text("no zip")
    (tmp_path / "damaged.pt").write_text("no zip")
    assert is_torch_checkpoint(tmp_path / "damaged.pt")  # so that loading it says what is wrong
    for name in ("arrays.npz", "text.txt", ".", "nothing.pt"):
        assert not is_torch_checkpoint(tmp_path / name)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("load", [load_int8_checkpoint, load_float_checkpoint, checkpoint_kind])
def test_no_code_of_a_file_is_run(tmp_path: Path, load: Callable[[Path], object]) -> None:
    for zipped in (True, False):
        torch.save({"model": Malicious(tmp_path / "pwned")}, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            UserError, match=r"m\.pt (cannot be read as tensors and plain values|is no PyTorch checkpoint)"
        ):
            load(tmp_path / "m.pt")
        assert not (tmp_path / "pwned").exists()
    torch.load(tmp_path / "m.pt", weights_only=False)  # the control: the file is a live one
    assert (tmp_path / "pwned").exists()


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10 << 20))
    with pytest.raises(UserError, match="declares 10485760, or is compressed"):
        load_int8_checkpoint(tmp_path / "bomb.pt")


def test_a_few_nested_lists_that_stand_for_billions_are_refused(float_file: Path) -> None:
    laughs: list[Any] = ["ha"]
    for _ in range(40):
        laughs = [laughs, laughs]
    rewrite(float_file, lambda content: content.update(config={"laughs": laughs}))
    with pytest.raises(UserError, match="config has more than 1048576 values"):
        load_float_checkpoint(float_file)


def test_damaged_files_are_refused(int8_file: Path, tmp_path: Path) -> None:
    data = int8_file.read_bytes()
    for size in (0, 1, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.pt").write_bytes(data[:size])
        with pytest.raises(UserError, match=r"cut\.pt is no PyTorch checkpoint, or is truncated"):
            load_int8_checkpoint(tmp_path / "cut.pt")
    with pytest.raises(UserError, match=r"nothing\.pt does not exist"):
        load_int8_checkpoint(tmp_path / "nothing.pt")


def test_a_flipped_byte_is_refused_or_harmless(int8_file: Path, tmp_path: Path) -> None:
    """Wherever it lies, in the zip's tables or in the pickle: a UserError, or a model that passed every check."""
    data, generator = int8_file.read_bytes(), random.Random(0)
    start, end = data.index(b"data.pkl"), data.index(b"PK", data.index(b"data.pkl"))
    places = [*range(start, end, 60), *range(len(data) - 3000, len(data), 60)]
    refused = 0
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << generator.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(changed)
        try:
            load_int8_checkpoint(tmp_path / "flipped.pt")
        except UserError:
            refused += 1
    assert refused > len(places) / 4


def test_an_unsafe_torch_is_refused(int8_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(UserError, match=r"torch 2.9.1\+cpu .*CVE-2026-24747.*install torch >= 2.10"):
        load_int8_checkpoint(int8_file)
