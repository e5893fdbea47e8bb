"""Vocabularies from Hugging Face's `tokenizer.json`: GPT-2's byte-pair encoding, or characters (extra: huggingface).

Two kinds are read. GPT-2's byte-level BPE is encoded by the library `tokenizers`. Byte pairs without merges are how a
character vocabulary is exported: they become a character vocabulary again, and need no library.
In vocab.json and meta.json a BPE is `{"type": "tokenizer", "vocab_size": 50257, "tokenizer": <tokenizer.json>}`.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from picogpt_jax.errors import UserError, errors_in, reason
from picogpt_jax.files import read_json
from picogpt_jax.text.vocabulary import MAX_SIZE, Vocabulary

TOKENIZER_FILE = "tokenizer.json"
OLDER_FILES = ("vocab.json", "merges.txt")  # GPT-2's own, which tokenizer.json came after
END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class TokenizerVocabulary(Vocabulary):
    """A byte-level BPE vocabulary.

    Attributes:
        itos: token id -> its name in tokenizer.json, where a byte is a letter; "" for an id that it leaves out. The
            last one is a token: further rows of a model's table stand for nothing.
        definition: the contents of tokenizer.json.

    Raises:
        UserError: `from_json` and `from_definition`: it is no byte-level BPE.
    """

    definition: str

    def __post_init__(self) -> None:
        """The entries are checked where they are made, from the definition."""

    @functools.cached_property
    def _tokenizer(self) -> Any:
        library = _library()
        try:
            tokenizer = library.Tokenizer.from_str(self.definition)
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"the tokenizer is damaged ({reason(error)}); save it again with tokenizers") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def encode(self, text: str, source: str = "the text", first: int = 0) -> npt.NDArray[np.uint16]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self.decode(ids) != text:  # a byte that is no token would vanish without a word
            raise UserError(f"{source} holds characters that the tokenizer cannot represent; leave them out")
        return np.asarray(ids, np.uint16)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        return self._tokenizer.decode(self._checked_ids(ids), skip_special_tokens=False)

    def bits_unit(self, ids: npt.NDArray[np.integer]) -> tuple[str, float]:
        return "bits_per_char", len(ids) / len(self.decode(ids))

    @property
    def default_prompt(self) -> str:
        return "\n"

    def to_json(self) -> dict[str, Any]:
        return {"type": "tokenizer", "vocab_size": self.size, "tokenizer": json.loads(self.definition)}

    @classmethod
    def from_json(cls, value: Any, source: str) -> Self:
        if not isinstance(value, dict) or value.get("type") != "tokenizer" or type(value.get("vocab_size")) is not int:
            raise UserError(f'{source} is no tokenizer; expected {{"type": "tokenizer", "vocab_size": ..., ...}}')
        vocabulary, size = cls.from_definition(value.get("tokenizer"), source), value["vocab_size"]
        if size < vocabulary.size:  # older files count the rows of the model's table, which may be more
            raise UserError(f"{source} has vocab_size {size}, but a token of the id {vocabulary.size - 1}")
        return vocabulary

    @classmethod
    def from_definition(cls, definition: Any, source: str) -> Self:
        """Builds the vocabulary of a byte-level BPE from the contents of a tokenizer.json; `source` is for messages."""
        model = _section(definition, "model", source)
        for name, expected in (("pre_tokenizer", "ByteLevel"), ("decoder", "ByteLevel"), ("model", "BPE")):
            found = _section(definition, name, source).get("type")
            if found != expected:
                raise UserError(
                    f"{source}: {name} is {found!r:.60}; expected {expected!r}, as GPT-2's tokenizer has it"
                )
        places = {"normalizer": definition, "add_prefix_space": definition["pre_tokenizer"]}
        places |= dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix"), model)
        for name, section in places.items():
            if value := section.get(name):
                found, neutral = json.dumps(value)[:60], "false" if value is True else "null"
                raise UserError(f"{source}: {name} is {found}: no text comes back as it was; set it to {neutral} there")
        ids = dict(_section(model, "vocab", source))
        ids |= {token["content"]: token.get("id") for token in _added_tokens(definition, source)}
        vocabulary = cls(_table(ids, source), json.dumps(definition, sort_keys=True))
        if vocabulary._tokenizer.get_vocab_size() != len(ids):
            raise UserError(f"{source}: it lists {len(ids)} tokens and has another number; save it again")
        return vocabulary


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether there is a `tokenizer.json`, or GPT-2's vocab.json and merges.txt."""
    older = all((Path(folder) / name).is_file() for name in OLDER_FILES)
    return older or (Path(folder) / TOKENIZER_FILE).is_file()


def read_tokenizer(folder: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary of a folder's `tokenizer.json`, or of its vocab.json and merges.txt.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    path = Path(folder) / TOKENIZER_FILE
    older = has_tokenizer(folder) and not path.is_file()
    definition, source = (_of_older_files(folder), str(folder)) if older else (read_json(path), str(path))
    model = _section(definition, "model", source)
    only_padding = all(token.get("special") for token in _added_tokens(definition, source))
    plain = only_padding and not (definition.get("pre_tokenizer") or definition.get("normalizer"))
    if plain and model.get("type") == "BPE" and model.get("merges") == []:
        table = _table(_section(model, "vocab", source), source)
        with errors_in(source):
            return Vocabulary(table)
    return TokenizerVocabulary.from_definition(definition, source)


def _of_older_files(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer.json that transformers makes of GPT-2's own files."""
    library = _library()
    vocab = {"vocab": read_json(Path(folder) / OLDER_FILES[0])}
    _table(_section(vocab, "vocab", str(folder)), str(folder))  # the library counts to the largest id
    optional = (Path(folder) / name for name in ("added_tokens.json", "tokenizer_config.json"))
    added, settings = (read_json(path) if path.is_file() else {} for path in optional)
    prefix = settings.get("add_prefix_space", False) if isinstance(settings, dict) else False
    try:
        model = library.models.BPE.from_file(*(str(Path(folder) / name) for name in OLDER_FILES))
        tokenizer = library.Tokenizer(model)
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        tokenizer.decoder = library.decoders.ByteLevel()
        ids = {END_OF_TEXT: tokenizer.token_to_id(END_OF_TEXT)} | added
        tokenizer.add_special_tokens(sorted((token for token in ids if ids[token] is not None), key=ids.__getitem__))
    except Exception as error:  # the library raises nothing more special
        raise UserError(
            f"{folder}: {' and '.join(OLDER_FILES)} are damaged ({reason(error)}); download them again"
        ) from None
    if any(tokenizer.token_to_id(token) != index for token, index in ids.items()):
        raise UserError(f"{folder}: the ids of added_tokens.json do not follow those of vocab.json; download it again")
    return json.loads(tokenizer.to_str())


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "this vocabulary needs tokenizers; install it with: pip install 'picogpt_jax[huggingface]'"
        ) from error
    return tokenizers


def _section(definition: Any, name: str, source: str) -> dict[str, Any]:
    section = definition.get(name) if isinstance(definition, dict) else None
    if not isinstance(section, dict):
        raise UserError(f"{source} is no tokenizer.json: {name} is {type(section).__name__}; expected a dict")
    return section


def _added_tokens(definition: Any, source: str) -> list[dict[str, Any]]:
    added = definition.get("added_tokens") or []
    is_list = isinstance(added, list) and all(isinstance(token, dict) for token in added)
    if not is_list or not all(isinstance(token.get("content"), str) for token in added):
        raise UserError(f"{source}: added_tokens is not a list of tokens")
    return added


def _table(ids: dict[Any, Any], source: str) -> tuple[str, ...]:
    """Token id -> token, or "" where there is none; every id distinct."""
    table: dict[int, str] = {}
    for token, index in ids.items():
        if not isinstance(token, str) or type(index) is not int or not 0 <= index < MAX_SIZE or index in table:
            found = f"token {ascii(token)[:80]} has the id {index!r:.40}"
            raise UserError(f"{source}: {found}; expected distinct ids below {MAX_SIZE}")
        table[index] = token
    if not table:
        raise UserError(f"{source} has no tokens; save it again")
    return tuple(table.get(index, "") for index in range(max(table) + 1))
