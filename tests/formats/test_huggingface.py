"""The Hugging Face folder, read back by transformers."""

import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from conftest import RunScript
from safetensors import safe_open
from test_int8_model import random_model
from test_sources import write_run
from test_tokenizer import DEFINITION
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, pipeline

from picogpt_jax.errors import UserError
from picogpt_jax.formats.huggingface import dequantized, hf_tensors, save_huggingface
from picogpt_jax.formats.sources import load_float
from picogpt_jax.int8 import convert
from picogpt_jax.int8.folder import save_int8_model
from picogpt_jax.int8.int8_model import Int8Model
from picogpt_jax.model.gpt import GPT
from picogpt_jax.model.numerics import Numerics
from picogpt_jax.text.tokenizer import TokenizerVocabulary

DEFAULT: dict[str, Any] = dict(bias=False, activation="gelu")
OTHER: dict[str, Any] = dict(
    bias=True, activation="gelu_tanh", mlp_ratio=4, granularity="per_tensor", layer_norm_epsilon=1e-3, dropout=0.5
)


def save(model: Int8Model, folder: Path) -> Path:
    save_huggingface(model.model, dequantized(model), model.vocabulary, folder)
    return folder


def load(folder: Path) -> Any:
    """What transformers makes of the folder; any key that does not fit fails."""
    network, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    problems = {name: keys for name, keys in info.items() if keys}
    assert not problems, problems
    return network


def logits_of(network: Any, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(tokens_BT)).logits.numpy()


def our_logits(config: Any, arrays: dict[str, np.ndarray], tokens_BT: np.ndarray) -> np.ndarray:
    """The float forward pass, of JAX."""
    network = GPT(config, Numerics(convert.FLOAT, "float"))
    variables = {"params": convert.params_from_arrays(config, arrays)}
    return np.asarray(jax.jit(network.apply)(variables, tokens_BT.astype(np.int32)))


@pytest.mark.parametrize("changes", [DEFAULT, OTHER, dict(activation="relu")], ids=["default", "other", "relu"])
def test_transformers_computes_our_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = random_model(activation_bits=None, **changes)
    network = load(save(model, tmp_path / "hf"))
    assert type(network).__name__ == "GPT2LMHeadModel"
    assert not network.training
    tokens = np.random.default_rng(0).integers(0, model.model.vocab_size, (4, model.model.block_size))
    theirs, ours = logits_of(network, tokens), our_logits(model.model, dequantized(model), tokens)
    np.testing.assert_allclose(theirs[..., :-1], ours, rtol=0, atol=1e-4)
    np.testing.assert_allclose(theirs[..., -1], ours.mean(-1), rtol=0, atol=1e-4, err_msg="of what pads")
    assert np.abs(ours).max() > 1, "logits near zero would agree whatever was written"
    np.testing.assert_array_equal(theirs.argmax(-1), ours.argmax(-1))


def test_the_file_holds_exactly_the_dequantized_codes(tmp_path: Path) -> None:
    model = random_model()
    save(model, tmp_path / "hf")
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118  (no mapping)
    for name, matrix in model.matrices.items():
        written = tensors.pop(f"{name}.weight")
        written = written if name in ("transformer.wte", "transformer.wpe") else written.T
        written = written[:-1] if name == "transformer.wte" else written  # the last row is what pads
        assert written.dtype == np.float32
        np.testing.assert_array_equal(written, matrix.codes.astype(np.float32) * matrix.scale, err_msg=name)
    for name, vector in model.vectors.items():
        np.testing.assert_array_equal(tensors.pop(name), vector)
    assert len(tensors) == 2 * (2 + 4) + 1, "what is left are the biases, which this model does not have"
    assert all(name.endswith(".bias") and not values.any() for name, values in tensors.items())


def test_text_comes_out_of_generate(tmp_path: Path) -> None:
    model = random_model()
    network, tokenizer = load(save(model, tmp_path / "hf")), AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = tokenizer("abc\n", return_tensors="pt")
    assert network.generate(**prompt).shape == (1, 4 + 8), "half the positions"
    ids = network.generate(**prompt, do_sample=False, max_new_tokens=12)
    expected = prompt["input_ids"]
    while expected.shape[1] < model.model.block_size:
        following = logits_of(network, expected.numpy())[:, -1:].argmax(-1)
        expected = torch.cat((expected, torch.from_numpy(following)), dim=1)
    assert ids.tolist() == expected.tolist()
    assert tokenizer.decode(ids[0]) == model.vocabulary.decode(ids[0].tolist())


TEXTS = ["abc\n\nde", "j", "a\nb"]


@pytest.fixture
def silence(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing is said: not by a warning, nor by transformers' logger."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    said = capfd.readouterr()
    assert said.out == ""
    assert [line for line in said.err.splitlines() if line and "Loading weights" not in line] == []


def test_a_batch_is_padded_on_the_left_and_gives_what_each_text_gives(tmp_path: Path, silence: None) -> None:
    folder = save(random_model(), tmp_path / "hf")
    network, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    expected = []
    for text in TEXTS:
        ids = network.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=6, do_sample=False)
        expected.append(tokenizer.decode(ids[0]))
    assert len(set(expected)) == 3
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    assert batch["attention_mask"].sum(1).tolist() == [7, 1, 3]
    for masked in (batch, {"input_ids": batch["input_ids"]}):  # without it, what pads can still be told from the text
        ids = network.generate(**masked, max_new_tokens=6, do_sample=False)
        assert tokenizer.batch_decode(ids, skip_special_tokens=True) == expected
    pipe = pipeline("text-generation", model=network, tokenizer=tokenizer, batch_size=2)
    found = [text["generated_text"] for (text,) in pipe(TEXTS, max_new_tokens=6, do_sample=False)]
    assert found == expected
    assert len(pipe("ab", do_sample=False)[0]["generated_text"]) == 2 + 8, "by default, what fits"
    collated = DataCollatorForLanguageModeling(tokenizer, mlm=False)([tokenizer(text) for text in TEXTS])
    assert collated["labels"][2].tolist() == [-100] * 4 + tokenizer("a\nb")["input_ids"], "no letter is left out"


def test_what_pads_is_never_drawn(tmp_path: Path) -> None:
    folder = save(random_model(), tmp_path / "hf")
    network, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(["a"] * 500, return_tensors="pt")
    settings: dict[str, Any] = dict(max_new_tokens=8, do_sample=True, temperature=9.0, top_k=0)
    torch.manual_seed(0)
    assert network.generate(**prompt, **settings).max() < tokenizer.pad_token_id
    assert network.generate(**prompt, **settings, suppress_tokens=None).max() == tokenizer.pad_token_id, "the control"


def test_a_tokenizer_that_has_a_special_token_pads_with_it_and_no_row_is_added(tmp_path: Path) -> None:
    model, vocabulary = random_model(), TokenizerVocabulary.from_definition(DEFINITION, "it")
    config = dataclasses.replace(model.model, vocab_size=280)
    table = {"transformer.wte.weight": np.ones((280, 32), np.float32)}
    save_huggingface(config, dequantized(model) | table, vocabulary, tmp_path / "hf")
    network, tokenizer = load(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert network.transformer.wte.weight.shape == (280, 32)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", vocabulary.itos.index("<|endoftext|>"))
    assert network.generation_config.suppress_tokens == [277, 278, 279], "ids that no token has"


@pytest.mark.parametrize("by_transformers", [False, True])
def test_what_was_written_is_read_back(tmp_path: Path, by_transformers: bool) -> None:
    model = random_model(bias=True)
    folder = save(model, tmp_path / "hf")
    if by_transformers:
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
        load(folder).save_pretrained(tmp_path / "again")
        folder = tmp_path / "again"
    source = load_float(folder)
    assert (source.config, source.vocabulary) == (model.model, model.vocabulary)
    arrays = convert.float_arrays(source.config, source.params)
    for name, array in dequantized(model).items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


@pytest.mark.parametrize("bias", [False, True])
def test_every_bias_is_there_and_linear_layers_alone_are_transposed(bias: bool) -> None:
    model = random_model(bias=bias)
    arrays, tensors = dequantized(model), hf_tensors(model.model, dequantized(model))
    assert set(tensors) == set(dequantized(random_model(bias=True)))
    assert not any(tensors[name].any() for name in set(tensors) - set(arrays))
    for name, array in arrays.items():
        is_linear = array.ndim == 2 and ".h." in name
        np.testing.assert_array_equal(tensors[name], array.T if is_linear else array)


def test_what_is_not_the_models_is_refused(tmp_path: Path) -> None:
    model = random_model(bias=True)
    arrays = dequantized(model)
    wte = "transformer.wte.weight"

    def refuse(message: str, changed: dict[str, np.ndarray]) -> None:
        with pytest.raises(UserError, match=message):
            hf_tensors(model.model, changed)

    refuse(r"missing tensors: transformer\.wte\.weight", {name: array for name, array in arrays.items() if name != wte})
    refuse(r"unknown tensors: lm_head\.weight;", arrays | {"lm_head.weight": arrays[wte]})
    refuse(r"wte\.weight is float32 \[32, 11\]; expected float32 \[11, 32\]", arrays | {wte: arrays[wte].T})
    refuse(r"wte\.weight is float64", arrays | {wte: arrays[wte].astype(np.float64)})
    refuse(r"wte\.weight holds values that are not finite", arrays | {wte: np.full_like(arrays[wte], np.nan)})
    unbiased = dataclasses.replace(model.model, bias=False)
    with pytest.raises(UserError, match=r"unknown tensors: transformer\.h\.0\.attn\.c_attn\.bias"):
        save_huggingface(unbiased, arrays, model.vocabulary, tmp_path / "hf")
    assert not list(tmp_path.iterdir()), "nothing half-written is left"


def test_a_folder_is_replaced_only_by_its_like(tmp_path: Path) -> None:
    save_int8_model(random_model(), tmp_path / "int8")
    before = sorted(path.name for path in (tmp_path / "int8").iterdir())
    with pytest.raises(UserError, match=r"int8 is a folder of other files \(vocab\.json\), which would be replaced"):
        save(random_model(), tmp_path / "int8")
    assert sorted(path.name for path in (tmp_path / "int8").iterdir()) == before
    save(random_model(), tmp_path / "hf")
    save(random_model(bias=True), tmp_path / "hf")
    assert load(tmp_path / "hf").transformer.ln_f.bias.abs().max() > 0


def test_convert_writes_an_int8_model_and_a_workdir(tmp_path: Path, run_script: RunScript) -> None:
    model = random_model()
    save_int8_model(model, tmp_path / "int8")
    done = run_script("scripts/convert.py", "--input=int8", "--to=huggingface", "--output=hf")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["n_inner"] == model.model.n_hidden
    table = load(tmp_path / "hf").transformer.wte.weight.numpy(force=True)
    np.testing.assert_array_equal(table[:-1], model.matrices["transformer.wte"].dequantize())

    write_run(tmp_path / "run", {4: 1.5})
    done = run_script("scripts/convert.py", "--input=run", "--to=huggingface", "--output=float")
    assert done.returncode == 0, done.stderr
    assert "trained with quantization" in done.stdout, "says that the int8 model is another one"
    source, written = load_float(tmp_path / "run"), load(tmp_path / "float").state_dict()
    for name, array in convert.float_arrays(source.config, source.params).items():
        theirs = written[name].numpy()[: -1 if name == "transformer.wte.weight" else None]
        is_conv1d = array.ndim == 2 and ".h." in name
        np.testing.assert_array_equal(theirs.T if is_conv1d else theirs, array, err_msg=name)
