"""Reads the files that hold a vocabulary: vocab.json, meta.json, nanoGPT's meta.pkl, tokenizer.json."""

import io
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any, NoReturn

from picogpt_jax.errors import UserError, errors_in
from picogpt_jax.files import read_json
from picogpt_jax.text.tokenizer import TokenizerVocabulary, has_tokenizer, read_tokenizer
from picogpt_jax.text.vocabulary import TokenIds, Vocabulary

MAX_PICKLE_BYTES = 16 << 20


def vocabulary_from_json(value: Any, source: str) -> Vocabulary:
    """Builds the vocabulary that a `vocab.json` or `meta.json` describes; other keys than these are not looked at.

    Returns:
        a character vocabulary, or a `TokenizerVocabulary` or `TokenIds` where `type` says so.

    Raises:
        UserError: it is not what `to_json` returns, or `vocab_size` contradicts `itos`; `source` is named.
    """
    if isinstance(value, dict) and value.get("type") == "tokenizer":
        return TokenizerVocabulary.from_json(value, source)
    if isinstance(value, dict) and value.get("type") == "ids":
        return TokenIds.of_size(value.get("vocab_size"), source)
    if not isinstance(value, dict) or value.get("type") != "char" or not isinstance(value.get("itos"), list):
        raise UserError(f'{source} is not a character vocabulary; expected {{"type": "char", "itos": [...]}}')
    itos = value["itos"]
    if value.get("vocab_size", len(itos)) != len(itos):
        raise UserError(f"{source} has vocab_size {value['vocab_size']!r} but {len(itos)} entries in itos")
    with errors_in(source):
        return Vocabulary(tuple(itos))


def load_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """Reads a `vocab.json` or `meta.json`.

    Raises:
        UserError: the file is missing or is not a vocabulary.
    """
    return vocabulary_from_json(read_json(path), str(path))


def vocabulary_of_data(data_dir: str | os.PathLike[str], size: int | None = None, token_ids: bool = True) -> Vocabulary:
    """Reads the vocabulary of a prepared data set: `meta.json`, nanoGPT's `meta.pkl`, or `tokenizer.json`.

    Args:
        size: of the model's table; where it is given, a folder of token files alone (nanoGPT's GPT-2 data) has
            that many token ids, and no text.
        token_ids: whether that will do; False where the folder is to tell the text.

    Raises:
        UserError: none of these is there, or it is not a vocabulary.
    """
    data_dir = Path(data_dir)
    if (data_dir / "meta.json").exists():
        return load_vocabulary(data_dir / "meta.json")
    if (data_dir / "meta.pkl").exists():
        return _from_pickle(data_dir / "meta.pkl")
    if has_tokenizer(data_dir):
        return read_tokenizer(data_dir, size)
    only_tokens = token_ids and (data_dir / "train.bin").is_file()
    if only_tokens and size is not None:
        return TokenIds.of_size(size, f"{data_dir} with model.vocab_size={size}")
    if only_tokens:
        raise UserError(
            f"{data_dir} has token files but no vocabulary (meta.json or nanoGPT's meta.pkl); put the "
            "tokenizer.json of a byte-pair encoding there, or give --config.model.vocab_size"
        )
    own_script = data_dir / "prepare.py"
    command = own_script if own_script.exists() else f"data/NAME/prepare.py --out_dir={data_dir}"
    raise UserError(f"{data_dir} has no meta.json (nor nanoGPT's meta.pkl); make it with: python {command}")


def _from_pickle(path: Path) -> Vocabulary:
    meta = _load_plain_pickle(path)
    itos, stoi = (meta.get(key) if isinstance(meta, dict) else None for key in ("itos", "stoi"))
    if not isinstance(itos, dict) or not isinstance(stoi, dict):
        raise UserError(f"{path} is not nanoGPT's: expected the dicts itos and stoi; prepare the data again")
    if set(itos) != set(range(len(itos))):
        raise UserError(f"{path}: the ids of itos are not 0 to {len(itos) - 1}; prepare the data again")
    chars = [itos[index] for index in range(len(itos))]
    vocabulary = vocabulary_from_json(
        {"type": "char", "itos": chars, "vocab_size": meta.get("vocab_size", len(chars))}, str(path)
    )
    if stoi != {char: index for index, char in enumerate(chars)}:
        raise UserError(f"{path}: stoi and itos contradict each other; prepare the data again")
    return vocabulary


# Everything that a dict of dicts of strings and integers needs, at any protocol; nothing that imports or calls. Tuples
# are left out on purpose: hashing a deeply nested one overflows the C stack.
_PLAIN_OPCODES = frozenset(
    {
        *("PROTO", "FRAME", "MARK", "STOP", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"),
        *("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"),
    }
)


class _PlainUnpickler(pickle.Unpickler):
    """A second line of defence behind `_PLAIN_OPCODES`: no name is ever looked up."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _load_plain_pickle(path: Path) -> Any:
    """Reads a pickle of dicts, strings and integers; anything else is a `UserError`, and nothing of it is executed."""
    try:
        if path.stat().st_size > MAX_PICKLE_BYTES:
            raise UserError(f"{path} has {path.stat().st_size} bytes; at most {MAX_PICKLE_BYTES} were expected")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in _PLAIN_OPCODES:
                raise pickle.UnpicklingError(f"{opcode.name} is not allowed; only dicts, strings and integers are read")
            if "PUT" in opcode.name and (argument or 0) > len(data):  # the memo is an array: this would fill the memory
                raise pickle.UnpicklingError(f"memo index {argument}")
        return _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a malformed pickle may raise anything: EOFError, IndexError, MemoryError, ...
        raise UserError(f"{path} is not a plain pickle ({error}); prepare the data again") from None
