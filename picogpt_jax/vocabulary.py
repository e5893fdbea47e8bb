"""A character vocabulary: text <-> uint16 ids, and the files that hold it (numpy only).

`picogpt_jax.tokenizer` has the other kind, GPT-2's byte-pair encoding.
"""

import dataclasses
import functools
import io
import os
import pickle
import pickletools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt

from picogpt_jax.errors import UserError
from picogpt_jax.files import read_json, write_json

MAX_SIZE = 1 << 16  # ids are stored as uint16
MAX_PICKLE_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """`itos[id]` is the character of token `id`.

    Raises:
        UserError: no entry or more than 65,536, or an entry that is not one distinct Unicode character.
    """

    itos: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.itos) <= MAX_SIZE:
            raise UserError(f"a vocabulary of {len(self.itos)} entries; 1 to {MAX_SIZE} fit in uint16 ids")
        seen: set[str] = set()
        for index, char in enumerate(self.itos):
            # Half a surrogate pair is a str in Python but no character, and no UTF-8 file can hold it.
            if not (isinstance(char, str) and len(char) == 1) or "\ud800" <= char <= "\udfff":
                raise UserError(f"vocabulary entry {index} is {ascii(char)[:80]}; expected a string of one character")
            if char in seen:
                raise UserError(f"vocabulary entry {index} is a second {_describe(char)}; expected distinct characters")
            seen.add(char)

    @property
    def size(self) -> int:
        return len(self.itos)

    @functools.cached_property
    def _ids_by_code_point(self) -> npt.NDArray[np.int32]:
        """For every Unicode code point its id, or -1."""
        table = np.full(sys.maxunicode + 1, -1, np.int32)
        table[[ord(char) for char in self.itos]] = np.arange(self.size)
        return table

    def encode(self, text: str, source: str = "the text") -> npt.NDArray[np.uint16]:
        """Returns the ids, uint16 [len(text)].

        Args:
            text: what to encode.
            source: where `text` comes from, for the error message, such as a flag's name.

        Raises:
            UserError: a character is not in the vocabulary.
        """
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = self._ids_by_code_point[code_points]
        unknown = ids < 0
        if unknown.any():
            position = int(unknown.argmax())
            raise UserError(
                f"{source} has the character {_describe(text[position])} at position {position}, which is not in the "
                f"vocabulary of {self.size}; leave it out, or train on a text that has it"
            )
        return ids.astype(np.uint16)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Returns the text of `ids`, integers [T].

        Raises:
            UserError: an id is not in [0, size).
        """
        return "".join([self.itos[value] for value in self._checked_ids(ids)])

    def _checked_ids(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> list[int]:
        values = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if values and not 0 <= min(values) <= max(values) < self.size:
            position = next(index for index, value in enumerate(values) if not 0 <= value < self.size)
            raise UserError(
                f"id {values[position]} at position {position} is outside the vocabulary of {self.size}; "
                "use the vocabulary that the ids were made with"
            )
        return values

    def n_characters(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> int:
        """How many characters the tokens `ids` stand for."""
        return len(ids)

    @property
    def default_prompt(self) -> str:
        """What to continue where nothing is asked for: a line break, or the first character where there is none."""
        return "\n" if "\n" in self.itos else self.itos[0]

    def require_text(self) -> None:
        """Raises a UserError where the ids stand for no text."""

    def fits(self, other: "Vocabulary") -> bool:
        """Whether the ids mean the same in both, as far as they tell: `TokenIds` agree with any of their number."""
        if isinstance(self, TokenIds) or isinstance(other, TokenIds):
            return self.size == other.size
        return self == other

    def to_json(self) -> dict[str, Any]:
        """Returns what `vocab.json` holds."""
        return {"type": "char", "itos": list(self.itos)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `vocab.json`, atomically."""
        write_json(path, self.to_json())

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Builds the vocabulary of all characters of `text`, in code point order.

        Raises:
            UserError: the text is empty or has more than 65,536 distinct characters.
        """
        return cls(tuple(sorted(set(text))))

    @classmethod
    def from_json(cls, value: Any, source: str) -> "Vocabulary":
        """Builds the vocabulary that a `vocab.json` or `meta.json` describes; other keys than these are not looked at.

        Returns:
            a character vocabulary, or a `TokenizerVocabulary` or `TokenIds` where `type` says so.

        Raises:
            UserError: it is not what `to_json` returns, or `vocab_size` contradicts `itos`; `source` is named.
        """
        if isinstance(value, dict) and value.get("type") == "tokenizer":
            from picogpt_jax.tokenizer import TokenizerVocabulary  # which is built on this class

            return TokenizerVocabulary.from_json(value, source)
        if isinstance(value, dict) and value.get("type") == "ids":
            return TokenIds.of_size(value.get("vocab_size"), source)
        if not isinstance(value, dict) or value.get("type") != "char" or not isinstance(value.get("itos"), list):
            raise UserError(f'{source} is not a character vocabulary; expected {{"type": "char", "itos": [...]}}')
        itos = value["itos"]
        if value.get("vocab_size", len(itos)) != len(itos):
            raise UserError(f"{source} has vocab_size {value['vocab_size']!r} but {len(itos)} entries in itos")
        try:
            return cls(tuple(itos))
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        """Reads a `vocab.json` or `meta.json`.

        Raises:
            UserError: the file is missing or is not a vocabulary.
        """
        return cls.from_json(read_json(path), str(path))

    @classmethod
    def from_data_dir(
        cls, data_dir: str | os.PathLike[str], size: int | None = None, token_ids: bool = True
    ) -> "Vocabulary":
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
            return cls.load(data_dir / "meta.json")
        if (data_dir / "meta.pkl").exists():
            return cls._from_pickle(data_dir / "meta.pkl")
        from picogpt_jax.tokenizer import TOKENIZER_FILE, read_tokenizer  # which is built on this class

        if (data_dir / TOKENIZER_FILE).exists():
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

    @classmethod
    def _from_pickle(cls, path: Path) -> "Vocabulary":
        meta = _load_plain_pickle(path)
        itos, stoi = (meta.get(key) if isinstance(meta, dict) else None for key in ("itos", "stoi"))
        if not isinstance(itos, dict) or not isinstance(stoi, dict):
            raise UserError(f"{path} is not nanoGPT's: expected the dicts itos and stoi; prepare the data again")
        if set(itos) != set(range(len(itos))):
            raise UserError(f"{path}: the ids of itos are not 0 to {len(itos) - 1}; prepare the data again")
        chars = [itos[index] for index in range(len(itos))]
        vocabulary = cls.from_json(
            {"type": "char", "itos": chars, "vocab_size": meta.get("vocab_size", len(chars))}, str(path)
        )
        if stoi != {char: index for index, char in enumerate(chars)}:
            raise UserError(f"{path}: stoi and itos contradict each other; prepare the data again")
        return vocabulary


@dataclasses.dataclass(frozen=True)
class TokenIds(Vocabulary):
    """Token ids without a text: token files whose tokenizer is not at hand. Such a model trains, but writes nothing."""

    def __post_init__(self) -> None:
        """The entries are all empty."""

    @classmethod
    def of_size(cls, size: Any, source: str) -> Self:
        if type(size) is not int or not 1 <= size <= MAX_SIZE:
            raise UserError(f"{source}: a vocabulary of {size!r} ids; 1 to {MAX_SIZE} fit in uint16 ids")
        return cls(("",) * size)

    def require_text(self) -> NoReturn:
        raise UserError(
            "the model was trained on token ids alone, without a tokenizer; put the tokenizer.json of its data into "
            "the workdir (and into data.dir, for what is trained from now on)"
        )

    def encode(self, text: str, source: str = "the text") -> npt.NDArray[np.uint16]:
        self.require_text()

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        self.require_text()

    @property
    def default_prompt(self) -> str:
        self.require_text()

    def to_json(self) -> dict[str, Any]:
        return {"type": "ids", "vocab_size": self.size}


def _describe(char: str) -> str:
    return f"{char!r} (U+{ord(char):04X})"


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
