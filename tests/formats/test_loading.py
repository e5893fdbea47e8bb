import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import ROOT
from test_int8_model import random_model
from test_sources import INT8, models  # noqa: F401  (a fixture)
from torch import from_numpy

import picogpt_jax
from picogpt_jax.devices import setup
from picogpt_jax.errors import UserError
from picogpt_jax.formats import loading
from picogpt_jax.formats.gguf_export import save_gguf
from picogpt_jax.formats.loading import Model, choose_runtime, load
from picogpt_jax.formats.sources import load_numpy
from picogpt_jax.int8.folder import save_int8_model
from picogpt_jax.runtimes import loop
from picogpt_jax.runtimes.engine import Sampling
from picogpt_jax.runtimes.torch_model import Int8GPT

pytestmark = pytest.mark.usefixtures("compile_quickly_and_once")

PAIRS = [("int8", "jax"), ("int8", "torch"), ("int8", "numpy"), ("int8.pt", "jax"), ("int8.pt", "torch")]
PAIRS += [("run", "jax"), ("ckpt.pt", "jax"), ("onnx", "onnx")]
DIFFERENT = [("int8", "jax"), ("int8", "numpy"), ("int8.pt", "torch"), ("run", "jax"), ("onnx", "onnx")]
RUNTIMES = ["jax", "torch", "onnx", "numpy", "c", "llama.cpp"]
KINDS = {"run": "workdir", "int8": "int8", "int8.pt": "torch-int8", "ckpt.pt": "torch-float", "onnx": "onnx"}
KINDS |= {"picogpt.pt": "picogpt-int8", "hf": "huggingface", "m.gguf": "gguf"}


@pytest.fixture(scope="module")
def folder(models: Path) -> Path:  # noqa: F811
    """One of each kind."""
    save_gguf(INT8, models / "m.gguf")
    return models


@pytest.fixture(scope="module")
def loaded(folder: Path) -> dict[tuple[str, str], Model]:
    return {pair: picogpt_jax.load(folder / pair[0], pair[1]) for pair in PAIRS}  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("pair", DIFFERENT, ids=" in ".join)
def test_text_logits_and_losses_belong_together(loaded: dict[tuple[str, str], Model], pair: tuple[str, str]) -> None:
    model, ids = loaded[pair], np.arange(1, 8)
    text = model.vocabulary.decode(ids)
    logits_TV = model.logits(ids.tolist())
    assert (logits_TV.dtype, logits_TV.shape) == (np.float32, (7, model.config.vocab_size))
    # Of windows of another length; a code on the edge may fall to the other side.
    assert model.loss(text) == pytest.approx(loop.losses(logits_TV[:-1], ids[1:]).mean(), rel=1e-3, abs=0.05)
    np.testing.assert_allclose(model.logits(ids[:3])[-1], logits_TV[2], rtol=1e-3, atol=0.5)
    options: Any = dict(max_new_tokens=20, top_k=1)
    pieces = list(model.stream(text, **options))
    assert pieces[0][0] == model.vocabulary.itos[logits_TV[-1].argmax()]
    assert len(pieces) > 1
    assert "".join(pieces) == model.generate(text, **options)
    assert len("".join(pieces)) == 20, "the prompt is not among them"


def test_the_description_is_one_line(loaded: dict[tuple[str, str], Model]) -> None:
    for pair, model in loaded.items():
        described(model, *pair)


def described(model: Model, name: str, runtime: str) -> None:
    is_int8 = name in ("int8", "int8.pt", "onnx")
    count = model.config.n_parameters
    share = 100 * sum(matrix.codes.size for matrix in INT8.matrices.values()) / count if is_int8 else 0
    assert model.description.startswith(f"{count:,} parameters, {share:.2f}% int8, ")
    assert model.description.endswith(f"; {KINDS[name]}, runtime {runtime}")
    assert "\n" not in model.description


def test_the_texts_are_those_of_the_runtimes(folder: Path, loaded: dict[tuple[str, str], Model]) -> None:
    """By the script's defaults."""
    prompt_1T, defaults = INT8.vocabulary.encode("abc")[None], (20, 0.8, None, 1337)
    numpy = loop.generate(load_numpy(folder / "int8")[0], prompt_1T, *defaults)
    assert loaded["int8", "numpy"].generate("abc", 20) == INT8.vocabulary.decode(numpy[0, 3:])
    torch = Int8GPT(INT8).generate(from_numpy(prompt_1T.astype(np.int64)), *defaults)
    assert loaded["int8", "torch"].generate("abc", 20) == INT8.vocabulary.decode(torch[0, 3:].numpy())


def test_a_workdir_has_its_float_parameters_and_the_pass_that_it_was_trained_with(folder: Path) -> None:
    plain, trained = (load(folder / "run", "jax", forward=forward) for forward in ("float", "trained"))  # type: ignore[arg-type]
    assert (plain.engine.model.numerics.mode, trained.engine.model.numerics.mode) == ("float", "train")  # type: ignore[attr-defined]
    assert trained.engine.model.numerics.quant.mode == "int8"  # type: ignore[attr-defined]


class Counting:
    """An engine whose token i is i; it counts what it has been asked for."""

    drawn = 0

    def pieces(self, prompt_BT: npt.NDArray[np.integer], sampling: Sampling) -> Iterator[npt.NDArray[np.int64]]:
        for _ in range(sampling.max_new_tokens):
            self.drawn += 1
            yield np.full((1, 1), self.drawn)


def test_pieces_arrive_while_the_rest_is_not_computed_yet() -> None:
    engine: Any = Counting()
    stream = Model(INT8.model, INT8.vocabulary, "", "numpy", engine).stream("a", 5)
    assert engine.drawn == 0
    for count, piece in enumerate(stream, start=1):
        assert (engine.drawn, piece) == (count, INT8.vocabulary.itos[count])
    assert engine.drawn == 5


class Bytes:
    """A vocabulary of bytes."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("text", ["a€😀é b😀😀€", "é", "a\ufffdb\ufffd"])
def test_a_character_of_several_tokens_comes_whole(text: str, size: int) -> None:
    model = Model(INT8.model, Bytes(), "", "numpy", None)  # type: ignore[arg-type]
    ids = np.frombuffer(text.encode(), np.uint8)
    pieces = list(model.texts(ids[start : start + size] for start in range(0, len(ids), size)))
    assert "".join(pieces) == text
    assert all(pieces)


def test_bytes_that_are_no_character_are_shown_as_such() -> None:
    model = Model(INT8.model, Bytes(), "", "numpy", None)  # type: ignore[arg-type]
    pieces = model.texts(np.array([value]) for value in [97, *[0x80] * 9, 98])
    assert "".join(itertools.islice(pieces, 3)).startswith("a\ufffd"), "it does not wait for ever"
    assert "".join(pieces).endswith("\ufffdb")


# --------------------------------------------------------------------------------------------------------- the mistakes


def test_what_does_not_go_together_is_one_line(folder: Path) -> None:
    refused = [pair for pair in itertools.product(KINDS, RUNTIMES) if pair not in [*PAIRS, ("m.gguf", "llama.cpp")]]
    assert len(refused) == 39
    for name, runtime in refused:
        with pytest.raises(UserError) as caught:
            load(folder / name, runtime)  # type: ignore[arg-type]
        message = str(caught.value)
        assert message.startswith((str(folder / name), "--runtime=")), message
        assert "\n" not in message
        assert len(message.replace(str(folder), "")) <= 300


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.generate("a€", 5), r"the prompt has the character '€' \(U\+20AC\) at position 1"),
        (lambda model: model.generate("", 5), "the prompt has no tokens; at least one is needed"),
        (lambda model: model.stream("a", -1), "max_new_tokens=-1 is negative"),
        (lambda model: model.stream("", 5), "the prompt has no tokens"),
        (lambda model: model.loss("a"), "expected at least two token ids in a row"),
        (lambda model: model.loss("a€"), "the text has the character '€'"),
        (lambda model: model.logits([]), r"found float64 \[0\]; expected 1 to 16 token ids in a row"),
        (lambda model: model.logits(range(17)), r"found int64 \[17\]; expected 1 to 16 token ids"),
        (lambda model: model.logits([1, 11]), "ids holds the token id 11; the vocabulary has ids 0 to 10"),
    ],
)
@pytest.mark.parametrize("runtime", ["jax", "numpy"])
def test_a_mistake_is_told_when_it_is_made(
    loaded: dict[tuple[str, str], Model], runtime: str, call: Any, message: str
) -> None:
    with pytest.raises(picogpt_jax.UserError, match=message):
        call(loaded["int8", runtime])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("int8", dict(runtime="numpy", device="gpu"), "--device=gpu is JAX's; --runtime=numpy computes on the CPU"),
        ("int8.pt", dict(runtime="torch", tensor=2), "--tensor=2 is JAX's; --runtime=torch splits no model"),
        ("onnx", dict(tensor=2), "--tensor=2 is JAX's; --runtime=onnx splits no model"),
        ("run", dict(tensor=2), "--tensor splits int8 models; give --model=INT8_FOLDER"),
    ],
)
def test_a_runtime_that_cannot_obey_says_so(folder: Path, name: str, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(folder / name, **options)


WITHOUT = """
import sys
import picogpt_jax
for name in ("torch", "onnxruntime", "llama_cpp"):
    sys.modules[name] = None
for path, runtime in (("int8", "torch"), ("int8.pt", "auto"), ("onnx", "auto"), ("m.gguf", "auto")):
    try:
        picogpt_jax.load(f"{sys.argv[1]}/{path}", runtime)
    except ImportError as error:
        print(error)
"""


def test_a_missing_extra_is_named(folder: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line, extra in zip(lines, ("torch", "torch", "onnx", "llama-cpp"), strict=True):
        assert line.endswith(f"with: pip install 'picogpt_jax[{extra}]'")


# ------------------------------------------------------------------------------------------------------------ "auto"


@pytest.mark.parametrize(
    ("kind", "options", "accelerator", "expected"),
    [
        ("int8", {}, False, "numpy"),
        ("int8", {}, True, "jax"),
        ("int8", dict(device="cpu"), True, "numpy"),
        ("int8", dict(device="gpu"), False, "jax"),  # which says that there is none
        ("int8", dict(tensor=2), False, "jax"),
        ("int8", dict(is_integer=True), False, "c"),
        ("int8", dict(is_integer=True), True, "jax"),
        ("torch-int8", {}, False, "torch"),
        ("torch-int8", {}, True, "jax"),
        *[(kind, {}, False, "jax") for kind in ("workdir", "torch-float", "picogpt-int8", "huggingface")],
        ("onnx", {}, True, "onnx"),
        ("gguf", dict(device="cpu"), True, "llama.cpp"),
    ],
)
def test_the_runtime_follows_from_the_model_and_the_machine(
    kind: Any, options: Any, accelerator: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "has_accelerator", lambda: accelerator)
    monkeypatch.setattr(loading, "is_installed", lambda runtime: runtime == "c")
    assert choose_runtime(kind, **options) == expected


def test_jax_is_left_as_the_program_has_set_it_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(setup, "set_up_jax", calls.append)
    load(folder / "int8", "jax")
    assert calls == []
    load(folder / "int8", "jax", device="cpu")
    assert calls == ["cpu"]


def test_a_model_is_split_over_devices(tmp_path: Path) -> None:
    model = random_model(n_head=4, vocab_size=12)
    save_int8_model(model, tmp_path / "int8")
    whole, split = load(tmp_path / "int8", "jax"), load(tmp_path / "int8", "jax", tensor=2)
    assert split.engine.mesh.shape["tensor"] == 2  # type: ignore[attr-defined]
    assert split.loss("abcdefghij") == pytest.approx(whole.loss("abcdefghij"), abs=0.05)
