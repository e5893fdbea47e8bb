"""Vocabularies from Hugging Face's `tokenizer.json`: GPT-2's byte-pair encoding, or characters (extra: huggingface).

Two kinds are read. Byte-level BPE, which is GPT-2's: text -> bytes -> the longest known byte strings, by the library
`tokenizers`. And byte pairs without merges, which is how a character vocabulary is exported: that one becomes a
character vocabulary again and needs no library.

A BPE vocabulary travels as the others do, in `vocab.json`, in checkpoints and in `meta.json`, as
`{"type": "tokenizer", "vocab_size": 50257, "tokenizer": <the contents of tokenizer.json>}`.
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

from picogpt_jax.errors import UserError, errors_in
from picogpt_jax.files import read_json
from picogpt_jax.text.vocabulary import MAX_SIZE, Vocabulary

TOKENIZER_FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class TokenizerVocabulary(Vocabulary):
    """A byte-level BPE vocabulary.

    Attributes:
        itos: token id -> its name in tokenizer.json, where a byte is a letter; "" for an id that it leaves out. The
            last one is a token: further rows of a model's table stand for nothing.
        definition: the contents of tokenizer.json.

    Raises:
        UserError: `from_json` and `from_definition`: it is no byte-level BPE, or does not fit into its size.
    """

    definition: str

    def __post_init__(self) -> None:
        """The entries are checked where they are made, from the definition."""

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(
                "this vocabulary needs tokenizers; install it with: pip install 'picogpt_jax[huggingface]'"
            ) from error
        try:
            tokenizer = Tokenizer.from_str(self.definition)
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"the tokenizer is damaged ({error}); save it again with tokenizers") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def encode(self, text: str, source: str = "the text") -> npt.NDArray[np.uint16]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self.decode(ids) != text:  # a byte that is no token would vanish without a word
            raise UserError(f"{source} holds characters that the tokenizer cannot represent; leave them out")
        return np.asarray(ids, np.uint16)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        return self._tokenizer.decode(self._checked_ids(ids), skip_special_tokens=False)

    def n_characters(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> int:
        return len(self.decode(ids))

    @property
    def default_prompt(self) -> str:
        return "\n"

    def to_json(self) -> dict[str, Any]:
        return {"type": "tokenizer", "vocab_size": self.size, "tokenizer": json.loads(self.definition)}

    @classmethod
    def from_json(cls, value: Any, source: str) -> Self:
        if not isinstance(value, dict) or value.get("type") != "tokenizer" or type(value.get("vocab_size")) is not int:
            raise UserError(f'{source} is no tokenizer; expected {{"type": "tokenizer", "vocab_size": ..., ...}}')
        return cls.from_definition(value.get("tokenizer"), value["vocab_size"], source)

    @classmethod
    def from_definition(cls, definition: Any, size: int | None, source: str) -> Self:
        """Builds the vocabulary of a byte-level BPE.

        Args:
            definition: the contents of tokenizer.json.
            size: of the model's table: at least the tokenizer's, which is what None stands for.
            source: for the error message.
        """
        model = _section(definition, "model", source)
        for name, expected in (("pre_tokenizer", "ByteLevel"), ("decoder", "ByteLevel"), ("model", "BPE")):
            found = _section(definition, name, source).get("type")
            if found != expected:
                raise UserError(f"{source}: {name} is {found!r}; expected {expected!r}, as GPT-2's tokenizer has it")
        if definition.get("normalizer") is not None or model.get("dropout") is not None:
            raise UserError(f"{source}: a normalizer, or BPE dropout, changes the text; expected neither")
        ids = dict(_vocab(model, source))
        added = definition.get("added_tokens") or []
        is_list = isinstance(added, list) and all(isinstance(token, dict) for token in added)
        if not is_list or not all(isinstance(token.get("content"), str) for token in added):
            raise UserError(f"{source}: added_tokens is not a list of tokens")
        ids |= {token["content"]: token.get("id") for token in added}
        itos = _table(ids, size, source)[: max(ids.values()) + 1]
        vocabulary = cls(itos, json.dumps(definition, sort_keys=True))
        if vocabulary._tokenizer.get_vocab_size() != len(ids):
            raise UserError(f"{source}: it lists {len(ids)} tokens and has another number; save it again")
        return vocabulary


def read_tokenizer(folder: str | os.PathLike[str], size: int | None) -> Vocabulary:
    """The vocabulary of a folder's `tokenizer.json`.

    Args:
        size: of the model's table of tokens; None: as large as the tokenizer needs.

    Raises:
        UserError: the file is missing, damaged, of another kind, or does not fit into `size`.
    """
    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {TOKENIZER_FILE}; save one there with transformers' save_pretrained")
    definition, source = read_json(path), str(path)
    model = _section(definition, "model", source)
    plain = not any(definition.get(name) for name in ("pre_tokenizer", "normalizer", "added_tokens"))
    if plain and model.get("type") == "BPE" and model.get("merges") == []:
        vocab = _vocab(model, source)
        with errors_in(source):
            return Vocabulary(_table(vocab, len(vocab), source))
    return TokenizerVocabulary.from_definition(definition, size, source)


def _section(definition: Any, name: str, source: str) -> dict[str, Any]:
    section = definition.get(name) if isinstance(definition, dict) else None
    if not isinstance(section, dict):
        raise UserError(f"{source} is no tokenizer.json: {name} is {type(section).__name__}; expected a dict")
    return section


def _vocab(model: dict[str, Any], source: str) -> dict[str, Any]:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        raise UserError(f"{source}: model.vocab is {type(vocab).__name__}; expected a dict")
    return vocab


def _table(ids: dict[Any, Any], size: int | None, source: str) -> tuple[str, ...]:
    """Token id -> token; every id distinct and below `size`."""
    size = len(ids) if size is None else size
    if not 1 <= len(ids) <= size <= MAX_SIZE:
        raise UserError(
            f"{source} has {len(ids)} tokens, the model {size}; expected no more than these, nor {MAX_SIZE}"
        )
    table = [""] * size
    for token, index in ids.items():
        if not isinstance(token, str) or type(index) is not int or not 0 <= index < size or table[index]:
            raise UserError(
                f"{source}: token {ascii(token)[:80]} has the id {index!r}; expected distinct ids below {size}"
            )
        table[index] = token
    return tuple(table)
