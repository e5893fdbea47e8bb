"""picoGPT's int8 files: ours, read back as picoGPT loads them, picoGPT's own, and hostile or damaged ones."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_int8_model import random_model
from test_torch_checkpoint import MODEL_ARGS, drop, put, rewrite
from torch import Tensor, nn

from picogpt_jax.benchmarks import torch_baseline
from picogpt_jax.config import ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.formats.torch_int8_checkpoint import load_int8_checkpoint, load_picogpt_int8, save_int8_checkpoint
from picogpt_jax.int8.int8_model import Int8Model, requantize_per_tensor
from picogpt_jax.runtimes.torch_model import Int8GPT

# picoGPT's model with its int8 loader, written anew from the layout of its files.


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


def assert_same(found: Int8Model, expected: Int8Model) -> None:
    for field in ("model", "quantization", "training", "vocabulary"):
        assert getattr(found, field) == getattr(expected, field)
    for name, array in expected.tensors().items():
        np.testing.assert_array_equal(found.tensors()[name], array, err_msg=name, strict=True)


@pytest.fixture
def int8_file(tmp_path: Path) -> Path:
    save_int8_checkpoint(random_model(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_picogpt_loads_the_int8_file_and_computes_our_numbers(tmp_path: Path, granularity: Any, bias: bool) -> None:
    model = random_model(granularity, bias=bias)
    save_int8_checkpoint(requantize_per_tensor(model), tmp_path / "model.pt")
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
    save_int8_checkpoint(requantize_per_tensor(model), tmp_path / "model.pt")
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
        ({"layer_norm_epsilon": 1e-6}, "model.layer_norm_epsilon=1e-06, but picoGPT and nanoGPT compute 1e-05 only"),
    ],
)
def test_what_picogpt_cannot_compute_is_not_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        save_int8_checkpoint(random_model(**change), tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


STATE = "model_state_dict"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("picogpt_jax"), "this is picoGPT's own int8 file"),
        (lambda content: content.pop("quantization_stats"), None),
        (lambda content: content.update(quantization_type="int4"), "quantization_type is 'int4'"),
        (lambda content: content.update(quantization_type=torch.ones(2)), "quantization_type holds a Tensor"),
        (lambda content: content.update(model_state_dict=[]), "model_state_dict is a list; expected a dict"),
        (lambda content: content.update(model_args=None), "model_args is a NoneType; expected a dict"),
        (put("model_args", n_embd=1 << 60), "model_args is .*1152921504606846976"),
        (put("model_args", n_embd=torch.ones(3)), "model_args holds a Tensor"),
        (drop("picogpt_jax", "wpe_scale"), r"picogpt_jax lacks the keys \['wpe_scale'\]"),
        (lambda content: content["picogpt_jax"]["config"].update(format_version=9), "format_version is 9"),
        (lambda content: content["picogpt_jax"]["vocabulary"]["itos"].append("é"), "vocabulary has 12 entries"),
        (drop(STATE, "lm_head.weight_scale"), "missing tensors: lm_head.weight_scale"),
        (put(STATE, head__weight=torch.ones(1)), "unknown tensors: head.weight"),
        (put(STATE, lm_head__weight_scale=torch.tensor(1.0)), r"lm_head.weight_scale is float32 \[\]; .* \[11, 1\]"),
        (put(STATE, lm_head__weight_scale=torch.zeros(11, 1)), "wte.weight_scale holds a scale of 0.0"),
        (put(STATE, lm_head__weight_scale=torch.full((11, 1), torch.nan)), "not finite"),
        (put(STATE, lm_head__weight_zero_point=torch.tensor(3)), "lm_head.weight_zero_point is 3; expected 0"),
        (put(STATE, lm_head__weight_int8=torch.ones(11, 32)), r"weight_int8 is float32 \[11, 32\]; expected int8"),
        (
            put(STATE, lm_head__weight_int8=torch.ones(11, 32).half()),
            "weight_int8 is float32 .*; expected int8",
        ),
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


# ------------------------------------------------------------------------------------------- picoGPT's own int8 files


class PicoQuantized(nn.Module):
    """A linear layer as picoGPT's quantize_pico.py leaves it: parameters, a scale for each matrix."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.data
        scale = max(abs(weight.min()), abs(weight.max())) / 127.0
        codes = torch.round(weight / scale).clamp(-128, 127).to(torch.int8)
        self.weight_int8 = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale.clone(), requires_grad=False)
        self.weight_zero_point = nn.Parameter(torch.tensor(0), requires_grad=False)
        self.bias = linear.bias


def picogpt_file(path: Path, written_args: dict[str, Any] | None = None, **changes: Any) -> torch_baseline.GPT:
    """Writes the file of a random model, with these model_args; returns the float model it was made from."""
    args = MODEL_ARGS | changes
    torch.manual_seed(0)
    config = ModelConfig(**args, mlp_ratio=2, activation="gelu", layer_norm_epsilon=1e-5)
    original, quantized = torch_baseline.GPT(config), torch_baseline.GPT(config)
    quantized.load_state_dict(original.state_dict())
    for name, module in list(quantized.named_modules()):
        if isinstance(module, nn.Linear):
            quantized.set_submodule(name, PicoQuantized(module))
    content = {
        "model_state_dict": quantized.state_dict(),
        "quantization_stats": {"_summary": {"total_layers_quantized": 9}},
        "model_args": args if written_args is None else written_args,
        "quantization_type": "full_int8",
    }
    torch.save(content, path)
    return original


@pytest.mark.parametrize("bias", [False, True])
def test_picogpts_own_file_gives_float_parameters(tmp_path: Path, bias: bool) -> None:
    original = picogpt_file(tmp_path / "int8.pt", bias=bias).state_dict()
    loaded = load_picogpt_int8(tmp_path / "int8.pt")
    stored = torch.load(tmp_path / "int8.pt", weights_only=True)["model_state_dict"]
    assert loaded.model == ModelConfig(
        **MODEL_ARGS | {"bias": bias}, mlp_ratio=2, activation="gelu", layer_norm_epsilon=1e-5
    )
    assert loaded.vocabulary is None
    assert loaded.tensors.keys() == set(original) - {"lm_head.weight"}
    for name, array in loaded.tensors.items():
        if f"{name}_int8" in stored:
            expected = stored[f"{name}_int8"].float() * stored[f"{name}_scale"]  # what picoGPT's sampler multiplies by
            assert np.abs(array - original[name].numpy()).max() <= stored[f"{name}_scale"] * 0.501
        else:
            expected = original[name]
        np.testing.assert_array_equal(array, expected.numpy(), err_msg=name, strict=True)


def test_picogpt_names_its_shakespeare_model_in_every_file(tmp_path: Path) -> None:
    """Its model_args are constants, whatever was quantized: sizes are those of the tensors."""
    constants = dict(n_layer=3, block_size=128, vocab_size=65, bias=False)
    picogpt_file(tmp_path / "int8.pt", MODEL_ARGS | constants, vocab_size=40, bias=True)
    model = load_picogpt_int8(tmp_path / "int8.pt").model
    assert model == ModelConfig(
        **MODEL_ARGS | {"vocab_size": 40, "bias": True}, mlp_ratio=2, activation="gelu", layer_norm_epsilon=1e-5
    )


def test_the_tied_head_may_be_half_a_step_from_the_embedding(tmp_path: Path) -> None:
    picogpt_file(tmp_path / "int8.pt")
    content = torch.load(tmp_path / "int8.pt", weights_only=True)
    codes = content["model_state_dict"]["lm_head.weight_int8"]
    codes[3, 5] += 1 if codes[3, 5] < 127 else -1
    torch.save(content, tmp_path / "int8.pt")
    with pytest.raises(UserError, match=r"lm_head is .* steps away from transformer.wte.weight; expected at most half"):
        load_picogpt_int8(tmp_path / "int8.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("model_args", n_embd=64), "model_args says n_embd=64, the tensors 32; write it again with"),
        (put("model_args", n_head=5), "n_embd=32 is not a multiple of model.n_head=5"),
        (drop("model_args", "n_head"), "model_args lacks n_head, the number of heads"),
        (lambda content: content.update(model_args=[]), "model_args is a list; expected a dict"),
        (lambda content: content.update(quantization_type="int4"), "quantization_type is 'int4'"),
        (drop(STATE, "transformer.wte.weight"), "there is no matrix transformer.wte.weight"),
        (put(STATE, transformer__wte__weight=torch.tensor(1.0)), "there is no matrix transformer.wte.weight"),
        (put(STATE, transformer__h__9999999__x=torch.tensor(1.0)), "n_layer=10000000 is not between|only"),
        (put(STATE, transformer__wte__weight=torch.full((11, 32), torch.nan)), "wte.weight holds values that are not"),
        (put(STATE, lm_head__weight=torch.ones(11, 32)), "unknown tensors: lm_head.weight; missing"),
        (put(STATE, lm_head__weight_scale=torch.tensor(-1.0)), "lm_head.weight_scale is -1.0; expected a positive"),
        (put(STATE, lm_head__weight_zero_point=torch.tensor(3)), "lm_head.weight_zero_point is 3; expected 0"),
        (drop(STATE, "transformer.h.0.mlp.c_fc.weight_int8"), "there is no matrix transformer.h.0.mlp.c_fc.weight"),
        (put(STATE, x=torch.zeros(1).expand(1 << 20, 1 << 20)), "the tensors declare 43980.* bytes in a file of"),
    ],
)
def test_a_wrong_file_of_picogpt_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    picogpt_file(tmp_path / "int8.pt")
    rewrite(tmp_path / "int8.pt", change)
    with pytest.raises(UserError, match=message):
        load_picogpt_int8(tmp_path / "int8.pt")


def test_neither_reader_takes_the_others_file(int8_file: Path, tmp_path: Path) -> None:
    picogpt_file(tmp_path / "int8.pt")
    with pytest.raises(UserError, match="this is picoGPT's own int8 file, with float embeddings; expected an int8 one"):
        load_int8_checkpoint(tmp_path / "int8.pt")
    with pytest.raises(UserError, match="this is not an int8 file of picoGPT's own"):
        load_picogpt_int8(int8_file)
