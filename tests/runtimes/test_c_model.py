"""C, from Python: the bits of NumPy's logits, every runtime's texts, and a library that is compiled once."""

import ctypes
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from test_int8_model import random_model
from test_onnx_integer import CASES, by_numpy, random_integer_model, random_tokens

from picogpt_jax.errors import UserError
from picogpt_jax.formats import loading
from picogpt_jax.formats.c_export import logits_digest
from picogpt_jax.int8.folder import save_int8_model
from picogpt_jax.runtimes import c_library, c_model, loop
from picogpt_jax.runtimes.c_model import CGPT
from picogpt_jax.runtimes.engine import Sampling

pytestmark = pytest.mark.skipif(c_library.compiler() is None, reason="needs a C compiler")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of its own, with the library in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        c_library.library.cache_clear()
        c_library.library()
        yield c_library.cache_folder()
    c_library.library.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_logits_are_numpys_bit_for_bit(case: dict[str, Any]) -> None:
    """Of whole windows, in pieces with a cache, and with two threads."""
    model = random_integer_model(**case)
    tokens_BT = random_tokens(3, min(model.model.block_size, 40))
    expected = by_numpy(model).forward(tokens_BT)
    assert len(np.unique(expected)) >= 8
    for threads in (1, 2):
        found = CGPT(model, threads)
        for _ in range(2):  # memory that is used again
            np.testing.assert_array_equal(found.forward(tokens_BT), expected, strict=True)
        np.testing.assert_array_equal(found.forward(tokens_BT, last_only=True), expected[:, -1:], strict=True)
        cache = found.new_cache(3)
        ends = itertools.pairwise((0, 5, 6, 7, 10, tokens_BT.shape[1]))
        pieces = [found.forward(tokens_BT[:, first:end], cache) for first, end in ends]
        np.testing.assert_array_equal(np.concatenate(pieces, 1), expected)
        assert cache.length == tokens_BT.shape[1]


@pytest.mark.parametrize("overflow", ["slide", "refill"])
@pytest.mark.parametrize("changes", [{}, dict(block_size=1), dict(block_size=7, bias=True)], ids=str)
def test_the_texts_are_those_of_numpy(changes: dict[str, Any], overflow: Any) -> None:
    """Past the context, from prompts that are shorter and longer than it."""
    model = random_integer_model(n_layer=1, **changes)
    numpy, threads = by_numpy(model), [CGPT(model, count) for count in (1, 2)]
    for temperature, top_k, seed in ((0.0, None, 0), (0.8, 0, 1), (1.3, 3, 2**32 - 1)):
        for length in (1, 5, 20):
            prompts = random_tokens(9, length)  # more than are computed together where the context is 7
            sampling = Sampling(30, temperature, top_k, seed, overflow)
            expected = np.concatenate(list(loop.pieces(numpy, prompts, sampling)), 1)
            for runtime in threads:
                pieces = list(runtime.pieces(prompts, sampling))
                assert pieces[0].shape == (9, 1), "the first token does not wait for others"
                np.testing.assert_array_equal(np.concatenate(pieces, 1), expected)


def test_two_threads_compute_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """The later tokens wait for the keys of the earlier ones: with one thread's result, draw after draw."""
    monkeypatch.setattr(c_model, "PAIR_TOKENS", 16)
    model, sampling = random_integer_model(), Sampling(400, 0.8, 0, 1, "slide")
    alone, both = CGPT(model, 1), CGPT(model, 2)
    windows: list[int] = []
    last_logits = both._last_logits
    monkeypatch.setattr(both, "_last_logits", lambda pair, ids: windows.append(len(ids)) or last_logits(pair, ids))
    expected, found = (np.concatenate(list(each.pieces(random_tokens(1, 20), sampling)), 1) for each in (alone, both))
    assert windows == [16] * 400
    assert len(np.unique(expected)) > 4
    np.testing.assert_array_equal(found, expected)


def test_pieces_grow_and_none_is_empty() -> None:
    runtime = CGPT(random_integer_model(), 1)
    sizes = [piece.shape[1] for piece in runtime.pieces(random_tokens(1, 4), Sampling(3000, overflow="refill"))]
    assert (sizes[0], sum(sizes)) == (1, 3000)
    assert len(sizes) < 300
    assert list(runtime.pieces(random_tokens(1, 4), Sampling(0))) == []


def test_a_text_that_is_not_read_to_its_end_leaves_the_others_alone() -> None:
    """Two texts of one runtime, drawn in turn."""
    runtime, sampling = CGPT(random_integer_model(), 2), Sampling(30, seed=3, overflow="refill")
    prompts = random_tokens(2, 4), random_tokens(2, 6, seed=1)
    expected = [np.concatenate(list(runtime.pieces(prompt, sampling)), 1) for prompt in prompts]
    first, second = (runtime.pieces(prompt, sampling) for prompt in prompts)
    begun = next(first)
    np.testing.assert_array_equal(np.concatenate(list(second), 1), expected[1])
    np.testing.assert_array_equal(np.concatenate([begun, *first], 1), expected[0])


def test_losses_are_those_of_numpy() -> None:
    model, ids = random_integer_model(), random_tokens(1, 100)[0]
    assert CGPT(model, 2).loss(ids) == loop.evaluate(by_numpy(model), ids, 16)


def test_what_does_not_fit_is_refused() -> None:
    runtime = CGPT(random_integer_model())
    with pytest.raises(ValueError, match="17 positions do not fit into block_size=16"):
        runtime.forward(random_tokens(1, 17))
    cache = runtime.new_cache(2)
    runtime.forward(random_tokens(2, 16), cache)
    with pytest.raises(ValueError, match="17 positions do not fit"):
        runtime.forward(random_tokens(2, 1), cache)
    for wrong in (-1, 11, 2**32):
        with pytest.raises(UserError, match=f"the token id {wrong}; the vocabulary has ids 0 to 10"):
            runtime.forward(np.array([[wrong]]))
        with pytest.raises(UserError, match=f"the token id {wrong}; the vocabulary has ids 0 to 10"):
            runtime.pieces(np.array([[wrong]]), Sampling(1))


# --------------------------------------------------------------------------------------------------------- the library


def test_the_digest_of_the_self_test_is_numpys() -> None:
    assert logits_digest(c_library.self_test_model()) == c_library.SELF_TEST_DIGEST


def test_python_reserves_enough_for_a_state_and_a_model(tmp_path: Path) -> None:
    room = (
        f"sizeof(picogpt_state) <= {ctypes.sizeof(c_library.State)} && sizeof(picogpt_model) <= {c_library.MODEL_BYTES}"
    )
    source = tmp_path / "check.c"
    source.write_text(f'#include "picogpt.h"\nchar fits[{room} ? 1 : -1];\n')
    command = [*(c_library.compiler() or ()), "-I", str(c_library.SOURCES), "-c", str(source), "-o", "check.o"]
    subprocess.run(command, cwd=tmp_path, check=True)


def load_anew() -> None:
    c_library.library.cache_clear()
    c_library.library()


def test_the_library_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = list(cache.iterdir())
    assert len(kept) == 1, "nothing temporary is left"
    before = kept[0].stat()
    compiled: list[Path] = []
    monkeypatch.setattr(c_library, "_compile", lambda _, path: compiled.append(path))
    load_anew()
    assert (compiled, kept[0].stat().st_mtime_ns) == ([], before.st_mtime_ns)
    for changed in (dict(OPTIONS=(("-O1",),)), dict(PLAIN=("-O0",)), dict(cpu=lambda: ("another", set()))):
        with monkeypatch.context() as patch:
            for name, value in changed.items():
                patch.setattr(c_library, name, value)
            with pytest.raises(UserError, match="other results"):  # nothing was compiled
                load_anew()
    assert len({path.name for path in compiled} - {kept[0].name}) == 3


OTHER = """
int picogpt_open() { return 1; }
void picogpt_memory(void *m, int c, unsigned long *lengths) { lengths[0] = lengths[1] = 9; }
void picogpt_init() {}
void picogpt_forward() {}
void picogpt_generate() {}
void picogpt_share() {}
int picogpt_draw() { return 0; }
unsigned picogpt_digest() { return 1; }
"""


@pytest.mark.parametrize("damage", ["no library", "another library", "other results"])
def test_a_library_that_is_damaged_is_compiled_anew(
    cache: Path, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (good,) = cache.iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = c_library.cache_folder() / good.name
    kept.parent.mkdir()
    if damage == "no library":
        kept.write_bytes(b"\x7fELF" + bytes(100))
    else:
        (tmp_path / "x.c").write_text(OTHER if damage == "other results" else "int x;")
        command = c_library.compiler()
        assert command is not None
        subprocess.run([*command, "-w", "-shared", "-fPIC", "x.c", "-o", kept], cwd=tmp_path, check=True)
    assert kept.read_bytes() != good.read_bytes()
    monkeypatch.setattr(c_library, "_compile", lambda _, path: shutil.copyfile(good, path))
    load_anew()
    assert list(kept.parent.iterdir()) == [kept]
    assert kept.read_bytes() == good.read_bytes()
    assert CGPT(random_integer_model()).forward(random_tokens(1, 3)).shape == (1, 3, 11)


def without_compiler(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch.setenv("PATH", str(tmp_path))
    patch.delenv("CC", raising=False)
    patch.setitem(sys.modules, "ziglang", None)  # as if it were not installed


def test_without_a_compiler_there_is_one_line_or_the_library_that_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_int8_model(random_integer_model(), tmp_path / "int8")
    with monkeypatch.context() as patch:
        without_compiler(patch, tmp_path)
        load_anew()
        assert loading.load(tmp_path / "int8", device="cpu").runtime == "c"
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
        with pytest.raises(
            UserError, match=r"needs a C compiler.*; install one, such as: pip install 'picogpt_jax\[c\]'"
        ):
            load_anew()
        with pytest.raises(UserError, match="needs a C compiler"):
            loading.load(tmp_path / "int8", "c")
        assert loading.load(tmp_path / "int8", device="cpu").runtime == "numpy"
    load_anew()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (dict(CC="/no/such/cc"), "the C compiler /no/such/cc does not start: No such file or directory; set CC"),
        (dict(CC="gcc 'x"), "^CC=gcc 'x is no command: No closing quotation; set CC to a C compiler, or unset it$"),
        (dict(CC="false"), r"^false cannot compile picogpt.c \(.*\); set CC to another"),
        (dict(XDG_CACHE_HOME="/proc/none"), r"cannot write to /proc/none/picogpt_jax: .*; set XDG_CACHE_HOME to"),
    ],
)
def test_what_keeps_it_from_compiling_is_one_line(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        load_anew()
    assert not c_library.is_available()


def test_a_model_of_version_1_is_refused_in_one_line(tmp_path: Path) -> None:
    save_int8_model(random_model(), tmp_path / "int8")
    with pytest.raises(UserError, match=r"is of version 1; --runtime=c computes version 2.*quantize.py.*=integer"):
        loading.load(tmp_path / "int8", "c")
    assert loading.load(tmp_path / "int8", device="cpu").runtime == "numpy"


def test_ziglang_is_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ziglang").mkdir()
    (tmp_path / "ziglang" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "ziglang", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("CC", raising=False)
    assert c_library.compiler() != [str(tmp_path / "ziglang" / "zig"), "cc"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert c_library.compiler() == [str(tmp_path / "ziglang" / "zig"), "cc"]


def test_the_runtime_starts_without_jax() -> None:
    code = "import sys, picogpt_jax.runtimes.c_model; print({'jax', 'torch', 'flax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
