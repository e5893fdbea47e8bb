"""The GGUF file in llama.cpp itself, where llama-cpp-python is installed: it has to be compiled, for minutes."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RunScript
from test_gguf_export import with_scale, with_vocabulary
from test_int8_model import random_model
from tiny import write_data

from picogpt_jax.errors import UserError
from picogpt_jax.formats.gguf_export import save_gguf
from picogpt_jax.int8.folder import save_int8_model
from picogpt_jax.int8.int8_model import Int8Model
from picogpt_jax.runtimes import loop
from picogpt_jax.runtimes.torch_model import Int8GPT
from picogpt_jax.text.reading import vocabulary_of_data
from picogpt_jax.text.vocabulary import Vocabulary

try:
    import llama_cpp

    from picogpt_jax.runtimes.llama_cpp_model import LlamaCppGPT

    INSTALLED = True
except ImportError:
    INSTALLED = False
needs_llama_cpp = pytest.mark.skipif(not INSTALLED, reason="needs llama-cpp-python: pip install picogpt_jax[llama-cpp]")

ASCII = Vocabulary(tuple(map(chr, range(128))))
FULL: dict[str, Any] = dict(granularity="per_tensor", bias=True, activation="gelu_tanh", mlp_ratio=4)
both = pytest.mark.parametrize("changes", [{}, FULL], ids=["bare", "full"])


def load(model: Int8Model, path: Path) -> "LlamaCppGPT":
    save_gguf(model, path)
    return LlamaCppGPT(path)


@needs_llama_cpp
@pytest.mark.parametrize("shows_amx", [False, True])
def test_weights_are_not_repacked_for_amx(tmp_path: Path, shows_amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("picogpt_jax.runtimes.llama_cpp_model.has_amx_int8", lambda: shows_amx)
    assert load(random_model(), tmp_path / "m.gguf")._llama.model_params.use_extra_bufts is not shows_amx


@needs_llama_cpp
@both
def test_llama_cpp_computes_nearly_our_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = random_model(**changes)
    loaded = load(model, tmp_path / "m.gguf")
    assert (loaded.block_size, loaded.vocab_size) == (16, 11)
    tokens = np.random.default_rng(0).integers(0, 11, (3, 16))
    theirs = loaded.forward(tokens)
    ours = Int8GPT(model)(torch.from_numpy(tokens)).numpy()
    assert theirs.shape == ours.shape
    assert np.abs(theirs - ours).max() < 0.15 * ours.std(), "int8 activations in other blocks, and so on"
    np.testing.assert_array_equal(loaded.forward(tokens), theirs, err_msg="the same again")
    np.testing.assert_array_equal(loaded.forward(tokens, last_only=True), theirs[:, -1:])
    with pytest.raises(ValueError, match=r"17 positions do not fit into block_size=16"):
        loaded.forward(np.zeros((1, 17), np.int64))


@needs_llama_cpp
@pytest.mark.parametrize("batch", [1, 2])
def test_a_cache_changes_nothing_but_the_time(tmp_path: Path, batch: int) -> None:
    loaded = load(random_model(), tmp_path / "m.gguf")
    tokens = np.random.default_rng(0).integers(0, 11, (batch, 16))
    whole = loaded.forward(tokens)
    cache = loaded.new_cache(batch)
    pieces = [loaded.forward(tokens[:, start : start + 4], cache) for start in (0, 4)]
    loaded.forward(tokens[:, ::-1].copy())  # another text in between
    pieces += [loaded.forward(tokens[:, start : start + 1], cache) for start in range(8, 16)]
    assert cache.length == 16
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=0, atol=0.02 * whole.std())


@needs_llama_cpp
def test_text_is_tokenized_as_ours_and_comes_back(tmp_path: Path) -> None:
    """By llama.cpp's own tokenizer, which may split at spaces and contractions and take spaces from punctuation."""
    model = with_vocabulary(ASCII)
    loaded = load(model, tmp_path / "m.gguf")
    assert loaded.vocabulary == model.vocabulary == ASCII
    text = "It 's  a no merge , isn't it ?\n\n  \tRE: 'll 12345 \r\n\0\x7f !" + "".join(ASCII.itos[1:])
    expected = ASCII.encode(text).tolist()
    assert loaded._llama.tokenize(text.encode(), add_bos=True, special=True) == expected
    assert loaded._llama.detokenize(expected) == text.encode()


@needs_llama_cpp
@pytest.mark.parametrize("characters", ["\nabcdefghijklmnopqrstuvwxyz", "ACGT\n", "0123456789+=\n", "0123456789+="])
def test_no_letter_ends_a_text(tmp_path: Path, characters: str) -> None:
    """Of names, DNA, sums, also without a line break: by llama.cpp's own account, and as it writes."""
    loaded = load(with_vocabulary(Vocabulary(tuple(characters))), tmp_path / "m.gguf")
    llama, prompt = loaded._llama, characters[1]
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    assert not any(llama_cpp.llama_vocab_is_eog(vocab, token) for token in range(len(characters)))
    assert (llama.token_bos(), llama.token_eos()) == (-1, -1)
    written, anything = "", dict(temperature=100.0, top_k=0, top_p=1.0, min_p=0.0)
    for seed in range(20):
        (choice,) = llama.create_completion(prompt, max_tokens=14, seed=seed, **anything)["choices"]
        assert (len(choice["text"]), choice["finish_reason"]) == (14, "length")
        written += choice["text"]
    assert set(written) == set(characters), "every one of them is drawn"


@needs_llama_cpp
@pytest.mark.parametrize(("scale", "kind"), [(5e-3, "moves the scales of 6"), (1e-5, "does not hold")])
def test_tiny_scales_cost_no_loss(tmp_path: Path, scale: float, kind: str) -> None:
    """Of all that adds to the residual stream, whose size LayerNorm takes away: the same function."""
    model, tokens = random_model(layer_norm_epsilon=1e-15), np.random.default_rng(0).integers(0, 11, 38)
    expected = Int8GPT(model).evaluate(tokens, 16)
    for name in model.matrices:
        if name.endswith(("wte", "wpe", "c_proj")):
            model = with_scale(model, name, scale)
    weight = (model.vectors["transformer.ln_f.weight"] / scale).astype(np.float32)
    model = dataclasses.replace(model, vectors=model.vectors | {"transformer.ln_f.weight": weight})
    assert Int8GPT(model).evaluate(tokens, 16) == pytest.approx(expected, abs=2e-3), "but for the rounding"
    assert kind in save_gguf(model, tmp_path / "m.gguf")
    assert loop.evaluate(LlamaCppGPT(tmp_path / "m.gguf"), tokens, 16) == pytest.approx(expected, abs=0.01)


@needs_llama_cpp
def test_the_loss_is_nearly_ours(tmp_path: Path) -> None:
    model = random_model()
    tokens = np.random.default_rng(0).integers(0, 11, 38)
    theirs = loop.evaluate(load(model, tmp_path / "m.gguf"), tokens, 16)
    assert theirs == pytest.approx(Int8GPT(model).evaluate(tokens, 16), abs=0.05)


@needs_llama_cpp
@pytest.mark.parametrize("overflow", ["slide", "refill"])
def test_text_goes_on_past_the_window(tmp_path: Path, overflow: Any) -> None:
    loaded = load(random_model(), tmp_path / "m.gguf")
    text = loop.generate(loaded, np.array([[1, 2, 3]]), 40, temperature=0, overflow=overflow)[0]
    assert len(text) == 43
    first = 0  # of the window that the next token is drawn from
    for end in range(3, 43):
        if end - first > 16:
            first = end - (16 if overflow == "slide" else 8)
        logits = loaded.forward(text[None, first:end])[0, -1]
        assert logits[text[end]] > logits.max() - 0.02 * logits.std(), end


@needs_llama_cpp
def test_what_is_no_gguf_of_ours_is_refused(tmp_path: Path) -> None:
    save_gguf(random_model(), tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    renamed = whole.replace(b"blk.1.ffn_up.bias", b"blk.1.ffn_up.bits")
    files = {
        "cut": (whole[:-500], "not within the file bounds"),
        "text": (b"GGUF but not really", "version"),
        "empty": (b"", ""),
        "renamed": (renamed, "'blk.1.ffn_up.bias' not found"),
    }
    for name, (content, reason) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"llama.cpp cannot load .*{name} \(.*{reason}.*\); convert it again"):
            LlamaCppGPT(tmp_path / name)


@needs_llama_cpp
def test_the_commands_take_a_gguf(tmp_path: Path, run_script: RunScript) -> None:
    data = write_data(tmp_path / "data", "abcdefghij \n" * 20)
    vocabulary = vocabulary_of_data(data)
    save_gguf(with_vocabulary(vocabulary), tmp_path / "m.gguf")
    done = run_script("scripts/evaluate.py", "--model=m.gguf", "--data=data", "--runtime=llama.cpp", "--json=r.json")
    assert done.returncode == 0, done.stderr
    assert "(gguf, llama.cpp)" in done.stdout
    arguments = ["--runtime=llama.cpp", "--start=abc", "--max_new_tokens=30", "--temperature=0"]
    done = run_script("scripts/sample.py", "--model=m.gguf", *arguments)
    assert done.returncode == 0, done.stderr
    prompt = vocabulary.encode("abc")[None]
    expected = loop.generate(LlamaCppGPT(tmp_path / "m.gguf"), prompt, 30, temperature=0)[0]
    assert (done.stdout, done.stderr) == (vocabulary.decode(expected) + "\n", "")
    done = run_script("scripts/sample.py", "--model=m.gguf", *arguments, "--num_samples=2", "--show_stats")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(vocabulary.decode(expected)) == 2


# ------------------------------------------------------------------------------------- with or without llama-cpp-python


def test_without_the_package_the_error_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['llama_cpp'] = None; import picogpt_jax.runtimes.llama_cpp_model"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'picogpt_jax[llama-cpp]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sample.py", "--model=int8", "--runtime=llama.cpp"], r"--runtime=llama.cpp takes a GGUF file, not int8"),
        (["evaluate.py", "--model=int8", "--data=d", "--runtime=llama.cpp"], "--runtime=llama.cpp takes a GGUF"),
        (
            ["sample.py", "--model=m.gguf", "--runtime=jax"],
            "m.gguf is a GGUF file, which --runtime=llama.cpp runs; here, give",
        ),
        (["evaluate.py", "--model=m.gguf", "--data=d", "--runtime=torch"], "m.gguf is a GGUF file, which"),
        (["convert.py", "--input=m.gguf", "--to=torch", "--output=o"], "m.gguf is a GGUF file, which"),
    ],
)
def test_a_runtime_that_does_not_fit_is_named(
    tmp_path: Path, run_script: RunScript, arguments: list[str], expected: str
) -> None:
    save_gguf(random_model(), tmp_path / "m.gguf")
    save_int8_model(random_model(), tmp_path / "int8")
    done = run_script(f"scripts/{arguments[0]}", *arguments[1:])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {expected}")
    assert done.stderr.count("\n") == 1
