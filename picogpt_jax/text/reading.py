"""Reads the files that hold a vocabulary: vocab.json, meta.json, nanoGPT's meta.pkl, tokenizer.json."""

import os
import pickletools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from picogpt_jax.errors import UserError, errors_in, reason
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
        raise UserError(f"{source} has vocab_size {value['vocab_size']!r:.40} but {len(itos)} entries in itos")
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
        return _from_pickle(data_dir / "meta.pkl", token_ids)
    if has_tokenizer(data_dir):
        return read_tokenizer(data_dir)
    if token_ids and (data_dir / "train.bin").is_file():
        if size is not None:
            return TokenIds.of_size(size, f"{data_dir} with model.vocab_size={size}")
        raise UserError(
            f"{data_dir} has token files but no vocabulary (meta.json or nanoGPT's meta.pkl); put the "
            "tokenizer.json of a byte-pair encoding there, or give --config.model.vocab_size"
        )
    way_out = f"looked in {data_dir.absolute()}; give the full path of a folder that a data/*/prepare.py has written"
    if (data_dir / "prepare.py").exists():
        way_out = f"make it with: python {shlex.quote(str(data_dir / 'prepare.py'))}"
    raise UserError(f"{data_dir} has no meta.json (nor nanoGPT's meta.pkl); {way_out}")


def _from_pickle(path: Path, token_ids: bool) -> Vocabulary:
    """nanoGPT's: itos and stoi, characters both ways; or vocab_size alone, the number of token ids without a text."""
    meta = _plain_pickle(path)
    keys = list(meta) if isinstance(meta, dict) else []
    itos, stoi, size = (meta.get(key) if keys else None for key in ("itos", "stoi", "vocab_size"))
    if keys == ["vocab_size"] and type(size) is int and token_ids:
        return TokenIds.of_size(size, str(path))
    way_on = (
        "prepare the text by characters with data/text_char/prepare.py, or move meta.pkl away and give "
        "--config.model.vocab_size to train on the token ids alone"
    )
    if isinstance(itos, list):
        itos = dict(enumerate(itos))
    if not isinstance(itos, dict) or not isinstance(stoi, dict):
        raise UserError(f"{path} has the keys {ascii(keys)[:60]}, expected itos and stoi; {way_on}")
    chars: list[Any] = [itos.get(index) for index in range(len(itos))]
    words = [char for char in chars if isinstance(char, str) and len(char) > 1]
    if words:
        raise UserError(f"{path} has tokens of several characters, such as {ascii(words[0])[:30]}; {way_on}")
    with errors_in(path):
        vocabulary = Vocabulary(tuple(chars))
    if stoi != {char: index for index, char in enumerate(chars)} or size not in (None, len(chars)):
        raise UserError(f"{path}: itos, stoi and vocab_size contradict each other; {way_on}")
    return vocabulary


def _plain_pickle(path: Path) -> Any:
    """Reads a pickle of dicts, lists, tuples, strings, numbers, True, False and None; nothing of it is executed.

    Raises:
        UserError: it holds anything else.
    """
    try:
        if path.stat().st_size > MAX_PICKLE_BYTES:
            raise UserError(f"{path} has {path.stat().st_size} bytes; at most {MAX_PICKLE_BYTES} were expected")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        return _unpickled(data)
    except Exception as error:  # a malformed pickle may raise anything: ValueError, IndexError, KeyError, ...
        raise UserError(f"{path} is not a plain pickle ({reason(error)}); prepare the text again") from None


_STRINGS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE"}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": list}
_TAKES = {"SETITEM": 2, "APPEND": 1, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}  # so many of the newest items
_TAKES_TO_MARK = {"DICT", "LIST", "TUPLE", "SETITEMS", "APPENDS"}


def _unpickled(data: bytes) -> Any:
    """The value of a pickle, with tuples as lists.

    Python's own unpickler imports and calls, makes its memo as long as the file says, and overflows the C stack on a
    deep tuple that is a key.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _STRINGS | _NUMBERS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _TAKES or name in _TAKES_TO_MARK:
            at = len(stack) - _TAKES[name] if name in _TAKES else marks.pop()
            items, stack[at:] = stack[at:], [{}] if name == "DICT" else []
            if name in ("DICT", "SETITEM", "SETITEMS"):
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            elif name in ("APPEND", "APPENDS"):
                stack[-1].extend(items)
            else:
                stack.append(items)
        elif name == "MEMOIZE" or name.endswith("PUT"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"{name} is not allowed; only dicts, lists, tuples, strings and numbers are read")
    return stack[-1]
