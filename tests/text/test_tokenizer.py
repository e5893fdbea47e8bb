"""Vocabularies from tokenizer.json: byte pairs as the library computes them, characters without it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from picogpt_jax.errors import UserError
from picogpt_jax.text.reading import load_vocabulary, vocabulary_from_json, vocabulary_of_data
from picogpt_jax.text.tokenizer import TokenizerVocabulary, has_tokenizer, read_tokenizer
from picogpt_jax.text.vocabulary import Vocabulary

TEXT = "the quick brown fox, the lazy dog\nand then\tthe théâtre: 猫 🦊 <|endoftext|> x"


def byte_level_bpe() -> dict[str, Any]:
    """GPT-2's kind of tokenizer, small: 256 bytes, 20 merges, one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=277,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox and then the other"] * 4, trainer)
    return json.loads(tokenizer.to_str())


DEFINITION = byte_level_bpe()
SIZE = 277


def write(folder: Path, definition: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


@pytest.fixture
def vocabulary(tmp_path: Path) -> Vocabulary:
    return read_tokenizer(write(tmp_path, DEFINITION))


def test_text_becomes_the_tokens_of_the_library_and_text_again(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode(TEXT)
    assert ids.dtype == np.uint16
    assert ids.tolist() == Tokenizer.from_str(json.dumps(DEFINITION)).encode(TEXT).ids
    assert len(ids) < len(TEXT.encode()), "merges are applied"
    assert vocabulary.decode(ids) == TEXT
    assert vocabulary.decode(ids.tolist()) == TEXT
    assert vocabulary.bits_unit(ids) == ("bits_per_char", len(ids) / len(TEXT))
    assert (vocabulary.size, vocabulary.default_prompt) == (SIZE, "\n")


def test_settings_that_cut_or_pad_a_text_are_undone(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(DEFINITION))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=100)
    vocabulary = read_tokenizer(write(tmp_path, json.loads(tokenizer.to_str())))
    assert vocabulary.decode(vocabulary.encode(TEXT)) == TEXT


def test_it_travels_as_json(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "vocab.json")
    again = load_vocabulary(tmp_path / "vocab.json")
    assert again == vocabulary
    assert isinstance(again, TokenizerVocabulary)
    (tmp_path / "meta.json").write_text(json.dumps({**vocabulary.to_json(), "dataset": "x"}))
    assert vocabulary_of_data(tmp_path) == vocabulary


def test_a_vocabulary_ends_with_its_last_token(tmp_path: Path) -> None:
    """Whatever the table of the model has room for; older files count its rows."""
    vocabulary = read_tokenizer(write(tmp_path, DEFINITION))
    assert vocabulary.size == SIZE
    with pytest.raises(UserError, match="a file has vocab_size 276, but a token of the id 276"):
        vocabulary_from_json(vocabulary.to_json() | {"vocab_size": 276}, "a file")
    older = vocabulary.to_json() | {"vocab_size": 320}
    assert vocabulary_from_json(older, "a file") == vocabulary
    added = {**DEFINITION["added_tokens"][0], "content": "<|late|>", "id": 300}
    definition = changed(added_tokens=[*DEFINITION["added_tokens"], added])
    gap = read_tokenizer(write(tmp_path, definition))
    assert gap.size == 301
    assert gap.decode([*gap.encode("the"), 299, *gap.encode("fox")]) == "thefox"
    with pytest.raises(UserError, match="id 301 at position 0 is outside the vocabulary of 301"):
        gap.decode([301])


def test_what_no_token_stands_for_is_refused(tmp_path: Path) -> None:
    definition = json.loads(json.dumps(DEFINITION))
    model = definition["model"]
    model["vocab"]["unused"] = model["vocab"].pop("x")  # a byte that is no token
    vocabulary = read_tokenizer(write(tmp_path, definition))
    assert vocabulary.decode(vocabulary.encode("the fo")) == "the fo"
    with pytest.raises(UserError, match="--start holds characters that the tokenizer cannot represent"):
        vocabulary.encode("the fox!", "--start")


def characters(vocab: dict[str, int], **changes: Any) -> dict[str, Any]:
    model = {"type": "BPE", "unk_token": "[none]", "vocab": vocab, "merges": [], **changes}
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor")
    return {"version": "1.0", "added_tokens": [], "decoder": {"type": "Fuse"}, "model": model} | dict.fromkeys(names)


def test_byte_pairs_without_merges_are_characters(tmp_path: Path) -> None:
    vocab = {"\n": 0, " ": 1, "é": 3, "猫": 2}
    Tokenizer.from_str(json.dumps(characters(vocab)))  # the control: the library reads it
    vocabulary = read_tokenizer(write(tmp_path, characters(vocab)))
    assert vocabulary == Vocabulary(("\n", " ", "猫", "é"))
    assert vocabulary.to_json()["type"] == "char"


def test_characters_need_no_library(tmp_path: Path) -> None:
    write(tmp_path, characters({"a": 0, "b": 1}))
    code = "import sys; sys.modules['tokenizers'] = None; from picogpt_jax.text.tokenizer import read_tokenizer; "
    code += "print(read_tokenizer(sys.argv[1]).encode('ba').tolist()); "
    code += "from picogpt_jax.text.tokenizer import TokenizerVocabulary as T; T(('a',), '{}').encode('a')"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[1, 0]\n"
    assert "ImportError: this vocabulary needs tokenizers; install it with: pip install" in done.stderr


PREFIX_SPACE = DEFINITION["pre_tokenizer"] | {"add_prefix_space": True}


def changed(**changes: Any) -> dict[str, Any]:
    return DEFINITION | changes


def with_model(**changes: Any) -> dict[str, Any]:
    return DEFINITION | {"model": DEFINITION["model"] | changes}


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ([], "is no tokenizer.json: model is NoneType"),
        ({}, "is no tokenizer.json: model is NoneType"),
        (changed(model=None), "is no tokenizer.json: model is NoneType; expected a dict"),
        (with_model(type="Unigram"), "model is 'Unigram'; expected 'BPE'"),
        (changed(pre_tokenizer={"type": "Split"}), "pre_tokenizer is 'Split'; expected 'ByteLevel'"),
        (changed(decoder=None), "decoder is NoneType; expected a dict"),
        (changed(normalizer={"type": "Lowercase"}), "normalizer is .*Lowercase.*; set it to null there"),
        (with_model(dropout=0.1), r"dropout is 0.1: no text comes back as it was; set it to null"),
        (with_model(end_of_word_suffix="</w>"), "end_of_word_suffix is .*; set it to null"),
        (changed(pre_tokenizer=PREFIX_SPACE), "add_prefix_space is true: .*; set it to false"),
        (with_model(vocab=[]), "is no tokenizer.json: vocab is list; expected a dict"),
        (with_model(vocab={"a": 0, "b": 0}), "token 'b' has the id 0; expected distinct ids below 65536"),
        (with_model(vocab={"a": 65536}), "token 'a' has the id 65536; expected distinct"),
        (with_model(vocab={"a": -1}), "token 'a' has the id -1"),
        (with_model(vocab={"a": 1.0}), "token 'a' has the id 1.0"),
        (with_model(vocab={"a": True}), "token 'a' has the id True"),
        (with_model(vocab={str(i): i for i in range(65537)}), "token '65536' has the id 65536"),
        (with_model(merges=["a"]), r"the tokenizer is damaged \("),
        (with_model(merges=[["no", "such"]]), r"the tokenizer is damaged \("),
        (changed(added_tokens=[3]), "added_tokens is not a list of tokens"),
        (changed(added_tokens=[{"id": 3, "content": ["x"]}]), "added_tokens is not a list of tokens"),
        (changed(added_tokens=[{"id": 3, "content": "x"}]), "has the id|is damaged"),
        (characters({"ab": 0}), "entry 0 is 'ab'; expected a string of one character"),
        (characters({"a": 1}), "entry 0 is ''; expected a string of one character"),
        (characters({}), "has no tokens"),
    ],
)
def test_another_tokenizer_is_refused(tmp_path: Path, definition: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_tokenizer(write(tmp_path, definition))


@pytest.mark.parametrize("value", [{"type": "tokenizer"}, {"type": "tokenizer", "vocab_size": "3", "tokenizer": {}}])
def test_a_wrong_vocab_json_is_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"vocab.json is no tokenizer; expected \{\"type\": \"tokenizer\""):
        load_vocabulary(tmp_path / "vocab.json")


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.json does not exist"):
        read_tokenizer(tmp_path)


# ---------------------------------------------------------------------------------------------- vocab.json, merges.txt


def write_older_files(folder: Path, **others: Any) -> Path:
    """As GPT-2's tokenizer was published, before there was tokenizer.json; `others`: further JSON files."""
    model = DEFINITION["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]) + "\n")
    for name, value in others.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_gpt2s_own_files_make_the_same_tokenizer(tmp_path: Path, vocabulary: Vocabulary) -> None:
    folder = tmp_path / "older"
    folder.mkdir()
    assert not has_tokenizer(folder)
    older = read_tokenizer(write_older_files(folder))
    assert has_tokenizer(folder)
    assert older.encode(TEXT).tolist() == vocabulary.encode(TEXT).tolist()
    assert older.decode(older.encode(TEXT)) == TEXT
    assert older.itos == vocabulary.itos
    assert vocabulary_of_data(folder) == older


def test_added_tokens_follow_gpt2s_own(tmp_path: Path) -> None:
    vocabulary = read_tokenizer(write_older_files(tmp_path, added_tokens={"<pad>": 278, "<sep>": 277}))
    assert vocabulary.encode("fox<pad><sep>").tolist() == [*vocabulary.encode("fox"), 278, 277]
    with pytest.raises(UserError, match=r"the ids of added_tokens.json do not follow those of vocab.json"):
        read_tokenizer(write_older_files(tmp_path, added_tokens={"<pad>": 300}))


def test_damaged_or_lossy_older_files_are_refused(tmp_path: Path) -> None:
    write_older_files(tmp_path, tokenizer_config={"add_prefix_space": True})
    with pytest.raises(UserError, match=r"add_prefix_space is true"):
        read_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("no such merge")
    with pytest.raises(UserError, match=r"vocab.json and merges.txt are damaged \("):
        read_tokenizer(tmp_path)
    (write_older_files(tmp_path) / "vocab.json").write_text('{"a": 0, "b": 10000000}')  # bytes of memory, times four
    with pytest.raises(UserError, match=r"token 'b' has the id 10000000; expected distinct ids below 65536"):
        read_tokenizer(tmp_path)
