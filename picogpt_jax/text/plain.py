"""Plain text files: their encoding, byte order mark and newlines. Training texts and prompts are both read here."""

import codecs
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from picogpt_jax.errors import UserError

PIECE_BYTES = 1 << 22
BYTE_ORDER_MARKS = {  # UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF32_LE: "UTF-32LE",
    codecs.BOM_UTF32_BE: "UTF-32BE",
    codecs.BOM_UTF16_LE: "UTF-16LE",
    codecs.BOM_UTF16_BE: "UTF-16BE",
}


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads a text file as a whole; see `text_pieces`."""
    return "".join(text_pieces(path))


def text_pieces(path: str | os.PathLike[str], label: str | None = None) -> Iterator[str]:
    r"""Reads a text of UTF-8, or of UTF-16 or UTF-32 with a byte order mark, in pieces.

    The byte order mark is dropped; newlines ("\n", "\r\n") stay as they are.

    Args:
        label: of a progress bar, which a terminal shows where reading takes long; None: no bar.

    Raises:
        UserError: the file is missing, a folder, unreadable, empty, or of another encoding.
    """
    from picogpt_jax.progress import tqdm  # not at the top: a tenth of the start of who only draws text

    path = Path(path).absolute()  # so that a message says where a relative one was looked for
    options: dict[str, Any] = dict(unit="B", unit_scale=True, leave=False, delay=0.5, disable=None if label else True)
    try:
        with path.open("rb") as file, tqdm(total=path.stat().st_size or None, desc=label, **options) as bar:
            yield from _decoded(file, path, bar)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a text file") from None


def _decoded(file: BinaryIO, path: Path, bar: Any) -> Iterator[str]:
    data = file.read(PIECE_BYTES)
    mark = next((mark for mark in BYTE_ORDER_MARKS if data.startswith(mark)), b"")
    if data == mark:
        raise UserError(f"{path} is empty; expected a text")
    encoding = BYTE_ORDER_MARKS.get(mark, "UTF-8")
    decoder = codecs.getincrementaldecoder(encoding)()
    start, data = len(mark), data.removeprefix(mark)
    try:
        while data:
            if encoding == "UTF-8" and b"\0" in data:
                raise UnicodeDecodeError(encoding, data, data.index(0), data.index(0) + 1, "no text has this byte")
            yield decoder.decode(data)
            bar.update(len(data))
            start, last, data = start + len(data), data, file.read(PIECE_BYTES)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        offset = start + len(data) - len(error.object) + error.start  # the character may begin in the piece before
        found, options = f"byte 0x{error.object[error.start]:02x} at offset {offset}", _iconv_options(data or last)
        way_out = "save it as UTF-8 with the program that wrote it"
        if options and encoding == "UTF-8":
            command = f"iconv {options} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(f'{path}.utf8')}"
            way_out = f"by its looks, this converts it: {command}"
        raise UserError(f"{path} is not {encoding} text ({found}); {way_out}") from None


def _iconv_options(data: bytes) -> str:
    """What `iconv` needs to know to read bytes that are not UTF-8; "" where they do not look like anything."""
    first, second = data[::2].count(0), data[1::2].count(0)
    if first or second:  # in UTF-16 of a Western language they are every other byte
        is_utf16 = max(first, second) > max(len(data) // 4, 8 * min(first, second))
        return ("-f UTF-16BE" if first > second else "-f UTF-16LE") if is_utf16 else ""
    text = data.decode("utf-8", "replace")
    if len(re.sub("[\0-\x7f\ufffd]+", "", text)) >= text.count("\ufffd"):
        return "-c -f UTF-8"  # most of it is: leaves out what is not
    is_ascii_mostly = len(data.translate(None, bytes(range(128)))) < len(data) / 3  # other alphabets are not
    is_western = is_ascii_mostly and not re.search(rb"[\x81\x8d\x8f\x90\x9d]", data)  # no characters there
    return "-f WINDOWS-1252" if is_western else ""
