"""C: `c/picogpt.c` compiled for this processor, once: the library is kept in the user's cache folder."""

import ctypes
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from picogpt_jax.config import ModelConfig
from picogpt_jax.devices.cpu import cpu
from picogpt_jax.errors import UserError, reason
from picogpt_jax.int8.integer_model import IntegerModel, integer_layout
from picogpt_jax.runtimes.c_weights import SOURCES, packed
from picogpt_jax.text.vocabulary import TokenIds

# The first that the compiler takes. Vectors of 512 bits are too long for most rows of a small model.
OPTIONS = (("-O3", "-march=native", "-mprefer-vector-width=256"), ("-O3", "-march=native"), ("-O3",))
PLAIN = ("-std=c99", "-shared", "-fPIC", "-DPICOGPT_THREADS")
SELF_TEST_DIGEST = 0x5BB15E86  # what NumPy computes
SELF_TEST_CHUNK = 4
MODEL_BYTES = 1024  # room for a picogpt_model


class State(ctypes.Structure):
    """A `picogpt_state`: its public members, and room for the others."""

    _fields_ = (
        ("model", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("position", ctypes.c_int32),
        ("rest", ctypes.c_char * 480),
    )


class Weights:
    """A model as the library reads it; its texts share it."""

    def __init__(self, library: ctypes.CDLL, model: IntegerModel) -> None:
        content = np.frombuffer(packed(model, 0), np.uint8)
        self._bytes, self.model = aligned(len(content)), ctypes.create_string_buffer(MODEL_BYTES)
        self._bytes[:] = content
        if not library.picogpt_open(self.model, self._bytes.ctypes.data, len(content)):
            raise ValueError("picogpt.c reads another file than c_weights.py packs")


class Text(State):
    """A state with its memory."""

    def __init__(self, library: ctypes.CDLL, weights: Weights, chunk: int) -> None:
        super().__init__()
        lengths = (ctypes.c_size_t * 2)()
        library.picogpt_memory(weights.model, chunk, lengths)
        self._memory = [aligned(length * size) for length, size in zip(lengths, (4, 1), strict=True)]
        self._weights = weights
        pointers = [array.ctypes.data for array in self._memory]
        library.picogpt_init(ctypes.byref(self), weights.model, *pointers, chunk)


def aligned(size: int) -> Any:
    """Bytes that begin where a line of the processor's cache does."""
    room = np.empty(size + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + size]


@functools.cache
def library() -> ctypes.CDLL:
    """The library, from the cache folder or compiled now.

    Raises:
        UserError: it is not there yet, and there is no compiler, or none that works, or no place to keep it.
    """
    command, folder = compiler(), cache_folder()
    source = b"".join((SOURCES / name).read_bytes() for name in ("picogpt.h", "avx512.h", "picogpt.c"))
    name, features = cpu()
    key = _hash(source, OPTIONS, PLAIN, name, sorted(features))
    if command is None:
        kept = sorted(folder.glob(f"picogpt-{key}-*.so"))
    else:
        kept = [folder / f"picogpt-{key}-{_hash(command, _stamp(command[0]))}.so"]
    for path in kept:
        found = _loaded(path)
        if found is not None:
            return found
    if command is None:
        raise UserError(
            "--runtime=c needs a C compiler, and found none of $CC, cc, gcc, clang; install one, such as: "
            "pip install 'picogpt_jax[c]'"
        )
    return _compiled(command, kept[0])


def is_available() -> bool:
    """Whether there is a library, or a compiler that makes it; the first call makes it then."""
    try:
        library()
    except UserError:
        return False
    return True


def compiler() -> list[str] | None:
    """The command of the C compiler at hand; None: there is none."""
    try:
        chosen = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise UserError(f"CC={os.environ['CC']} is no command: {error}; set CC to a C compiler, or unset it") from None
    if chosen:
        return chosen
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    spec = importlib.util.find_spec("ziglang")
    if spec is not None and spec.origin:
        return [str(Path(spec.origin).with_name("zig")), "cc"]  # what `python -m ziglang cc` starts
    return None


def cache_folder() -> Path:
    """Where libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "picogpt_jax"


def _stamp(program: str) -> object:
    """What changes with the version of a compiler; to ask itself would take longer than to load the library."""
    path = shutil.which(program)
    if path is None:
        return None
    path = os.path.realpath(path)
    return path, os.stat(path).st_size, os.stat(path).st_mtime_ns


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _compiled(command: list[str], path: Path) -> ctypes.CDLL:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            made = Path(temporary) / path.name  # a name of its own: a library that was loaded is not loaded again
            _compile(command, made)
            found = _loaded(made)
            if found is None:
                raise UserError(
                    f"{shlex.join(command)} compiles picogpt.c to other results; set CC to another compiler"
                )
            os.replace(made, path)
    except OSError as error:
        raise UserError(
            f"cannot write to {path.parent}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written"
        ) from None
    return found


def _compile(command: list[str], path: Path) -> None:
    for options in OPTIONS:
        included = ("-include", str(SOURCES / "avx512.h"))
        words = [*command, *PLAIN, *options, *included, "-o", str(path), str(SOURCES / "picogpt.c")]
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise UserError(
                f"the C compiler {command[0]} does not start: {error.strerror}; set CC to another"
            ) from None
        if done.returncode == 0:
            return
    said = reason(ValueError(done.stderr))
    raise UserError(f"{shlex.join(command)} cannot compile picogpt.c ({said}); set CC to another")


def _loaded(path: Path) -> ctypes.CDLL | None:
    """The library, after its self-test; None where it is not there, or none that computes what it should."""
    pointer, word, number, size = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int32, ctypes.c_size_t
    try:
        found = ctypes.CDLL(str(path))
        found.picogpt_open.argtypes = (pointer, pointer, size)
        found.picogpt_memory.argtypes = (pointer, number, pointer)
        found.picogpt_init.argtypes = (pointer, pointer, pointer, pointer, number)
        found.picogpt_forward.argtypes = (pointer, pointer, number, pointer, number)
        found.picogpt_share.argtypes = (pointer, pointer)
        found.picogpt_draw.argtypes = (pointer, number, pointer, word, word)
        found.picogpt_generate.argtypes = (pointer, number, pointer, word, word, pointer, *[number] * 4)
        found.picogpt_digest.argtypes, found.picogpt_digest.restype = (pointer,), word
    except (OSError, AttributeError):
        return None
    text = Text(found, Weights(found, self_test_model()), SELF_TEST_CHUNK)
    return found if found.picogpt_digest(ctypes.byref(text)) == SELF_TEST_DIGEST else None


def self_test_model() -> IntegerModel:
    """A small model of numbers that a formula gives."""
    sizes: Any = dict(n_layer=2, n_head=2, n_embd=64, block_size=16, vocab_size=40, mlp_ratio=4)
    config = ModelConfig(**sizes, bias=True, activation="gelu", layer_norm_epsilon=1e-5, dropout=0.0)
    tensors = {}
    for name, (dtype, shape) in integer_layout(config, "per_channel").items():
        n = (np.arange(np.prod(shape), dtype=np.uint32) + np.uint32(1)) * np.uint32(2654435761) >> np.uint32(9)
        low, high = {"int8": (-127, 127), "int16": (2049, 4096), "int32": (-600, 600)}[dtype]
        if name.endswith("_exponent"):
            low, high = (-13, -12) if ".ln_" in name else (-9, -6)
        tensors[name] = (low + (n % np.uint32(high - low + 1)).astype(np.int64)).astype(dtype).reshape(shape)
    vocabulary = TokenIds.of_size(config.vocab_size, "ids")
    return IntegerModel(
        model=config, weight_granularity="per_channel", training={}, vocabulary=vocabulary, tensors=tensors
    )
