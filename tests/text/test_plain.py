import subprocess
from pathlib import Path

import pytest

from picogpt_jax.errors import UserError
from picogpt_jax.text.plain import read_text

TEXT = "one\r\ntwo\rthree\n\tnaïve 🙂"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_newlines_are_kept_and_a_byte_order_mark_is_not(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    assert read_text(tmp_path / "a.txt") == TEXT


def test_big_endian_is_told_by_its_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(("\ufeff" + TEXT).encode("utf-16-be"))
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; expected a text"),
        (b"\xef\xbb\xbf", "is empty; expected a text"),
        (b"\xff\xfe", "is empty; expected a text"),
        (b"abc\0def", r"is not UTF-8 text \(byte 0x00 at offset 3\); save it as UTF-8 with"),
        (b"na\xefve", r"is not UTF-8 text \(byte 0xef at offset 2\); by its looks"),
        (b"\xef\xbb\xbfna\xefve", r"is not UTF-8 text \(byte 0xef at offset 5\); by its looks"),
        (b"cut off \xe2\x82", r"is not UTF-8 text \(byte 0xe2 at offset 8\); by its looks"),
        ("другой язык".encode("cp1251"), r"is not UTF-8 text \(byte 0xe4 at offset 0\); save it as UTF-8 with"),
        (b"\xff\xfea\0b", r"is not UTF-16LE text \(byte 0x62 at offset 4\); save it as UTF-8 with"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt {message}"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("content", "converted"),
    [
        ("“A naïve” café".encode("cp1252"), "“A naïve” café"),
        ("naïve café".encode("utf-16-le"), "naïve café"),
        ("naïve café".encode("utf-16-be"), "naïve café"),
        ("naïve ".encode() + b"\xff" + "café".encode(), "naïve café"),
    ],
)
def test_the_command_that_the_message_names_converts_the_file(tmp_path: Path, content: bytes, converted: str) -> None:
    path = tmp_path / "it's mine.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="this converts it: iconv ") as error:
        read_text(path)
    subprocess.run(["bash", "-c", str(error.value).partition("converts it: ")[2]], stderr=subprocess.DEVNULL)
    assert read_text(f"{path}.utf8") == converted


def test_a_path_that_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"cannot read {tmp_path}/nowhere\.txt: No such file"):
        read_text("nowhere.txt")
    with pytest.raises(UserError, match="Is a directory; expected a text file"):
        read_text(tmp_path)
