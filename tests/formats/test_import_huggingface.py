"""Hugging Face folders, written by transformers; hostile and damaged ones refused."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import GPT2Config, GPT2DoubleHeadsModel, GPT2LMHeadModel, GPT2Model

from picogpt_jax.errors import UserError
from picogpt_jax.formats.import_huggingface import is_huggingface_folder, load_huggingface
from picogpt_jax.int8 import convert
from picogpt_jax.model.gpt import GPT
from picogpt_jax.model.numerics import Numerics

SMALL: dict[str, Any] = dict(vocab_size=11, n_positions=16, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.2)
TENSORS = "model.safetensors"


def random_gpt2(**changes: Any) -> GPT2LMHeadModel:
    """Weights of many sizes, no zero bias."""
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(**SMALL | changes)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A GPT-2 as transformers saves it."""
    random_gpt2().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def our_logits(folder: Path, tokens_BT: np.ndarray) -> np.ndarray:
    config, tensors = load_huggingface(folder)
    network = GPT(config, Numerics(convert.FLOAT, "float"))
    variables = {"params": convert.params_from_arrays(config, tensors)}
    return np.asarray(jax.jit(network.apply)(variables, tokens_BT.astype(np.int32)))


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(activation_function="gelu", n_inner=64, layer_norm_epsilon=1e-3),
        dict(activation_function="relu", n_inner=96),
        dict(activation_function="gelu_pytorch_tanh", reorder_and_upcast_attn=True),
    ],
    ids=lambda changes: changes.get("activation_function", "default"),
)
def test_the_imported_model_computes_what_transformers_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    network = random_gpt2(**changes)
    network.save_pretrained(tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(0, 11, (4, 16))
    with torch.no_grad():
        theirs = network(torch.from_numpy(tokens)).logits.numpy()
    ours = our_logits(tmp_path / "hf", tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert np.abs(theirs).max() > 1, "logits near zero would agree whatever was read"


def test_every_tensor_is_read_unchanged(folder: Path) -> None:
    stored = load_file(folder / TENSORS)
    config, tensors = load_huggingface(folder)
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size, config.vocab_size) == (2, 4, 32, 16, 11)
    assert (config.mlp_ratio, config.bias, config.activation, config.dropout) == (4, True, "gelu_tanh", 0.2)
    assert set(tensors) == set(stored)
    for name, array in tensors.items():
        is_linear = array.ndim == 2 and ".h." in name
        np.testing.assert_array_equal(array, stored[name].T if is_linear else stored[name], err_msg=name, strict=True)


def test_a_key_that_is_absent_has_gpt2s_default(folder: Path) -> None:
    """The oldest config.json files name few keys; these are those that differ."""
    before = load_huggingface(folder)[0]
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **SMALL}))
    assert load_huggingface(folder)[0] == before


def test_a_model_without_a_head_and_without_a_prefix(folder: Path, tmp_path: Path) -> None:
    network = GPT2Model.from_pretrained(folder)
    network.save_pretrained(tmp_path / "bare")
    assert not any(name.startswith("transformer.") for name in load_file(tmp_path / "bare" / TENSORS))
    for name, array in load_huggingface(tmp_path / "bare")[1].items():
        np.testing.assert_array_equal(array, load_huggingface(folder)[1][name], err_msg=name, strict=True)


def test_masks_and_the_stored_head_are_known(folder: Path) -> None:
    before = load_huggingface(folder)[1]
    tensors = load_file(folder / TENSORS)
    tensors |= {f"transformer.h.{i}.attn.bias": np.tril(np.ones((1, 1, 16, 16), np.float32)) for i in range(2)}
    tensors |= {f"transformer.h.{i}.attn.masked_bias": np.float32(-1e4) * np.ones(1, np.float32) for i in range(2)}
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, folder / TENSORS)
    after = load_huggingface(folder)[1]
    assert set(after) == set(before)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + np.float32(1)
    save_file(tensors, folder / TENSORS)
    with pytest.raises(UserError, match=r"lm_head.weight differs from transformer.wte.weight; expected a head tied"):
        load_huggingface(folder)


def test_a_model_whose_biases_are_all_zero_has_none(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    zeroed = {name: 0 * array if name.endswith(".bias") else array for name, array in tensors.items()}
    save_file(
        {name: np.abs(array) if name.endswith(".bias") else array for name, array in zeroed.items()}, folder / TENSORS
    )
    config, ours = load_huggingface(folder)
    assert config.bias is False
    assert set(ours) == {name for name in tensors if not name.endswith(".bias")}
    zeroed["transformer.h.1.mlp.c_fc.bias"] = np.full(128, -0.0, np.float32)  # another bit pattern is kept
    save_file(zeroed, folder / TENSORS)
    assert load_huggingface(folder)[0].bias is True


def test_shards_are_put_together(folder: Path, tmp_path: Path) -> None:
    GPT2LMHeadModel.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for name, array in load_huggingface(tmp_path / "sharded")[1].items():
        np.testing.assert_array_equal(array, load_huggingface(folder)[1][name], err_msg=name, strict=True)


def test_shards_of_pytorch_are_put_together(folder: Path, tmp_path: Path) -> None:
    tensors = load_huggingface(folder)[1]
    state = GPT2LMHeadModel.from_pretrained(folder).state_dict()
    state["transformer.h.0.attn.bias"] = torch.ones(
        1, 1, 16, 16, dtype=torch.uint8
    )  # a mask, which the index names too
    files = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: tensor for name, tensor in state.items() if files[name] == file}, folder / file)
    (folder / TENSORS).unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    for name, array in load_huggingface(folder)[1].items():
        np.testing.assert_array_equal(array, tensors[name], err_msg=name, strict=True)
    torch.save({}, folder / file)
    with pytest.raises(UserError, match=rf"{file}: it does not hold exactly the tensors of pytorch_model.bin.index"):
        load_huggingface(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module."])
def test_what_wrappers_put_before_names_is_taken_off(folder: Path, prefix: str) -> None:
    before = load_huggingface(folder)[1]
    save_file({f"{prefix}{name}": array for name, array in load_file(folder / TENSORS).items()}, folder / TENSORS)
    for name, array in load_huggingface(folder)[1].items():
        np.testing.assert_array_equal(array, before[name], err_msg=name, strict=True)
    tensors = load_file(folder / TENSORS)
    tensors[f"{prefix}transformer.ln_f.weight"] = np.ones(3, np.float32)
    save_file(tensors, folder / TENSORS)
    with pytest.raises(UserError, match=rf"hf: {prefix}transformer.ln_f.weight is float32 \[3\]; expected"):
        load_huggingface(folder)


def test_a_table_under_the_heads_name_alone(folder: Path) -> None:
    """As `safetensors.torch.save_model` leaves tied tensors."""
    before = load_huggingface(folder)[1]
    tensors = load_file(folder / TENSORS)
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, folder / TENSORS)
    for name, array in load_huggingface(folder)[1].items():
        np.testing.assert_array_equal(array, before[name], err_msg=name, strict=True)


def test_another_head_is_named_and_left_out_by_the_command_of_the_message(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    GPT2DoubleHeadsModel.from_pretrained(folder).save_pretrained(tmp_path / "two heads")
    with pytest.raises(UserError, match=r"another head, multiple_choice_head\.summary\.bias and 1 more, ") as told:
        load_huggingface(tmp_path / "two heads")
    assert len(str(told.value)) < 240 + 2 * len(str(tmp_path / "two heads"))
    exec(shlex.split(str(told.value).partition("write it without: ")[2])[2], {})
    before = load_huggingface(folder)[1]
    for name, array in load_huggingface(tmp_path / "two heads-lm")[1].items():
        np.testing.assert_array_equal(array, before[name], err_msg=name, strict=True)


def test_a_pytorch_file_is_read_too(folder: Path, tmp_path: Path) -> None:
    tensors = load_huggingface(folder)[1]
    torch.save(GPT2LMHeadModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / TENSORS).unlink()
    for name, array in load_huggingface(folder)[1].items():
        np.testing.assert_array_equal(array, tensors[name], err_msg=name, strict=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["one file", "shards", "pytorch"])
def test_half_precision_is_widened_exactly(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    network = random_gpt2().to(dtype)
    network.transformer.wpe.weight.data[0, :3] = torch.tensor([-0.0, 2.0**-24, 5.0])  # float16's smallest, not normal
    network.transformer.h[0].ln_1.float()  # the others are of another type
    source = network.state_dict()
    network.save_pretrained(tmp_path, max_shard_size="20KB" if layout == "shards" else "1GB")
    if layout == "pytorch":
        torch.save(source, tmp_path / "pytorch_model.bin")
        (tmp_path / TENSORS).unlink()
    for name, array in load_huggingface(tmp_path)[1].items():
        expected = source[name].double().numpy()  # which every value of the three types is exactly in
        expected = expected.T if expected.ndim == 2 and ".h." in name else expected
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array.astype(np.float64), expected, err_msg=name, strict=True)
        np.testing.assert_array_equal(np.signbit(array), np.signbit(expected), err_msg=name)
    assert source["transformer.wte.weight"].dtype == dtype


def test_what_float16_could_not_hold_is_refused(tmp_path: Path) -> None:
    network = random_gpt2()
    network.transformer.wpe.weight.data[0, 0] = 1e6
    network.half().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"wpe\.weight holds values that are not finite"):
        load_huggingface(tmp_path)


def test_linked_files_are_read(folder: Path, tmp_path: Path) -> None:
    """As the cache of the Hub lays its files out."""
    (tmp_path / "snapshot").mkdir()
    for name in ("config.json", TENSORS):
        (tmp_path / "snapshot" / name).symlink_to(folder / name)
    assert is_huggingface_folder(tmp_path / "snapshot")
    assert set(load_huggingface(tmp_path / "snapshot")[1]) == set(load_huggingface(folder)[1])


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="llama"), "model_type is 'llama'; expected 'gpt2'"),
        (dict(scale_attn_weights=False), "scale_attn_weights is False, scores that are not divided"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True, scores that"),
        (dict(add_cross_attention=True), "add_cross_attention is True, cross-attention; expected False"),
        (dict(tie_word_embeddings=False), "tie_word_embeddings is False, a head that is not the token embedding"),
        (dict(quantization_config={"bits": 4}), "quantization_config is .*quantized weights; expected None"),
        (dict(activation_function="silu"), "activation_function is 'silu'; expected one of"),
        (dict(activation_function=["gelu"]), r"activation_function is \['gelu'\]"),
        (dict(n_inner=33), "n_inner is 33; expected a multiple of n_embd=32"),
        (dict(n_inner=1e9), "n_inner is 1000000000.0; expected a multiple"),
        (dict(n_inner=0), "mlp_ratio=0 is not between 1"),
        (dict(n_embd=0, n_inner=64), "n_inner is 64; expected a multiple of n_embd=0"),
        (dict(n_embd="32"), "n_embd='32' is a str"),
        (dict(n_head=5), "n_embd=32 is not a multiple of model.n_head=5"),
        (dict(n_layer=1 << 19), "n_layer=524288, but there are only"),
        (dict(n_layer=1 << 60), "n_layer=1152921504606846976 is not between"),
        (dict(n_layer=1), "unknown tensors: transformer.h.1"),
        (dict(n_layer=3), "missing tensors: transformer.h.2"),
        (dict(vocab_size=12), r"wte.weight is float32 \[11, 32\]; expected float32 \[12, 32\]"),
        (dict(layer_norm_epsilon=None), "layer_norm_epsilon=None is a NoneType"),
        (dict(resid_pdrop=1.0), r"dropout=1.0 is not in \[0, 1\)"),
    ],
)
def test_another_architecture_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        load_huggingface(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("transformer.h.1.ln_2.bias"), "missing tensors: transformer.h.1.ln_2.bias"),
        (
            lambda tensors: tensors.update(extra=np.ones(1, np.float32)),
            "another head, extra, which is not computed",
        ),
        (
            lambda tensors: tensors.update({"wte.weight": tensors["transformer.wte.weight"]}),
            "transformer.wte.weight and wte.weight are one tensor, stored twice",
        ),
        (lambda tensors: tensors["transformer.wpe.weight"].fill(np.nan), "wpe.weight holds values that are not finite"),
        (
            lambda tensors: tensors.update({"transformer.wpe.weight": np.ones((16, 32), np.float64)}),
            r"wpe.weight is F64 \[16, 32\]; expected float32",
        ),
        (
            lambda tensors: tensors.update({"transformer.h.0.mlp.c_fc.weight": np.ones((128, 32), np.float32)}),
            r"c_fc.weight is float32 \[128, 32\]; expected float32 \[32, 128\]",
        ),
    ],
)
def test_wrong_tensors_are_refused(
    folder: Path, change: Callable[[dict[str, np.ndarray]], object], message: str
) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    with pytest.raises(UserError, match=message):
        load_huggingface(folder)


def test_damaged_files_are_refused(folder: Path) -> None:
    data = (folder / TENSORS).read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        (folder / TENSORS).write_bytes(data[:size])
        with pytest.raises(UserError, match=r"model.safetensors: is no readable safetensors file"):
            load_huggingface(folder)
    (folder / TENSORS).unlink()
    with pytest.raises(
        UserError, match=r"has neither model.safetensors nor pytorch_model.bin, nor an index of several"
    ):
        load_huggingface(folder)
    os.mkfifo(folder / TENSORS)  # reading it would wait for ever
    with pytest.raises(UserError, match=r"has neither model.safetensors"):
        load_huggingface(folder)
    (folder / TENSORS).unlink()
    (folder / TENSORS).symlink_to(folder / "gone")
    with pytest.raises(UserError, match=r"has neither model.safetensors"):
        load_huggingface(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not valid JSON"):
        load_huggingface(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        (
            {"transformer.wte.weight": "../hf/model.safetensors"},
            r"names the file '../hf/model.safetensors'; expected one",
        ),
        ({"transformer.wte.weight": "model-2.safetensors"}, "names the file 'model-2.safetensors'"),
        ({"transformer.wte.weight": 3}, "names the file 3; expected one of"),
        (
            {"transformer.wte.weight": TENSORS},
            "does not hold exactly the tensors of model.safetensors.index.json; download it",
        ),
    ],
)
def test_a_wrong_index_is_refused(folder: Path, weight_map: Any, message: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        load_huggingface(folder)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_no_code_of_a_pytorch_file_is_run(folder: Path, tmp_path: Path) -> None:
    (folder / TENSORS).unlink()
    torch.save({"transformer.wte.weight": Malicious(tmp_path / "pwned")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds a Python object, posix\.mkdir"):
        load_huggingface(folder)
    assert not (tmp_path / "pwned").exists()


def test_only_a_folder_with_a_model_type_is_one(folder: Path, tmp_path: Path) -> None:
    assert is_huggingface_folder(folder)
    for text in ("{}", "[]", "3", "not json"):
        (tmp_path / "config.json").write_text(text)
        assert not is_huggingface_folder(tmp_path)
    assert not is_huggingface_folder(tmp_path / "nothing")
