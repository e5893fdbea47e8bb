import errno
import hashlib
import json
import os
import shutil
import sysconfig
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

from picogpt_jax.errors import UserError
from picogpt_jax.text import plain, prepare
from picogpt_jax.text.reading import vocabulary_of_data
from picogpt_jax.text.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[2]
DATASETS = sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py"))
TEXT = "hello world\n" * 5  # 60 characters: 54 for training, 6 for validation

RunScript = Callable[..., CompletedProcess[str]]


def test_the_files_are_the_documented_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = prepare.prepare_text(TEXT, tmp_path / "out", "hello_char", "hello.txt")
    itos = ["\n", " ", "d", "e", "h", "l", "o", "r", "w"]
    little_endian = b"".join(bytes([itos.index(char), 0]) for char in TEXT)
    assert (tmp_path / "out/train.bin").read_bytes() == little_endian[: 2 * 54]
    assert (tmp_path / "out/val.bin").read_bytes() == little_endian[2 * 54 :]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert json.loads((tmp_path / "out/meta.json").read_text(encoding="utf-8")) == {
        "type": "char",
        "itos": itos,
        "vocab_size": 9,
        "dataset": "hello_char",
        "source": "hello.txt",
        "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
        "train_tokens": 54,
        "val_tokens": 6,
    }
    assert meta == json.loads((tmp_path / "out/meta.json").read_text(encoding="utf-8"))
    summary = capsys.readouterr().out
    assert "hello_char: 60 characters, 9 distinct (hello.txt)" in summary
    assert f"wrote 54 training and 6 validation tokens to {tmp_path / 'out'}" in summary


def test_a_text_for_a_model_that_exists_has_its_vocabulary(tmp_path: Path) -> None:
    vocabulary = Vocabulary(tuple("world \nheZ"))
    vocabulary.save(tmp_path / "vocab.json")
    (tmp_path / "hello.txt").write_text(TEXT)
    prepare.run_prepare("x", tmp_path / "out", str(tmp_path / "hello.txt"), vocabulary_file=tmp_path / "vocab.json")
    assert vocabulary == vocabulary_of_data(tmp_path / "out")
    ids = [np.fromfile(tmp_path / f"out/{split}.bin", "<u2") for split in ("train", "val")]
    assert vocabulary.decode(np.concatenate(ids)) == TEXT
    (tmp_path / "hello.txt").write_text(TEXT + "€")
    with pytest.raises(UserError, match=r"hello.txt has the character '€' \(U\+20AC\) at position 60, which is"):
        prepare.run_prepare("x", tmp_path / "out", str(tmp_path / "hello.txt"), vocabulary_file=tmp_path / "vocab.json")


def test_shakespeare_has_the_published_sizes_and_decodes_to_itself(tmp_path: Path, shakespeare_text: str) -> None:
    meta = prepare.prepare_text(shakespeare_text, tmp_path, "shakespeare_char", "input.txt")
    sizes = [meta[key] for key in ("vocab_size", "train_tokens", "val_tokens")]
    assert sizes == [65, 1_003_854, 111_540]  # nanoGPT's readme
    ids = np.concatenate([np.fromfile(tmp_path / f"{split}.bin", "<u2") for split in ("train", "val")])
    assert vocabulary_of_data(tmp_path).decode(ids) == shakespeare_text


def test_a_text_must_be_long_enough(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the text \(a\.txt\) has 31 characters; at least 32"):
        prepare.prepare_text("x" * 31, tmp_path / "out", "text_char", "a.txt")
    assert not (tmp_path / "out").exists()
    meta = prepare.prepare_text("x" * 32, tmp_path / "out", "text_char", "a.txt")
    assert (meta["train_tokens"], meta["val_tokens"]) == (28, 4)


def test_an_interruption_leaves_no_vocabulary_of_another_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare.prepare_text(TEXT, tmp_path, "text_char", "first")

    def replace(source: Path, target: Path) -> None:
        if target.name == "train.bin":
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare_text(TEXT.upper(), tmp_path, "text_char", "second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.bin", "val.bin"]


def test_a_disk_without_room_for_the_vocabulary_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare.prepare_text(TEXT, tmp_path, "text_char", "first")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path, value: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepare, "write_json", full)
    with pytest.raises(UserError, match=r"cannot write .*/meta.json: No space left on device; make room"):
        prepare.prepare_text(TEXT.upper(), tmp_path, "text_char", "second")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match=r"cannot write .*out.*; choose a folder"):
        prepare.prepare_text(TEXT, tmp_path / "out", "text_char", "a.txt")


def test_a_file_is_prepared_in_pieces_as_the_whole_text_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "naïve\r\n🙂 text, " * 40
    whole = prepare.prepare_text(text, tmp_path / "whole", "x", "a.txt")
    monkeypatch.setattr(plain, "PIECE_BYTES", 7)  # pieces end within characters, and within the training part
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "a.txt").write_bytes(text.encode(encoding))
        assert prepare.run_prepare("x", tmp_path / encoding, str(tmp_path / "a.txt")) == whole
        for name in ("train.bin", "val.bin", "meta.json"):
            assert (tmp_path / encoding / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "PIECE_BYTES", 1 << 16)
    peaks = []
    for size in (1, 2):  # of half a million characters and an emoji, which takes every str to 4 bytes a character
        (tmp_path / "a.txt").write_text("🙂" + TEXT * (size << 13), encoding="utf-8")
        tracemalloc.start()
        prepare.run_prepare("x", tmp_path / "out", str(tmp_path / "a.txt"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < len(TEXT) << 13, "less than a byte for each character more"


def test_what_can_be_read_once_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as thread:
        thread.submit((tmp_path / "pipe").write_text, TEXT)
        meta = prepare.run_prepare("x", tmp_path / "out", str(tmp_path / "pipe"))
    assert (meta["train_tokens"], meta["val_tokens"]) == (54, 6)


def test_the_stdlib_text_is_plain_and_the_same_each_time() -> None:
    text = prepare.stdlib_text()
    assert text.isascii()
    assert 1_000_000 < len(text) <= 2_000_000
    first_module = Path(sysconfig.get_paths()["stdlib"], "__future__.py").read_text(encoding="utf-8")
    assert text.startswith(first_module)
    assert prepare.stdlib_text() == text


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that takes the place of the standard library."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    (tmp_path / "lib").mkdir()
    return tmp_path / "lib"


def test_the_stdlib_text_takes_ascii_library_modules_in_order(library: Path) -> None:
    modules = {
        "b.py": b"# b\n",
        "a/__init__.py": b"# a\n",
        "a/x.py": b"\tx\r\n\x0c",
        "a/sub/y.py": b"# y\n",
        "a/z.txt": b"not Python",
        "accent.py": "# é\n".encode(),
        "a/test/t.py": b"a test",
        "a/tests/t.py": b"a test",
        "test/__init__.py": b"a test",
        "idlelib/__init__.py": b"idle",
        "lib2to3/__init__.py": b"2to3",
        "site-packages/installed.py": b"installed",
        "site-packages/__init__.py": b"installed",
        "config-3/no_package.py": b"a folder that is no package",
        "_sysconfigdata__linux.py": b"this machine's settings",
        "sitecustomize.py": b"this machine's start-up code",
    }
    for name, content in modules.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_bytes(content)
    assert prepare.stdlib_text() == "# a\n\n# y\n\n\tx\r\n\x0c\n# b\n\n"


def test_the_stdlib_text_is_cut_at_its_limit(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "STDLIB_MAX_CHARACTERS", 10)
    for name in "abc":
        (library / f"{name}.py").write_bytes(name.encode() * 6)
    assert prepare.stdlib_text() == "aaaaaa\nbbb"


def test_a_python_without_sources_is_a_users_error(library: Path) -> None:
    with pytest.raises(UserError, match=r"no library sources in .*lib; .*--input_file"):
        prepare.stdlib_text()


def test_an_input_file_takes_the_place_of_the_default_text(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(TEXT, encoding="utf-8")
    meta = prepare.run_prepare("x", tmp_path / "a", str(tmp_path / "mine.txt"), lambda: pytest.fail("not wanted"), "y")
    assert (meta["source"], "".join(meta["itos"])) == ("mine.txt", "\n dehlorw")
    meta = prepare.run_prepare("x", tmp_path / "b", None, lambda: TEXT.upper(), "y")
    assert (meta["source"], "".join(meta["itos"])) == ("y", "\n DEHLORW")
    with pytest.raises(UserError, match=r"x has no text of its own; name yours with --input_file=TEXT"):
        prepare.run_prepare("x", tmp_path / "c", None)


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_script_takes_a_text_and_a_folder(run_script: RunScript, tmp_path: Path, dataset: str) -> None:
    (tmp_path / "mine.txt").write_text(TEXT, encoding="utf-8")
    done = run_script(f"data/{dataset}/prepare.py", "--input_file=mine.txt", "--out_dir=out", timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    meta = json.loads((tmp_path / "out/meta.json").read_text(encoding="utf-8"))
    assert (meta["dataset"], meta["source"], meta["val_tokens"]) == (dataset, "mine.txt", 6)


def test_a_script_writes_beside_itself_unless_told_otherwise(run_script: RunScript, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "stdlib_char"
    folder.mkdir(parents=True)
    script = shutil.copy(ROOT / "data/stdlib_char/prepare.py", folder)
    done = run_script(str(script), timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert meta["sha256"] == hashlib.sha256(prepare.stdlib_text().encode()).hexdigest()


@pytest.mark.parametrize(
    ("dataset", "flags", "message"),
    [
        ("text_char", [], "text_char has no text of its own; name yours with --input_file=TEXT"),
        ("text_char", ["--input_file=nowhere.txt"], "nowhere.txt: No such file or directory"),
        ("graham_char", ["--delay_seconds=-1"], "--delay_seconds=-1"),
        ("graham_char", ["--max_essays=0"], "--max_essays=0"),
    ],
)
def test_a_scripts_user_gets_one_line(run_script: RunScript, dataset: str, flags: list[str], message: str) -> None:
    done = run_script(f"data/{dataset}/prepare.py", *flags, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
