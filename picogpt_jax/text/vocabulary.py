"""A character vocabulary: text <-> uint16 ids (numpy only).

`text.tokenizer` has the other kind, GPT-2's byte-pair encoding; `text.reading` reads the files that hold either.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt

from picogpt_jax.errors import UserError
from picogpt_jax.files import write_json

MAX_SIZE = 1 << 16  # ids are stored as uint16


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
                found = ascii(char)[:80] if isinstance(char, str) else f"a {type(char).__name__}"
                raise UserError(f"vocabulary entry {index} is {found}; expected a string of one character")
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

    def encode(self, text: str, source: str = "the text", first: int = 0) -> npt.NDArray[np.uint16]:
        """Returns the ids, uint16 [len(text)].

        Args:
            text: what to encode.
            source: where `text` comes from, for the error message, such as a flag's name.
            first: the position of `text` there.

        Raises:
            UserError: a character is not in the vocabulary.
        """
        ids = self._ids_by_code_point[code_points(text)]
        unknown = ids < 0
        if unknown.any():
            position = int(unknown.argmax())
            char, way_out = text[position], "leave it out, or train on a text that has it"
            if source == "--start" and char == "\\":
                way_out = (
                    r"bash makes a line break of --start=$'ROMEO:\n'; or put the text into a file: --start=FILE:PATH"
                )
            elif char == "\r":
                way_out = r"the line breaks are Windows': take them from the file with tr -d '\r'"
            raise UserError(
                f"{source} has the character {_describe(char)} at position {first + position}, which is not in the "
                f"vocabulary of {self.size}; {way_out}"
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

    def bits_unit(self, ids: npt.NDArray[np.integer]) -> tuple[str, float]:
        """What losses are told in, beside nats per token: its name, and how many tokens of `ids` make one."""
        return "bits_per_char", 1.0

    @property
    def default_prompt(self) -> str:
        """What to continue where nothing is asked for: a line break, or the first character where there is none."""
        return "\n" if "\n" in self.itos else self.itos[0]

    def require_text(self) -> None:
        """Raises a UserError where the ids stand for no text."""

    def fits(self, other: "Vocabulary") -> bool:
        """Whether the ids mean the same in both, as far as they tell: `TokenIds` agree with any that is no larger."""
        if isinstance(other, TokenIds):
            return self.size <= other.size
        return other.size <= self.size if isinstance(self, TokenIds) else self == other

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


@dataclasses.dataclass(frozen=True)
class TokenIds(Vocabulary):
    """Token ids without a text: token files whose tokenizer is not at hand. Such a model trains, but writes nothing."""

    def __post_init__(self) -> None:
        """The entries are all empty."""

    @classmethod
    def of_size(cls, size: Any, source: str) -> Self:
        if type(size) is not int or not 1 <= size <= MAX_SIZE:
            raise UserError(f"{source}: a vocabulary of {size!r:.40} ids; 1 to {MAX_SIZE} fit in uint16 ids")
        return cls(("",) * size)

    def require_text(self) -> NoReturn:
        raise UserError(
            "the model was trained on token ids alone, without a tokenizer; put the tokenizer.json of its data into "
            "the workdir (and into data.dir, for what is trained from now on)"
        )

    def encode(self, text: str, source: str = "the text", first: int = 0) -> npt.NDArray[np.uint16]:
        self.require_text()

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        self.require_text()

    def bits_unit(self, ids: npt.NDArray[np.integer]) -> tuple[str, float]:
        return "bits_per_token", 1.0

    @property
    def default_prompt(self) -> str:
        self.require_text()

    def to_json(self) -> dict[str, Any]:
        return {"type": "ids", "vocab_size": self.size}


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """The code point of each character."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _describe(char: str) -> str:
    return f"{char!r} (U+{ord(char):04X})"
