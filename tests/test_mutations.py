"""Every reader of files, on thousands of damaged ones: each is read, or refused in one line.

But for GGUF files: llama.cpp reads those, and a crash of it would end the tests.

A long run, of so many files in all: MUTATIONS=100000 python -m pytest tests/test_mutations.py
"""

import contextlib
import json
import math
import os
import pickle
import resource
import signal
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from mutations import change
from safetensors.numpy import load_file
from test_int8_model import random_model
from test_sources import write_run
from test_tokenizer import DEFINITION, write_older_files
from test_torch_checkpoint import float_tensors, save_float
from test_torch_int8_checkpoint import picogpt_file
from tiny import VOCABULARY, quick_compilation, tiny_config, write_data

from picogpt_jax.config import Config
from picogpt_jax.errors import UserError, errors_in
from picogpt_jax.files import read_json, write_json
from picogpt_jax.formats import loading, sources
from picogpt_jax.formats.huggingface import save_huggingface
from picogpt_jax.formats.onnx_export import save_onnx
from picogpt_jax.formats.torch_int8_checkpoint import save_int8_checkpoint
from picogpt_jax.int8.folder import save_int8_model
from picogpt_jax.runtimes.jax_model import JaxGPT
from picogpt_jax.runtimes.numpy_model import NumpyGPT
from picogpt_jax.text.batches import Tokens
from picogpt_jax.text.reading import load_vocabulary, vocabulary_of_data
from picogpt_jax.text.tokenizer import read_tokenizer
from picogpt_jax.text.vocabulary import Vocabulary
from picogpt_jax.training import checkpoint
from picogpt_jax.training.metrics import read_metrics

MEMORY_BYTES = 128 << 20  # more than a file here can need: none has 200 kB
ADDRESS_BYTES = 1 << 30  # nothing allocates that much, not even for a moment
SECONDS = 30.0
STATM = Path("/proc/self/statm")
MESSAGE = 400  # characters, without the file's folder
TOKENS = np.array([[0, 1, 2, 3]])
PLAIN = random_model()
BIASED = random_model(seed=1, bias=True, n_layer=1, activation="gelu_tanh")


class HangError(BaseException):
    """A reader that takes too long; none catches it."""


# ------------------------------------------------------------------------------- readers: make, then read


def run(path: Path, runtime: Any) -> None:
    loading.load(path, runtime).logits(TOKENS[0])


def compute(source: sources.FloatModel) -> None:
    JaxGPT.from_params(source.config, source.params).logits(TOKENS)


def read_int8(path: Path, deep: bool) -> None:
    model, vocabulary = sources.load_numpy(path)
    model.forward(TOKENS)
    vocabulary.to_json()
    run(path, "jax" if deep else "torch")


def read_numpy(path: Path, deep: bool) -> None:
    NumpyGPT.load(path).forward(TOKENS)


def read_int8_file(path: Path, deep: bool) -> None:
    run(path / "model.pt", "jax" if deep else "torch")


def read_ckpt(path: Path, deep: bool) -> None:
    source = sources.load_float(path / "ckpt.pt")
    if deep:
        compute(source)


def read_picogpt(path: Path, deep: bool) -> None:
    source = sources.load_float(path / "picogpt.pt", path / "data")
    if deep:
        compute(source)


def read_float(path: Path, deep: bool) -> None:
    source = sources.load_float(path)
    if deep:
        compute(source)


def read_onnx(path: Path, deep: bool) -> None:
    run(path, "onnx")


def read_tokens(path: Path, deep: bool) -> None:
    tokens = Tokens.open(path, "train", 8, VOCABULARY.size)
    tokens.windows(np.zeros(1, np.int64), 9)
    tokens.fingerprint()


def read_data(path: Path, deep: bool) -> None:
    use(vocabulary_of_data(path, 12))


def read_vocabulary(path: Path, deep: bool) -> None:
    use(load_vocabulary(path / "vocab.json"))


def read_tokens_of_library(path: Path, deep: bool) -> None:
    use(read_tokenizer(path))


def use(vocabulary: Vocabulary) -> None:
    vocabulary.require_text()
    text = vocabulary.decode([0, vocabulary.size - 1])
    vocabulary.to_json()
    with contextlib.suppress(UserError):  # a token may be a part of a character
        vocabulary.encode(text)
    vocabulary.fits(VOCABULARY)


def read_config(path: Path, deep: bool) -> None:
    with errors_in(path):
        Config.from_dict(read_json(path / "config.json"))


def read_log(path: Path, deep: bool) -> None:
    read_metrics(path / "metrics.jsonl")


def make_picogpt(path: Path) -> None:
    path.mkdir()
    picogpt_file(path / "picogpt.pt", vocab_size=VOCABULARY.size)
    write_data(path / "data", "abc")


def make_huggingface(path: Path, model: Any = PLAIN, tensors_file: str = "") -> None:
    save_huggingface(model.model, float_tensors(model), model.vocabulary, path)
    if tensors_file:
        tensors = {name: torch.tensor(x) for name, x in load_file(path / "model.safetensors").items()}
        (path / "model.safetensors").unlink()
        parts = [dict(list(tensors.items())[part::2]) for part in range(2)]
        index = {"metadata": {}, "weight_map": {}}
        for number, part in enumerate(parts):
            name = tensors_file.format(number)
            torch.save(part, path / name)
            index["weight_map"] |= dict.fromkeys(part, name)
        (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def make_pickle(path: Path) -> None:
    path.mkdir()
    itos = dict(enumerate(VOCABULARY.itos))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {char: index for index, char in itos.items()}}
    (path / "meta.pkl").write_bytes(pickle.dumps(meta))


def make_older_tokenizer(path: Path) -> None:
    path.mkdir()
    write_older_files(path, added_tokens={"<|pad|>": 277}, tokenizer_config={"add_prefix_space": False})


def make_tokenizer(path: Path) -> None:
    path.mkdir()
    (path / "tokenizer.json").write_text(json.dumps(DEFINITION))


def make_config(path: Path) -> None:
    path.mkdir()
    write_json(path / "config.json", tiny_config("x").to_dict())


def make_log(path: Path) -> None:
    path.mkdir()
    events = [{"step": 1, "split": "val", "loss": 1.5}, {"step": 2, "split": "train", "loss": None, "changes": "x"}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


class Reader(NamedTuple):
    files: int  # in the suite; in a long run in the same proportion
    every: int  # one file of so many is read deeply: its logits are computed where that takes a compilation
    make: Callable[[Path], object]
    read: Callable[[Path, bool], None]


def in_folder(name: str, save: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        save(path / name)

    return make


READERS = {
    "int8": Reader(150, 75, lambda path: save_int8_model(PLAIN, path), read_int8),
    "int8-per-tensor": Reader(
        75, 75, lambda path: save_int8_model(random_model("per_tensor", None, bias=True), path), read_int8
    ),
    "int8-in-numpy": Reader(500, 1, lambda path: save_int8_model(BIASED, path), read_numpy),
    "int8.pt": Reader(120, 120, in_folder("model.pt", lambda p: save_int8_checkpoint(PLAIN, p)), read_int8_file),
    "ckpt.pt": Reader(150, 150, in_folder("ckpt.pt", save_float), read_ckpt),
    "picogpt.pt": Reader(60, 60, make_picogpt, read_picogpt),
    "gpt2": Reader(150, 150, make_huggingface, read_float),
    "gpt2-biases": Reader(80, 80, lambda path: make_huggingface(path, BIASED), read_float),
    "gpt2-bin": Reader(80, 80, lambda path: make_huggingface(path, BIASED, "pytorch_model-{}.bin"), read_float),
    "onnx": Reader(50, 1, lambda path: save_onnx(PLAIN, path), read_onnx),
    "tokens": Reader(400, 1, lambda path: write_data(path, "abcdefghij" * 9), read_tokens),
    "meta.json": Reader(500, 1, in_folder("meta.json", VOCABULARY.save), read_data),
    "vocab.json": Reader(500, 1, in_folder("vocab.json", VOCABULARY.save), read_vocabulary),
    "meta.pkl": Reader(500, 1, make_pickle, read_data),
    "tokenizer.json": Reader(300, 1, make_tokenizer, read_tokens_of_library),
    "merges.txt": Reader(300, 1, make_older_tokenizer, read_tokens_of_library),
    "checkpoint": Reader(5, 6, lambda path: write_run(path, {4: 1.5}), read_float),
    "config.json": Reader(400, 1, make_config, read_config),
    "metrics.jsonl": Reader(500, 1, make_log, read_log),
}
FACTOR = float(os.environ.get("MUTATIONS", 0)) / sum(reader.files for reader in READERS.values()) or 1.0


# ------------------------------------------------------------------------------------------------------ the trial


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raises `HangError` after some seconds, and a MemoryError where much more memory than now is asked for."""

    def hang(*_: Any) -> None:
        raise HangError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if STATM.exists():
        now = int(STATM.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESS_BYTES, hard))
    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def trial(read: Callable[[Path, bool], None], folder: Path, deep: bool) -> str:
    """How the folder is received: "read", "refused", or what is wrong with the way in which it is."""
    before, outcome = peak_bytes(), "read"
    try:
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numbers that are not finite are as they may be
            read(folder, deep)
    except UserError as error:
        text, cause = str(error).replace(str(folder), "F"), error.__context__
        if "\n" in text or len(text) > MESSAGE:
            return f"a message of {len(text)} characters: {text[:700]!r}"
        while cause is not None:
            if isinstance(cause, MemoryError) or "alloc" in str(cause):
                return f"memory: {cause!r:.300}"
            cause = cause.__context__
        outcome = "refused"
    except BaseException as error:  # a panic in Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(x.filename).name}:{x.lineno}" for x in frames if "picogpt_jax/" in x.filename]
        return f"{type(error).__name__}: {str(error)[:300]!r} at {' '.join(ours[-3:])}"
    grown = peak_bytes() - before
    return f"{grown >> 20} MB of memory" if grown > MEMORY_BYTES and not deep else outcome


def write(folder: Path, files: dict[str, bytes | None]) -> None:
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's, of damaged checkpoints
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)  # nobody replaces a damaged checkpoint
    reader, folder = READERS[name], tmp_path / "F"
    reader.make(folder)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert 0 < sum(map(len, files.values())) < 300_000
    outcomes: Counter[str] = Counter()
    first: dict[str, str] = {}
    with quick_compilation():
        reader.read(folder, False)  # nothing is loaded later
        for seed in range(math.ceil(reader.files * FACTOR)):
            changed, what = change(files, np.random.default_rng([zlib.crc32(name.encode()), seed]))
            write(folder, changed)
            outcome = trial(reader.read, folder, seed % reader.every == 0)
            outcomes[outcome] += 1
            first.setdefault(outcome, f"seed {seed}, {what[:300]}")
            write(folder, {key: files[key] for key in changed})
    print(name, outcomes["read"], "read", outcomes["refused"], "refused")
    wrong = [(times, outcome) for outcome, times in outcomes.most_common(40) if outcome not in ("read", "refused")]
    assert not wrong, "\n".join(f"{name}: {times} times {outcome}; first: {first[outcome]}" for times, outcome in wrong)
    if outcomes.total() > 20:
        assert min(outcomes["read"], outcomes["refused"]) > 0, "all of them are read, or none"


def ten_gigabytes(path: Path, deep: bool) -> None:
    np.ones(10 << 30, np.int8)


def ten_gigabytes_refused(path: Path, deep: bool) -> None:
    try:
        ten_gigabytes(path, deep)
    except Exception:
        raise UserError("it is damaged") from None


def endless(path: Path, deep: bool) -> None:
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


def wordy(path: Path, deep: bool) -> None:
    raise UserError("x" * 500)


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (ten_gigabytes, "MemoryError"),
        (ten_gigabytes_refused, "memory: "),
        (endless, "HangError"),
        (wordy, "a message of 500 characters"),
        (lambda path, deep: [].pop(), "IndexError"),
    ],
)
def test_the_trial_finds_faults(monkeypatch: pytest.MonkeyPatch, read: Any, expected: str) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.2)
    if "emory" in expected and not STATM.exists():
        pytest.skip("this system does not tell how much memory is in use: no limit is set")
    assert trial(read, Path(), False).startswith(expected)
