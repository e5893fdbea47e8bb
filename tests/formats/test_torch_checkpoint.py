"""Float PyTorch checkpoints: as nanoGPT and picoGPT write and load them, and what is refused."""

import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_int8_model import random_model
from torch import nn
from torch.ao import quantization

from picogpt_jax.benchmarks import torch_baseline
from picogpt_jax.config import ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.formats.gpt2_tensors import FloatCheckpoint
from picogpt_jax.formats.torch_checkpoint import load_float_checkpoint, save_float_checkpoint
from picogpt_jax.int8.int8_model import Int8Model

MODEL_ARGS = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "block_size": 16,
    "bias": False,
    "vocab_size": 11,
    "dropout": 0.0,
}


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def float_tensors(model: Int8Model) -> dict[str, np.ndarray]:
    return {f"{name}.weight": matrix.dequantize() for name, matrix in model.matrices.items()} | model.vectors


def save_float(path: Path, **changes: Any) -> Int8Model:
    model = random_model(**changes)
    config = {"dataset": "shakespeare_char"}
    checkpoint = FloatCheckpoint(model.model, float_tensors(model), 250, 1.5, config, model.vocabulary)
    save_float_checkpoint(checkpoint, path)
    return model


@pytest.fixture
def float_file(tmp_path: Path) -> Path:
    save_float(tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


def put(section: str, **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[section].update({name.replace("__", "."): value for name, value in values.items()})


def drop(section: str, name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[section].pop(name)


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


def only_model_and_heads(content: dict[str, Any]) -> None:
    heads = content["model_args"]["n_head"]
    for key in set(content) - {"model"}:
        del content[key]
    content["model_args"] = {"n_head": heads}


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update(model={change(name): tensor for name, tensor in content["model"].items()})


@pytest.mark.parametrize(
    "change",
    [
        only_model_and_heads,
        drop("model", "lm_head.weight"),
        drop("model", "transformer.wte.weight"),
        renamed(lambda name: f"module.{name}"),
        renamed(lambda name: f"_orig_mod.module.{name}"),
        renamed(lambda name: f"module._orig_mod.{name}"),
        renamed(lambda name: name.replace(".h.0.", ".h.0._orig_mod.")),
        renamed(lambda name: name.replace(".attn.", "._fsdp_wrapped_module.attn.")),
        renamed(lambda name: name.removeprefix("transformer.")),
        lambda content: content["model"].update({"transformer.h.0.attn.bias": torch.ones(1, 1, 2, 2, dtype=bool)}),
    ],
    ids=[
        "only what is needed",
        "no head",
        "only the head",
        "ddp",
        "compiled",
        "wrapped",
        "block",
        "fsdp",
        "trunk",
        "mask",
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_what_other_programs_leave_out_or_put_before_names(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], bias: bool
) -> None:
    model = save_float(tmp_path / "ckpt.pt", bias=bias)
    rewrite(tmp_path / "ckpt.pt", change)
    loaded = load_float_checkpoint(tmp_path / "ckpt.pt")
    assert loaded.model == model.model
    assert loaded.tensors.keys() == float_tensors(model).keys()
    for name, array in float_tensors(model).items():
        np.testing.assert_array_equal(loaded.tensors[name], array, err_msg=name, strict=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(float_file: Path, dtype: torch.dtype) -> None:
    rewrite(float_file, lambda content: content.update(model={x: y.to(dtype) for x, y in content["model"].items()}))
    stored = torch.load(float_file, weights_only=True)["model"]
    for name, array in load_float_checkpoint(float_file).tensors.items():
        assert stored[name].dtype == dtype
        np.testing.assert_array_equal(
            array, stored[name].double().numpy().astype(np.float32), err_msg=name, strict=True
        )


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
        (
            drop("model", "transformer.h.0.mlp.c_fc.weight"),
            r"there is no matrix transformer.h.0.mlp.c_fc.weight, which every GPT-2 has; the tensors are: lm_head.w",
        ),
        (put("model", transformer__h__0__mlp__c_fc__weight=torch.ones(65, 32)), r"c_fc.weight is of shape \[65, 32\]"),
        (put("model", transformer__wte__weight=torch.ones(65)), "there is no matrix transformer.wte.weight"),
        (put("model", transformer__ln_f__bias=torch.zeros(32)), "model_args says bias=False, the tensors True; "),
        (put("model", ln_f__weight=torch.zeros(32)), "transformer.ln_f.weight and ln_f.weight are one tensor, stored"),
        (put("model", extra__weight=torch.zeros(32)), "unknown tensors: extra.weight; missing tensors: none"),
        (put("model", transformer__ln_f__weight=torch.zeros(31)), r"is float32 \[31\]; expected float32 \[32\]"),
        (
            put("model", transformer__ln_f__weight=torch.zeros(32).double()),
            "ln_f.weight is float64 .*; expected flo",
        ),
        (put("model", transformer__ln_f__weight=torch.full((32,), torch.inf)), "ln_f.weight holds values that are not"),
        (put("model", lm_head__weight=torch.zeros(11, 32)), "lm_head.weight differs from transformer.wte.weight"),
        (put("model", _orig_mod__lm_head__weight=torch.zeros(11, 32)), "are one tensor, stored twice"),
        (put("model_args", colour="red"), "model_args has the unknown keys colour; it knows n_layer, n_head, n_embd"),
        (put("model_args", n_layer=1 << 19), "model_args says n_layer=524288, the tensors 2; write it again with: "),
        (put("model_args", n_embd=-32), "model_args says n_embd=-32, the tensors 32; .*n_embd=32, n_head=N_HEAD"),
        (
            put("model", transformer__h__9999999__ln_1__weight=torch.ones(1)),
            "model_args says n_layer=2, the tensors 1",
        ),
        (lambda content: content.update(model_args=[]), "model_args is a list; expected a dict"),
        (put("model_args", n_head="4"), "n_head='4' is a str"),
        (lambda content: content.update(best_val_loss="low"), "best_val_loss is str; expected a number"),
        (lambda content: content.update(best_val_loss=10**400), "best_val_loss is int; expected a number"),
        (lambda content: content.update(iter_num=float("inf")), "iter_num is inf; expected a number"),
        (put("model_args", **{"a\nb\x1b": 1}), r"model_args has the unknown keys a b\\x1b; it knows"),
        (lambda content: content.update(config=torch.ones(1)), "config holds a Tensor; expected plain values"),
        (lambda content: content.update(model=None), "model is a NoneType; expected a dict"),
    ],
)
def test_a_wrong_float_file_is_refused(
    float_file: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(float_file, change)
    with pytest.raises(UserError, match=message):
        load_float_checkpoint(float_file)


@pytest.mark.parametrize("change", ["bare", "no model_args", "no n_head", "wrong width", "wrong depth"])
def test_a_file_that_lacks_or_contradicts_sizes_says_how_to_write_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a 'file'.pt"
    model = save_float(path)
    content = torch.load(path, weights_only=True)
    if change == "bare":
        content = content["model"]
    elif change == "no model_args":
        del content["model_args"]
    elif change == "no n_head":
        content["model_args"] = {"dropout": 0.0}
    else:
        content["model_args"] |= {"n_embd": 64} if change == "wrong width" else {"n_layer": 3}
    torch.save(content, path)
    with pytest.raises(UserError, match="write it again with: python -c ") as told:
        load_float_checkpoint(path)
    assert len(str(told.value)) < 300 + 2 * len(str(path))
    python, option, code = shlex.split(str(told.value).partition("write it again with: ")[2])
    assert (python, option) == ("python", "-c")
    exec(code.replace("N_HEAD", "4"), {})
    loaded = load_float_checkpoint(tmp_path / "a 'file'.fixed.pt")
    assert loaded.model == model.model
    for name, array in float_tensors(model).items():
        np.testing.assert_array_equal(loaded.tensors[name], array, err_msg=name, strict=True)


class GPTConfig:
    """As build-nanogpt's, an object of which its log/model_*.pt holds one."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def test_a_file_with_an_object_names_it_and_says_what_to_save(
    float_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = {key: value for key, value in MODEL_ARGS.items() if key not in ("bias", "dropout")}
    state = torch.load(float_file, weights_only=True)["model"]
    torch.save({"model": state, "config": GPTConfig(**args), "step": 3, "val_loss": 1.5}, tmp_path / "log.pt")
    with pytest.raises(UserError, match=r"log.pt holds a Python object, \S*GPTConfig; these are never") as told:
        load_float_checkpoint(tmp_path / "log.pt")
    assert len(str(told.value)) < 300 + len(str(tmp_path))
    code = str(told.value).partition("save instead: ")[2].removesuffix(" ('gelu': the exact one)")
    theirs = SimpleNamespace(state_dict=lambda: state, config=GPTConfig(**args))
    exec(code, {"torch": torch, "model": theirs})
    loaded = load_float_checkpoint(tmp_path / "ckpt.pt").model
    assert loaded == ModelConfig(**MODEL_ARGS, mlp_ratio=2, activation="gelu_tanh", layer_norm_epsilon=1e-5)


def test_wrong_tensors_are_not_saved(tmp_path: Path) -> None:
    model = random_model()
    tensors = float_tensors(model) | {"lm_head.weight": np.zeros((11, 32), np.float32)}
    with pytest.raises(UserError, match=r"unknown tensors: lm_head\.weight"):
        save_float_checkpoint(FloatCheckpoint(model.model, tensors), tmp_path / "x.pt")


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
        save_float(tmp_path / "ckpt.pt", **change)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- picoGPT's own QAT


def prepared_by_picogpt(model: torch_baseline.GPT) -> torch_baseline.GPT:
    """As picoGPT prepares its model: one qconfig for every module but the embeddings, observers on their outputs."""
    observer = quantization.MinMaxObserver.with_args(quant_min=0, quant_max=127)
    per_channel = quantization.PerChannelMinMaxObserver.with_args(ch_axis=0, quant_min=-128, quant_max=127)
    grid = dict(quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    model.qconfig = quantization.QConfig(
        activation=quantization.FakeQuantize.with_args(observer=observer, quant_min=0, quant_max=127),
        weight=quantization.FakeQuantize.with_args(observer=per_channel, **grid),
    )
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.qconfig = None
    return quantization.prepare_qat(model.train(), inplace=False)


@pytest.mark.parametrize("prepare", [prepared_by_picogpt, torch_baseline.prepare_qat])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [False, True])
def test_a_qat_checkpoint_gives_its_float_parameters(
    tmp_path: Path, prepare: Callable[[torch_baseline.GPT], torch_baseline.GPT], prefix: str, bias: bool
) -> None:
    args = MODEL_ARGS | {"bias": bias}
    config = ModelConfig(**args, mlp_ratio=2, activation="gelu", layer_norm_epsilon=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated, and is what picoGPT trains with
        model = prepare(torch_baseline.GPT(config))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):  # the observers have seen something
            tokens = torch.randint(11, (2, 16))
            model(tokens, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    state = model.state_dict()
    quantizers = {name for name in state if "fake_quant" in name or "activation_post_process" in name}
    assert {name.rsplit(".", 1)[1] for name in quantizers} == {
        *("scale", "zero_point", "fake_quant_enabled", "observer_enabled", "eps", "min_val", "max_val")
    }
    content = {
        "model": {f"{prefix}{name}": tensor for name, tensor in state.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 2,
        "best_val_loss": torch.tensor(2.5),
        "config": {"enable_quantization": True},
    }
    torch.save(content, tmp_path / "ckpt.pt")

    loaded = load_float_checkpoint(tmp_path / "ckpt.pt")
    assert loaded.model == config
    assert loaded.tensors.keys() == set(state) - quantizers - {"lm_head.weight"}
    for name, array in loaded.tensors.items():
        np.testing.assert_array_equal(array, state[name].numpy(), err_msg=name, strict=True)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.0.attn.c_attn.weight_fake_quant.codes",
        "transformer.h.0.attn.c_attn.weight_fake_quant",
        "transformer.h.0.attn.c_attn.scale",
        "transformer.h.0.attn.masked",
        "weight_fake_quant.scale",
        "transformer.ln_f.weight_fake_quant.scale.weight",
    ],
)
def test_only_what_the_table_names_is_ignored(float_file: Path, name: str) -> None:
    rewrite(float_file, lambda content: content["model"].update({name: torch.ones(1)}))
    with pytest.raises(UserError, match=f"unknown tensors: {name}; missing tensors: none"):
        load_float_checkpoint(float_file)
