"""Turns a text into `train.bin`, `val.bin` and `meta.json`; every `data/<name>/prepare.py` calls this."""

import hashlib
import os
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from picogpt_jax.errors import UserError
from picogpt_jax.files import atomic_path, write_json
from picogpt_jax.text.plain import read_text, text_pieces
from picogpt_jax.text.reading import load_vocabulary
from picogpt_jax.text.tokenizer import TokenizerVocabulary
from picogpt_jax.text.vocabulary import Vocabulary, code_points

MIN_CHARACTERS = 32  # leaves 4 for validation, so that each split has an input and a target
TRAIN_FRACTION = 0.9
STDLIB_MAX_CHARACTERS = 2_000_000
STDLIB_SOURCE = f"standard library of Python {platform.python_version()}"
# Not the standard library proper (installed packages, tests, GUI and porting tools that distributions split off).
_STDLIB_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"})
# Written for one machine: build settings with paths, and its owner's start-up code.
_STDLIB_SKIPPED_MODULES = ("_sysconfigdata", "sitecustomize", "usercustomize")


def prepare_text(
    text: str | Path,
    out_dir: str | os.PathLike[str],
    dataset: str,
    source: str,
    vocabulary: Vocabulary | None = None,
) -> dict[str, Any]:
    """Writes the first 90% of `text` as train.bin, the rest as val.bin, and meta.json; prints a summary.

    The files are nanoGPT's: raw little-endian uint16 ids over the sorted characters of the whole text, or of the
    `vocabulary` of a model that is to be trained further.

    Args:
        text: the text, or a file with it, which is read twice and in pieces: it may be larger than the memory (but for
            a tokenizer's vocabulary).

    Returns:
        what meta.json holds; `sha256` is of the whole text, as UTF-8.

    Raises:
        UserError: the text is too short or has too many distinct characters, or `out_dir` cannot be written.
    """
    length, distinct, sha256 = _survey(_pieces(text, "reading"))
    if length < MIN_CHARACTERS:
        raise UserError(f"the text ({source}) has {length} characters; at least {MIN_CHARACTERS} are needed")
    if vocabulary is None:
        vocabulary = Vocabulary.from_text(distinct)
    out_dir, n_train = Path(out_dir), int(length * TRAIN_FRACTION)
    with (
        atomic_path(out_dir / "meta.json") as meta_path,  # the last one to be renamed
        atomic_path(out_dir / "train.bin") as train_path,
        atomic_path(out_dir / "val.bin") as val_path,
    ):
        pieces = _pieces(text, "writing")
        if isinstance(vocabulary, TokenizerVocabulary):  # a token may lie across two pieces
            pieces = iter(["".join(pieces)])
        with train_path.open("wb") as train, val_path.open("wb") as val:
            start = 0
            for piece in pieces:
                middle = max(n_train - start, 0)
                for file, part, first in ((train, piece[:middle], start), (val, piece[middle:], start + middle)):
                    file.write(vocabulary.encode(part, source, first).astype("<u2").tobytes())
                start += len(piece)
        n_tokens = [path.stat().st_size // 2 for path in (train_path, val_path)]
        meta = {**vocabulary.to_json(), "vocab_size": vocabulary.size, "dataset": dataset, "source": source}
        meta |= {"sha256": sha256, "train_tokens": n_tokens[0], "val_tokens": n_tokens[1]}
        write_json(meta_path, meta)
        # An interruption from here on must not leave new ids beside the vocabulary of an earlier text.
        (out_dir / "meta.json").unlink(missing_ok=True)
    print(f"{dataset}: {length:,} characters, {len(distinct):,} distinct ({source})")
    print(f"wrote {n_tokens[0]:,} training and {n_tokens[1]:,} validation tokens to {out_dir}")
    return meta


def _pieces(text: str | Path, label: str) -> Iterator[str]:
    return iter([text]) if isinstance(text, str) else text_pieces(text, label)


def _survey(pieces: Iterator[str]) -> tuple[int, str, str]:
    """The number of characters, the distinct ones, and the SHA-256 of the UTF-8."""
    length, seen, digest = 0, np.zeros(sys.maxunicode + 1, bool), hashlib.sha256()
    for piece in pieces:
        length += len(piece)
        seen[code_points(piece)] = True
        digest.update(piece.encode("utf-8", "surrogatepass"))
    return length, "".join(map(chr, np.flatnonzero(seen))), digest.hexdigest()


def run_prepare(
    dataset: str,
    out_dir: str | os.PathLike[str],
    input_file: str | None,
    default_text: Callable[[], str] | None = None,
    default_source: str = "",
    vocabulary_file: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Prepares the text of `input_file`, or of `default_text()` where no file is given.

    `vocabulary_file` is the vocab.json of the model that is to be trained further, if any.

    Raises:
        UserError: neither is given, or see `read_text` and `prepare_text`.
    """
    vocabulary = load_vocabulary(vocabulary_file) if vocabulary_file else None
    if input_file is not None:
        path = Path(input_file)
        # What is no file, such as <(zcat text.gz), can be read once.
        return prepare_text(path if path.is_file() else read_text(path), out_dir, dataset, path.name, vocabulary)
    if default_text is None:
        raise UserError(f"{dataset} has no text of its own; name yours with --input_file=TEXT")
    return prepare_text(default_text(), out_dir, dataset, default_source, vocabulary)


def stdlib_text() -> str:
    """Returns the sources of the running Python's own standard library, at most 2,000,000 characters.

    ASCII modules only, in the order of their paths, each unchanged. The same Python version gives the same text.

    Raises:
        UserError: this Python has no sources on disk.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    text = ""
    for path in _stdlib_modules(root):
        data = path.read_bytes()
        if data.isascii():
            text += data.decode("ascii") + "\n"
        if len(text) >= STDLIB_MAX_CHARACTERS:
            break
    if not text:
        raise UserError(f"there are no library sources in {root}; prepare a text of your own with --input_file=TEXT")
    return text[:STDLIB_MAX_CHARACTERS]


def _stdlib_modules(root: Path) -> list[Path]:
    packages = [folder.parent for folder in root.glob("*/__init__.py")]
    found = [*root.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))]
    modules = {path.relative_to(root).as_posix(): path for path in found}
    return [
        modules[name]
        for name in sorted(modules)
        if not _STDLIB_SKIPPED_FOLDERS & set(name.split("/")) and not name.startswith(_STDLIB_SKIPPED_MODULES)
    ]
