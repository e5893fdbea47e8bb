"""Turns a text into `train.bin`, `val.bin` and `meta.json`; every `data/<name>/prepare.py` calls this."""

import dataclasses
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from picogpt_jax.errors import UserError
from picogpt_jax.files import atomic_path, write_json
from picogpt_jax.text.reading import load_vocabulary
from picogpt_jax.text.vocabulary import Vocabulary

MIN_CHARACTERS = 32  # leaves 4 for validation, so that each split has an input and a target
TRAIN_FRACTION = 0.9
STDLIB_MAX_CHARACTERS = 2_000_000
STDLIB_SOURCE = f"standard library of Python {platform.python_version()}"
# Not the standard library proper (installed packages, tests, GUI and porting tools that distributions split off).
_STDLIB_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"})
# Written for one machine: build settings with paths, and its owner's start-up code.
_STDLIB_SKIPPED_MODULES = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclasses.dataclass(frozen=True)
class Meta:
    """What `meta.json` says about a prepared data set."""

    vocabulary: Vocabulary
    dataset: str
    source: str
    sha256: str  # of the whole text, as UTF-8
    train_tokens: int
    val_tokens: int

    def to_json(self) -> dict[str, Any]:
        return {
            **self.vocabulary.to_json(),
            "vocab_size": self.vocabulary.size,
            "dataset": self.dataset,
            "source": self.source,
            "sha256": self.sha256,
            "train_tokens": self.train_tokens,
            "val_tokens": self.val_tokens,
        }


def prepare_text(
    text: str,
    out_dir: str | os.PathLike[str],
    dataset: str,
    source: str,
    vocabulary: Vocabulary | None = None,
) -> Meta:
    """Writes the first 90% of `text` as train.bin, the rest as val.bin, and meta.json; prints a summary.

    The files are nanoGPT's: raw little-endian uint16 ids over the sorted characters of the whole text, or of the
    `vocabulary` of a model that is to be trained further.

    Raises:
        UserError: the text is too short or has too many distinct characters, or `out_dir` cannot be written.
    """
    if len(text) < MIN_CHARACTERS:
        raise UserError(f"the text ({source}) has {len(text)} characters; at least {MIN_CHARACTERS} are needed")
    if vocabulary is None:
        vocabulary = Vocabulary.from_text(text)
    train_text = int(len(text) * TRAIN_FRACTION)
    parts = {f"{source}, its first {TRAIN_FRACTION:.0%}": text[:train_text], f"{source}, the rest": text[train_text:]}
    ids = [vocabulary.encode(part, name).astype("<u2") for name, part in parts.items()]
    meta = Meta(
        vocabulary=vocabulary,
        dataset=dataset,
        source=source,
        sha256=hashlib.sha256(text.encode("utf-8")).hexdigest(),
        train_tokens=len(ids[0]),
        val_tokens=len(ids[1]),
    )
    out_dir = Path(out_dir)
    with atomic_path(out_dir / "train.bin") as train_path, atomic_path(out_dir / "val.bin") as val_path:
        ids[0].tofile(train_path)
        ids[1].tofile(val_path)
        # An interruption from here on must not leave new ids beside the vocabulary of an earlier text.
        (out_dir / "meta.json").unlink(missing_ok=True)
    write_json(out_dir / "meta.json", meta.to_json())
    print(f"{dataset}: {len(text):,} characters, {len(set(text)):,} distinct ({source})")
    print(f"wrote {meta.train_tokens:,} training and {meta.val_tokens:,} validation tokens to {out_dir}")
    return meta


def run_prepare(
    dataset: str,
    out_dir: str | os.PathLike[str],
    input_file: str | None,
    default_text: Callable[[], str] | None = None,
    default_source: str = "",
    vocabulary_file: str | os.PathLike[str] | None = None,
) -> Meta:
    """Prepares the text of `input_file`, or of `default_text()` where no file is given.

    `vocabulary_file` is the vocab.json of the model that is to be trained further, if any.

    Raises:
        UserError: neither is given, or see `read_text` and `prepare_text`.
    """
    vocabulary = load_vocabulary(vocabulary_file) if vocabulary_file else None
    if input_file is not None:
        return prepare_text(read_text(input_file), out_dir, dataset, Path(input_file).name, vocabulary)
    if default_text is None:
        raise UserError(f"{dataset} has no text of its own; name yours with --input_file=TEXT")
    return prepare_text(default_text(), out_dir, dataset, default_source, vocabulary)


def read_text(path: str | os.PathLike[str]) -> str:
    r"""Reads a UTF-8 text; a byte order mark is dropped, newlines ("\n", "\r\n") stay as they are.

    Raises:
        UserError: the file is missing, a folder, unreadable, empty, binary or not UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a text file, see --input_file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; expected a text file, see --input_file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise UserError(f"cannot read {path}: {error}; expected a text file, see --input_file") from None
    nul_offset = data.find(b"\0")
    if nul_offset >= 0:
        raise UserError(f"{path} is binary (NUL byte at offset {nul_offset}); expected UTF-8 text")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise UserError(f"{path} is not UTF-8 ({found}); convert it first, for example with iconv -t UTF-8") from None
    if not text:
        raise UserError(f"{path} is empty; expected a text of at least {MIN_CHARACTERS} characters")
    return text


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
