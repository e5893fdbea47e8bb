"""The model in C: the bits of NumPy's logits, the texts of every runtime, and nothing that a small machine lacks."""

import ctypes
import functools
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RunScript
from test_int8_model import random_model
from test_onnx_integer import CASES, by_numpy, random_integer_model, random_tokens

from picogpt_jax.errors import UserError
from picogpt_jax.formats import c_export
from picogpt_jax.formats.c_export import logits_digest, save_c
from picogpt_jax.int8.folder import save_int8_model
from picogpt_jax.int8.integer_model import IntegerModel
from picogpt_jax.runtimes import draws, loop
from picogpt_jax.runtimes.c_weights import SOURCES, packed
from picogpt_jax.text.vocabulary import TokenIds, Vocabulary

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
FAST = ("-O3", "-march=native")
AVX512 = (*FAST, "-include", "avx512.h")  # where the processor has it; else the same as FAST
BOTH_SIZES = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs gcc's -m32, which x86-64 has")
ACCENTS = Vocabulary(tuple("\nabcé€\U0001f600\0xyz"))


class State(ctypes.Structure):
    """The public members of a picogpt_state, and room for the others."""

    _fields_ = (
        ("model", ctypes.c_void_p),
        ("logits", ctypes.POINTER(ctypes.c_int32)),
        ("position", ctypes.c_int32),
        ("rest", ctypes.c_char * 256),
    )


class Text:
    """One text of a model in a compiled picogpt.c."""

    def __init__(self, library: ctypes.CDLL, model: IntegerModel, chunk: int) -> None:
        self._library, self.size, self._bytes = library, model.model.vocab_size, packed(model, logits_digest(model))
        self._model, self.state = ctypes.create_string_buffer(1024), State()
        assert library.picogpt_open(self._model, self._bytes, ctypes.c_size_t(len(self._bytes)))
        lengths = (ctypes.c_size_t * 2)()
        library.picogpt_memory(self._model, chunk, lengths)
        kinds = zip(lengths, ("int32", "uint8"), strict=True)
        self._memory = [np.full(length + 1, 77, kind) for length, kind in kinds]  # the last one is not the text's
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in self._memory]
        library.picogpt_init(ctypes.byref(self.state), self._model, *pointers, chunk)

    def check(self) -> None:
        """Nothing was written behind the memory, and the digest is NumPy's."""
        expected = ctypes.c_int32.from_buffer_copy(self._bytes, 40).value
        assert self._library.picogpt_digest(ctypes.byref(self.state)) == expected
        assert [array[-1] for array in self._memory] == [77] * 2

    def forward(self, ids: np.ndarray, rows: int) -> np.ndarray:
        logits = np.empty((rows, self.size), np.int32)
        self._library.picogpt_forward(ctypes.byref(self.state), c(ids), len(ids), c(logits), rows)
        return logits / np.float32(1024)

    def generate(self, prompt: np.ndarray, count: int, stream: int, **sampling: Any) -> list[int]:
        found: list[int] = []
        self._library.picogpt_start(ctypes.byref(self.state), c(prompt), len(prompt))
        for index in range(count):
            found.append(draw(self._library, self.state.logits, self.size, stream, index, **sampling))
            self._library.picogpt_next(ctypes.byref(self.state), found[-1])
        return found


def c(array: np.ndarray) -> Any:
    """The int32 array for C; `array` itself where it is one."""
    return np.ascontiguousarray(array, np.int32).ctypes.data_as(ctypes.POINTER(ctypes.c_int32))


def draw(
    library: ctypes.CDLL, logits: Any, size: int, stream: int, index: int, temperature: float, top_k: int, seed: int
) -> int:
    multiplier = int(draws.Scale.of(temperature).multiplier) if temperature else 0
    sampling = (ctypes.c_uint32 * 4)(temperature == 0, multiplier, top_k, seed)
    return library.picogpt_draw(logits, size, sampling, stream, index)


def gcc(*arguments: object, folder: Path = SOURCES) -> str:
    done = subprocess.run(["gcc", *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Flags of gcc -> picogpt.c as a library, compiled once each."""

    @functools.cache
    def library(*flags: str) -> ctypes.CDLL:
        path = tmp_path_factory.mktemp("c") / "picogpt.so"
        gcc(*STRICT, *flags, "-shared", "-fPIC", "picogpt.c", "-o", path)
        return ctypes.CDLL(str(path))

    return library


def built(model: IntegerModel, folder: Path, *flags: str) -> Path:
    """The exported program, compiled."""
    save_c(model, folder)
    gcc(*STRICT, *flags, "main.c", "picogpt.c", "-o", "picogpt", folder=folder)
    return folder / "picogpt"


def printed(program: Path, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


def refused(program: Path, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    return done.stderr


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_logits_are_numpys_bit_for_bit(compiled: Any, case: dict[str, Any]) -> None:
    model = random_integer_model(**case)
    tokens = random_tokens(1, min(model.model.block_size, 32))
    expected = by_numpy(model).forward(tokens)[0]
    assert len(np.unique(expected)) >= 8
    for flags, chunk in ((FAST, 5), (FAST, 32), (AVX512, 7), (("-O0",), 1)):
        if flags[0] == "-O3" or model.model.n_embd < 100:
            text = Text(compiled(*flags), model, chunk)
            np.testing.assert_array_equal(text.forward(tokens[0], len(tokens[0])), expected)
            text.check()
    text = Text(compiled(*FAST), model, 4)
    text.forward(tokens[0, :7], 0)
    np.testing.assert_array_equal(text.forward(tokens[0, 7:16], 6), expected[10:16])


@pytest.mark.parametrize("changes", [{}, dict(block_size=1), dict(block_size=7, bias=True)], ids=str)
@pytest.mark.parametrize("sampling", [(0.0, 0, 0), (0.8, 0, 1), (1.3, 3, 2**32 - 1), (1e-20, 2, 5)], ids=str)
def test_the_texts_are_those_of_the_loop(compiled: Any, changes: dict[str, Any], sampling: Any) -> None:
    """Past the context, from prompts that are shorter and longer than it, in several streams."""
    model = random_integer_model(**changes)
    settings: dict[str, Any] = dict(zip(("temperature", "top_k", "seed"), sampling, strict=True))
    for length in (1, 5, 20):
        prompts = random_tokens(3, length)
        expected = loop.generate(by_numpy(model), prompts, max_new_tokens=40, overflow="refill", **settings)
        text = Text(compiled(*FAST), model, 4)
        for stream, prompt in enumerate(prompts):
            assert text.generate(prompt, 40, stream, **settings) == expected[stream, length:].tolist()


@pytest.mark.parametrize("size", [1, 5, 65, 300, 50257])
def test_a_draw_is_the_specifications(compiled: Any, size: int) -> None:
    """Also among equal logits, at the largest ones, and for every temperature."""
    generator = np.random.default_rng(size)
    for index, spread in enumerate((0.001, 0.003, 0.5, 2.0, 30.0, 1e4)):
        logits = np.clip(np.rint(generator.normal(size=size) * spread * 1024), -(2**22), 2**22).astype(np.int32)
        for temperature in (0.0, 1e-30, 0.01, 0.8, 7.0, 1e30):
            for top_k in (0, 1, 3, size - 1, size + 1):
                scale = draws.Scale.of(temperature) if temperature else None
                bits = draws.random_bits(9, index, 1, 3)[0, 2:]
                (expected,) = draws.draw((logits / np.float32(1024))[None], bits, scale, top_k)
                found = draw(compiled(*FAST), c(logits), size, 2, index, temperature, top_k, 9)
                assert found == expected, (spread, temperature, top_k)


@BOTH_SIZES
def test_picogpt_c_needs_no_library_and_no_register_of_floats(tmp_path: Path) -> None:
    """The compiler refuses a float without these registers; also on a machine of 32 bits."""
    freestanding = ("-ffreestanding", "-fno-pic", "-mgeneral-regs-only", "-c", "picogpt.c", "-o")
    for flags in (["-O0"], ["-O3"], ["-m32", "-O0"], ["-m32", "-O3"]):
        gcc(*STRICT, *flags, *freestanding, tmp_path / "o.o")
        needed = subprocess.run(["nm", "-u", "o.o"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert set(needed.split()) <= {"U", "memcpy", "memset"}, flags


def test_picogpt_c_has_no_word_for_a_float_or_a_library(tmp_path: Path) -> None:
    gcc(*STRICT, *FAST, "-Wconversion", "-c", "picogpt.c", "-o", tmp_path / "o.o")
    source = "".join((SOURCES / f"picogpt.{end}").read_text(encoding="ascii") for end in "ch")
    code = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    assert not re.search(r"\b(float|double|malloc|free|memcpy|memset)\b|\d\.\d", code)
    assert re.findall(r"#include (.*)", code) == ['"picogpt.h"', "<stddef.h>", "<stdint.h>"]


BARE = """
#include "picogpt.h"

#include "model.h"
static PICOGPT_MEMORY(1) memory;
static picogpt_state state;
void _start(void)
{
    picogpt_init(&state, &picogpt_weights, memory.words, memory.bytes, 1);
    __asm__ volatile("int $0x80" ::"a"(1), "b"(picogpt_digest(&state) == PICOGPT_DIGEST ? 42 : 1));
}
"""


@BOTH_SIZES
def test_it_passes_its_own_test_on_32_bits_without_any_library(tmp_path: Path) -> None:
    """The program is the whole of what runs: it has no start-up code and no C library."""
    save_c(random_integer_model(bias=True), tmp_path / "c")
    (tmp_path / "c" / "bare.c").write_text(BARE)
    flags = ("-m32", "-O2", "-ffreestanding", "-fno-pic", "-fno-stack-protector", "-mgeneral-regs-only")
    gcc(*flags, "-nostdlib", "-static", "bare.c", "picogpt.c", "-o", "bare", folder=tmp_path / "c")
    try:
        status = subprocess.run([tmp_path / "c" / "bare"], check=False, timeout=60).returncode
    except OSError:
        pytest.skip("this kernel runs no programs of 32 bits")
    assert status == 42


@pytest.mark.parametrize(
    "case", [{}, {"kind": "wild", "bias": True, "activation": "relu"}, {"kind": "extreme"}], ids=str
)
def test_nothing_in_it_is_undefined(tmp_path: Path, case: dict[str, Any]) -> None:
    sanitizers = ("-O1", "-fsanitize=undefined,address", "-fno-sanitize-recover")
    program = built(random_integer_model(**case), tmp_path / "c", *sanitizers)
    assert printed(program, "--self-test").startswith("passed: digest ")
    printed(program, "--max_new_tokens=40", "--start=abcdefghij", "--top_k=3", "--num_samples=2")


@pytest.mark.parametrize("limit", [c_export.LARGEST_HEADER, 0], ids=["model.h", "model.bin"])
def test_the_program_prints_what_sample_py_prints(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_export, "LARGEST_HEADER", limit)
    base = random_integer_model("per_tensor", bias=True, activation="gelu_tanh")
    model = IntegerModel(**{**vars(base), "vocabulary": ACCENTS})
    program = built(model, tmp_path / "c", "-O1")
    assert (tmp_path / "c" / "model.bin").exists() == (limit == 0)
    prompt = ACCENTS.encode("é€\U0001f600a")
    for streams in (1, 3):
        settings = dict(max_new_tokens=50, temperature=1.1, top_k=6, seed=7, overflow="refill")
        ids_BT = loop.generate(by_numpy(model), np.tile(prompt, (streams, 1)), **settings)
        texts = [f"{ACCENTS.decode(ids)}\n" for ids in ids_BT]
        expected = texts[0] if streams == 1 else "".join(f"--- sample {n + 1}\n{text}" for n, text in enumerate(texts))
        flags = ("--max_new_tokens=50", "--temperature=1.1", "--top_k", "6", "--seed=7", f"--num_samples={streams}")
        assert printed(program, "--start=é€\U0001f600a", *flags) == expected
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfab\n")
    assert printed(program, f"--start=FILE:{tmp_path}/prompt.txt", "--max_new_tokens=0") == "ab\n\n"
    assert printed(program, "--max_new_tokens=0") == "\n\n"
    assert "U+0071 at position 2, which is not in the vocabulary" in refused(program, "--start=abq")
    assert "--start is empty" in refused(program, "--start=")
    assert "--seed=4294967296; expected an integer from 0" in refused(program, "--seed=4294967296")
    assert "--temperature=nan is not a number" in refused(program, "--temperature=nan")
    assert "unknown argument --topk=1" in refused(program, "--topk=1")
    if limit == 0:
        content = (tmp_path / "c" / "model.bin").read_bytes()
        for damaged in (content[:-1], content + b"\0", b"x" + content[1:], content[:40] + b"xxxx" + content[44:], b""):
            (tmp_path / "c" / "model.bin").write_bytes(damaged)
            assert "model.bin is not the file that was written with" in refused(program)
        (tmp_path / "c" / "model.bin").unlink()
        assert "cannot read " in refused(program)


def test_a_temperature_becomes_the_integer_of_every_runtime(tmp_path: Path) -> None:
    save_c(random_integer_model(), tmp_path / "c")
    harness = '#define main unused\n#include "main.c"\n#undef main\nint main(int n, char **a)\n{\n'
    harness += "    picogpt_sampling s;\n    while (--n) {\n        set_temperature(&s, *++a);\n"
    harness += '        printf("%lu\\n", (unsigned long)s.multiplier);\n    }\n    return 0;\n}\n'
    (tmp_path / "c" / "harness.c").write_text(harness)
    gcc("-std=c99", "harness.c", "picogpt.c", "-o", "harness", folder=tmp_path / "c")
    spread = np.exp(np.random.default_rng(0).uniform(-12, 12, 300)).tolist()
    temperatures = [0.8, 1.0, 1e-320, 1e-30, 4.4e-5, 189097.0, 2 * 189097.0, 378193.0, 1e30, *spread]
    found = printed(tmp_path / "c" / "harness", *map(repr, temperatures)).split()
    assert list(map(int, found)) == [int(draws.Scale.of(value).multiplier) for value in temperatures]


def test_a_model_of_ids_reads_and_writes_ids(tmp_path: Path) -> None:
    model = IntegerModel(**{**vars(random_integer_model()), "vocabulary": TokenIds.of_size(11, "ids")})
    program = built(model, tmp_path / "c")
    ids_BT = loop.generate(by_numpy(model), np.array([[3, 10]]), 20, 0.8, None, 1337, "refill")
    assert printed(program, "--start=3, 10", "--max_new_tokens=20").split() == list(map(str, ids_BT[0]))
    for wrong in ("11", "3 x", "99999999999"):
        assert "takes token ids below its vocabulary size" in refused(program, f"--start={wrong}")


def test_only_a_folder_of_its_own_is_replaced(tmp_path: Path) -> None:
    built(random_integer_model(), tmp_path / "c")
    save_c(random_integer_model(n_layer=1), tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == sorted([*c_export.PROGRAM_FILES, "model.h"])
    (tmp_path / "c" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"folder of other files \(thesis.txt\)"):
        save_c(random_integer_model(), tmp_path / "c")
    with pytest.raises(UserError, match="is a file"):
        save_c(random_integer_model(), tmp_path / "c" / "thesis.txt")


def test_convert_py_writes_what_make_builds(run_script: RunScript, tmp_path: Path) -> None:
    save_int8_model(random_integer_model(), tmp_path / "integer")
    done = run_script("scripts/convert.py", "--input=integer", "--to=c", "--output=c")
    assert done.stdout.startswith("wrote c: a program in C with its model in model.h of "), done.stderr
    subprocess.run(["make", "CFLAGS=-O1", "test"], cwd=tmp_path / "c", capture_output=True, check=True, timeout=60)
    save_int8_model(random_model(), tmp_path / "mixed")
    done = run_script("scripts/convert.py", "--input=mixed", "--to=c", "--output=c2")
    assert done.returncode == 2
    assert "--arithmetic=integer" in done.stderr
    assert not (tmp_path / "c2").exists()
