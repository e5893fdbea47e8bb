import functools
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picogpt_jax.errors import UserError
from picogpt_jax.formats.hf_documents import tokenizer_files
from picogpt_jax.text.reading import (
    MAX_PICKLE_BYTES,
    _unpickled,
    load_vocabulary,
    vocabulary_from_json,
    vocabulary_of_data,
)
from picogpt_jax.text.vocabulary import TokenIds, Vocabulary

NANOGPT_META = {"vocab_size": 3, "itos": {0: "\n", 1: "a", 2: "é"}, "stoi": {"\n": 0, "a": 1, "é": 2}}


def test_ids_are_positions_among_the_sorted_characters() -> None:
    vocabulary = Vocabulary.from_text("banana\n")
    assert vocabulary.itos == ("\n", "a", "b", "n")
    assert vocabulary.size == 4
    ids = vocabulary.encode("ban\n")
    assert ids.dtype == np.uint16
    assert ids.tolist() == [2, 1, 3, 0]


@pytest.mark.parametrize("text", ["", "a", "\0 \t\r\n", "naïve “q” \u2028 日本 🙂\U0010ffff"])
def test_decode_inverts_encode(text: str) -> None:
    vocabulary = Vocabulary.from_text(text + "x")
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.decode(vocabulary.encode(text).tolist()) == text


def test_an_unknown_character_is_named_with_its_position_and_source() -> None:
    vocabulary = Vocabulary.from_text("abc🙂")
    with pytest.raises(UserError, match=r"^--start has the character 'é' \(U\+00E9\) at position 3, .* of 4;"):
        vocabulary.encode("a🙂bébé", source="--start")
    with pytest.raises(UserError, match=r"the text has the character '\\udcff' \(U\+DCFF\) at position 0"):
        vocabulary.encode("\udcff")  # what an argument that is not UTF-8 becomes


def test_a_backslash_or_carriage_return_that_is_unknown_names_the_way_on() -> None:
    vocabulary = Vocabulary.from_text("ROME:\n")
    with pytest.raises(UserError, match=r"--start=\$'ROMEO:\\n'; or put the text into a file: --start=FILE:PATH"):
        vocabulary.encode(r"ROMEO:\n", "--start")
    with pytest.raises(UserError, match=r"the line breaks are Windows': take them from the file with tr -d '\\r'"):
        vocabulary.encode("ROMEO:\r\n", "--start")


@pytest.mark.parametrize("ids", [[0, 3], [0, -1], np.array([0, 3]), np.array([0, -1])])
def test_an_id_outside_the_vocabulary_is_refused(ids: Any) -> None:
    with pytest.raises(UserError, match=rf"id {ids[1]} at position 1 is outside the vocabulary of 3"):
        Vocabulary.from_text("abc").decode(ids)


def test_uint16_is_used_up_to_its_last_id_and_not_beyond() -> None:
    chars = [chr(0x10000 + index) for index in range(65_537)]
    vocabulary = Vocabulary.from_text("".join(chars[:-1]))
    assert vocabulary.encode(chars[-2]).tolist() == [65_535]
    with pytest.raises(UserError, match=r"a vocabulary of 65537 entries; 1 to 65536 fit"):
        Vocabulary.from_text("".join(chars))
    with pytest.raises(UserError, match=r"a vocabulary of 0 entries"):
        Vocabulary.from_text("")


def test_the_file_is_the_documented_one_and_loads_again(tmp_path: Path) -> None:
    vocabulary = Vocabulary.from_text('\n "é')
    vocabulary.save(tmp_path / "vocab.json")
    written = (tmp_path / "vocab.json").read_text(encoding="utf-8")
    assert "".join(written.split()) == r'{"type":"char","itos":["\n","","\"","é"]}'
    assert load_vocabulary(tmp_path / "vocab.json") == vocabulary


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "is not a character vocabulary"),
        ({"itos": ["a"]}, "is not a character vocabulary"),
        ({"type": "bpe", "itos": ["a"]}, "is not a character vocabulary"),
        ({"type": "char"}, "is not a character vocabulary"),
        ({"type": "char", "itos": "ab"}, "is not a character vocabulary"),
        ({"type": "char", "itos": []}, "a vocabulary of 0 entries"),
        ({"type": "char", "itos": ["a", "bc"]}, "entry 1 is 'bc'; expected a string of one character"),
        ({"type": "char", "itos": ["a", ""]}, "entry 1 is ''; expected a string of one character"),
        ({"type": "char", "itos": ["a", 1]}, "entry 1 is a int; expected a string of one character"),
        ({"type": "char", "itos": ["a", ["b"]]}, "entry 1 is a list; expected a string of one character"),
        ({"type": "char", "itos": ["a", "\ud800"]}, r"entry 1 is '\\ud800'; expected"),
        ({"type": "char", "itos": ["a", "b", "a"]}, r"entry 2 is a second 'a' \(U\+0061\); expected distinct"),
        ({"type": "char", "itos": ["a", "b"], "vocab_size": 3}, "vocab_size 3 but 2 entries"),
    ],
)
def test_a_json_value_that_is_no_vocabulary_is_refused(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^some\.json.*{message}"):
        vocabulary_from_json(value, "some.json")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nanogpt_meta_is_read_at_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(NANOGPT_META, protocol))
    assert vocabulary_of_data(tmp_path) == Vocabulary(("\n", "a", "é"))


def test_meta_json_comes_before_meta_pkl(tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(NANOGPT_META))
    Vocabulary.from_text("xyz").save(tmp_path / "meta.json")
    assert vocabulary_of_data(tmp_path).itos == ("x", "y", "z")


def test_a_folder_that_is_not_prepared_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^book has no meta\.json .*; looked in {tmp_path}/book; give the full path"):
        vocabulary_of_data("book")
    (tmp_path / "prepare.py").touch()
    with pytest.raises(UserError, match=rf"make it with: python {tmp_path / 'prepare.py'}$"):
        vocabulary_of_data(tmp_path)


def test_token_files_alone_have_ids_and_no_text(tmp_path: Path) -> None:
    np.arange(9, dtype="<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match=r"has token files but no vocabulary .* or give --config.model.vocab_size"):
        vocabulary_of_data(tmp_path)
    ids = vocabulary_of_data(tmp_path, 50304)
    assert (ids.size, ids.bits_unit(np.arange(7))) == (50304, ("bits_per_token", 1.0))
    assert Vocabulary.from_text("abc").bits_unit(np.arange(3)) == ("bits_per_char", 1.0)
    assert vocabulary_from_json(ids.to_json(), "vocab.json") == ids
    export = functools.partial(tokenizer_files, ids, 8)
    for use in (lambda: ids.encode("a"), lambda: ids.decode([1]), lambda: ids.default_prompt, export):
        with pytest.raises(UserError, match=r"trained on token ids alone.* put the tokenizer.json .* into the workdir"):
            use()
    with pytest.raises(UserError, match=r"model.vocab_size=65537: .* 1 to 65536 fit in uint16"):
        vocabulary_of_data(tmp_path, 65537)


def test_token_ids_fit_any_vocabulary_of_their_number(tmp_path: Path) -> None:
    """So that a tokenizer.json may be added to a run that began without one."""
    (tmp_path / "train.bin").touch()
    text = Vocabulary.from_text("abc")
    assert text.fits(vocabulary_of_data(tmp_path, 3))
    assert vocabulary_of_data(tmp_path, 3).fits(text)
    assert text.fits(vocabulary_of_data(tmp_path, 4)), "of a padded model"
    assert vocabulary_of_data(tmp_path, 4).fits(text)
    assert not text.fits(vocabulary_of_data(tmp_path, 2))
    assert not vocabulary_of_data(tmp_path, 2).fits(text)
    assert not text.fits(Vocabulary.from_text("abd"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_else_is_plain_in_a_meta_pkl_is_read(tmp_path: Path, protocol: int) -> None:
    chars = ["\n", "a", "é"]
    more = {"chars": chars, "list": [1, -2.5, None, True, 2**70, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, []]}
    value = {**NANOGPT_META, **more, "itos": chars}
    data = pickle.dumps(value, protocol)
    (tmp_path / "meta.pkl").write_bytes(data)
    assert vocabulary_of_data(tmp_path) == Vocabulary(tuple(chars))
    assert json.dumps(_unpickled(data)) == json.dumps(pickle.loads(data))  # which has no tuples either


def test_a_meta_pkl_of_vocab_size_alone_means_token_ids(tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 70}))
    assert vocabulary_of_data(tmp_path) == TokenIds.of_size(70, "")
    with pytest.raises(UserError, match=r"has the keys \['vocab_size'\], expected itos and stoi"):
        vocabulary_of_data(tmp_path, token_ids=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stoi": {"\n": 0, "a": 2, "é": 1}}, "itos, stoi and vocab_size contradict each other"),
        ({"stoi": {"\n": 0}}, "itos, stoi and vocab_size contradict each other"),
        ({"vocab_size": 4}, "itos, stoi and vocab_size contradict each other"),
        ({"vocab_size": [[]]}, "itos, stoi and vocab_size contradict each other"),
        ({"stoi": "\na"}, "expected itos and stoi"),
        ({"itos": {0: "\n", 1: "a", 3: "é"}}, "entry 2 is a NoneType; expected"),
        ({"itos": {}, "vocab_size": 0}, "a vocabulary of 0 entries"),
        ({"itos": {0: "\n", 1: {}, 2: "é"}}, "entry 1 is a dict; expected a string of one character"),
        ({"itos": ["\n", "th", "é"]}, r"tokens of several characters, such as 'th'; prepare the text by .*, or move"),
    ],
)
def test_a_contradictory_meta_pkl_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({**NANOGPT_META, **change}))
    with pytest.raises(UserError, match=rf"meta\.pkl.*{message}"):
        vocabulary_of_data(tmp_path)


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_never_executed(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "executed"
    data = pickle.dumps({**NANOGPT_META, "x": _Evil(target)}, protocol)
    (tmp_path / "meta.pkl").write_bytes(data)
    with pytest.raises(UserError, match=r"meta\.pkl is not a plain pickle \((STACK_)?GLOBAL is not allowed"):
        vocabulary_of_data(tmp_path)
    assert not target.exists()
    pickle.loads(data)  # the control: a free unpickler does run it
    assert target.is_dir()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"not a pickle at all", id="text"),
        pytest.param(pickle.dumps(NANOGPT_META)[:-9], id="truncated"),
        pytest.param(pickle.dumps([NANOGPT_META]), id="list"),
        pytest.param(b"]" * 9 + b"2" * 9, id="opcode that is not plain"),
        pytest.param(pickle.dumps({"itos": b"ab"}), id="bytes"),
        pytest.param(b"}r\xff\xff\xff\x7f.", id="memo index that would take 32 GB"),
        pytest.param(b"}p-1\n.", id="negative memo index"),
        pytest.param(b"}j\x09\x00\x00\x00s.", id="memo entry that is not there"),
        pytest.param(b"}(}K\x00u.", id="unhashable key"),
        pytest.param(b"}s.", id="stack underflow"),
        pytest.param(b")" + b"\x85" * (4 * sys.getrecursionlimit()) + b".", id="deep tuple"),
        pytest.param(b"})" + b"\x85" * (4 * sys.getrecursionlimit()) + b"K\x00s.", id="deep tuple as a key"),
        pytest.param(b"]q\x00h\x00a.", id="list in itself"),
        pytest.param(b"\x80\xff}.", id="unknown protocol"),
        pytest.param(b"I" + b"9" * 5000 + b"\n.", id="endless integer"),
    ],
)
def test_a_malformed_pickle_is_a_users_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "meta.pkl").write_bytes(data)
    with pytest.raises(UserError, match=r"meta\.pkl (is not a plain pickle|has the keys \[\], expected itos and stoi)"):
        vocabulary_of_data(tmp_path)


def test_a_huge_pickle_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "meta.pkl").open("wb") as file:
        file.truncate(MAX_PICKLE_BYTES + 1)
    with pytest.raises(UserError, match=r"meta\.pkl has 16777217 bytes; at most 16777216"):
        vocabulary_of_data(tmp_path)
