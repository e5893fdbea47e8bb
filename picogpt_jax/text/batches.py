"""Token files, and batches as a pure function of (seed, step): the same on any machine, in any number of processes."""

import dataclasses
import os
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from picogpt_jax.errors import UserError

Split = Literal["train", "val"]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One split of a data set, memory-mapped.

    Attributes:
        ids: uint16 [N], read from disk only where they are looked at.
        path: the file they come from.
    """

    ids: npt.NDArray[np.uint16]
    path: Path

    @classmethod
    def open(
        cls,
        data_dir: str | os.PathLike[str],
        split: Split,
        block_size: int,
        vocab_size: int,
        check_ids: bool = True,
    ) -> "Tokens":
        """Maps `<data_dir>/<split>.bin` (nanoGPT's raw little-endian uint16).

        Args:
            check_ids: read all of it, to see that no id is outside the vocabulary.

        Raises:
            UserError: there is no such file, it is too short for one block, or holds ids outside the vocabulary.
        """
        path = Path(data_dir).absolute() / f"{split}.bin"
        if not path.is_file():
            raise UserError(
                f"{path} does not exist; give the full path of a folder that a data/*/prepare.py has written"
            )
        size = path.stat().st_size
        if size % 2 or size // 2 < block_size + 1:
            raise UserError(
                f"{path} has {size} bytes; expected an even number, at least {2 * (block_size + 1)} for one block of "
                f"model.block_size={block_size}; prepare a longer text or lower model.block_size"
            )
        ids = np.memmap(path, dtype="<u2", mode="r")
        parts = range(0, len(ids) if check_ids else 0, 1 << 24)
        largest = max((int(ids[at : at + (1 << 24)].max()) for at in parts), default=0)
        if largest >= vocab_size:
            raise UserError(f"{path} holds token id {largest}; the vocabulary has {vocab_size}: prepare the data again")
        return cls(ids=ids, path=path)

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """Tells two texts apart by their length and 4,096 of their tokens."""
        at = np.linspace(0, len(self.ids) - 1, min(len(self.ids), 1 << 12)).astype(np.int64)
        return f"{len(self.ids)} {zlib.crc32(self.ids[at].tobytes())}"

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.uint16]:
        """The `length` tokens from each start on: uint16 [*starts.shape, length]."""
        return self.ids[starts[..., None] + np.arange(length)]


def batch_starts(seed: int, step: int, n_tokens: int, batch_size: int, block_size: int) -> npt.NDArray[np.int64]:
    """Where the sequences of a step begin: uniform in [0, n_tokens - block_size), from Philox keyed by (seed, step)."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))
    return generator.integers(0, n_tokens - block_size, batch_size)


def evaluation_windows(
    n_tokens: int, block_size: int, batch_size: int, max_windows: int | None = None
) -> npt.NDArray[np.int64]:
    """Starts of consecutive windows that cover every target once (or `max_windows` of them, spread evenly).

    Window i predicts the tokens at start+1 .. start+block_size from those before; the last one may be shorter.

    Returns:
        int64 [batches, batch_size]; -1 fills the last batch.
    """
    starts = np.arange(0, n_tokens - 1, block_size, dtype=np.int64)
    if max_windows is not None and len(starts) > max_windows:
        starts = starts[np.linspace(0, len(starts) - 1, max_windows).astype(np.int64)]
    padding = -len(starts) % batch_size
    return np.concatenate([starts, np.full(padding, -1)]).reshape(-1, batch_size)


def target_count(n_tokens: int, starts: npt.NDArray[np.int64], block_size: int) -> int:
    """How many targets the windows at `starts` have; -1 is an empty row."""
    return int(np.where(starts < 0, 0, np.minimum(block_size, n_tokens - 1 - starts)).sum())


def padded_windows(
    ids: npt.NDArray[np.uint16], starts: npt.NDArray[np.int64], block_size: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Inputs and targets of one evaluation batch; a target of -1 does not count.

    Args:
        starts: int64 [B]; -1 is an empty row.

    Returns:
        (inputs, targets), int32 [B, block_size]; the input beyond the end of the text is token 0.
    """
    at = starts[:, None] + np.arange(block_size + 1)
    inside = (starts[:, None] >= 0) & (at < len(ids))
    tokens = np.where(inside, ids[np.where(inside, at, 0)].astype(np.int32), -1)
    return np.maximum(tokens[:, :-1], 0), tokens[:, 1:]
