"""What a runtime does for a model, on token ids, and the settings of a draw.

Shapes: B streams, T time, V vocabulary, N tokens of a piece or a text.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from picogpt_jax.errors import UserError

Overflow = Literal["slide", "refill"]

BATCH_SIZE = 32  # windows of an evaluation that are computed at once


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How many tokens are drawn, and how.

    Attributes:
        max_new_tokens: for each prompt.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens, the lower ids first where they are equal; None or 0: among all.
        seed: of the draws; the same seed gives the same tokens in every runtime and on every device whose logits agree,
            and to each stream of a batch what it would draw among any number of others.
        overflow: once `block_size` tokens are seen, "slide" recomputes the window of the last `block_size` tokens for
            every token (nanoGPT's way, exact); "refill" goes on with a cache of the last `block_size // 2` tokens, the
            newest included, which is far faster.

    Raises:
        UserError: on construction, a setting is out of range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    seed: int = 0
    overflow: Overflow = "slide"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens={self.max_new_tokens} is negative")
        if not 0 <= self.temperature <= 1e30:
            raise UserError(f"temperature={self.temperature} is not a number from 0 to 1e30; 1 draws as trained")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k={self.top_k} is negative; 0 draws from all tokens")
        if not 0 <= self.seed < 2**32:  # a word of the key
            raise UserError(f"seed={self.seed} is not in [0, 2**32)")
        if self.overflow not in ("slide", "refill"):
            raise UserError(f"overflow={self.overflow!r} is not one of 'slide', 'refill'")


class Engine(Protocol):
    """A model in a runtime, on token ids: what `picogpt_jax.formats.loading.Model` needs of it."""

    def pieces(self, prompt_BT: npt.NDArray[np.integer], sampling: Sampling) -> Iterator[npt.NDArray[np.integer]]:
        """What follows the prompts, [B, N] at a time, as it is drawn.

        Raises:
            UserError: at once, an empty prompt, or an id outside the vocabulary.
        """
        ...

    def logits(self, tokens_BT: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Logits of the next token at every position, float32 [B, T, V]; T is `block_size` at most."""
        ...

    def loss(self, ids: npt.NDArray[np.integer]) -> float:
        """Mean loss in nats per token: one pass over ids [N] in windows of `block_size`, every target once."""
        ...


def checked_tokens(ids: npt.NDArray[np.integer], vocab_size: int, source: str) -> npt.NDArray[np.int64]:
    """The ids as int64, after checking that there is one at least and that all are in the vocabulary."""
    if ids.size == 0:
        raise UserError(f"{source} has no tokens; at least one is needed")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"{source} holds the token id {low if low < 0 else high}; the vocabulary has ids 0 to {vocab_size - 1}"
        )
    return ids.astype(np.int64)


def checked_data(tokens: npt.ArrayLike, block_size: int, limit: int) -> npt.NDArray[np.integer]:
    """The ids to evaluate [N], after checking that there are two at least and that a window fits into the model."""
    data = np.asarray(tokens)
    if data.ndim != 1 or len(data) < 2 or data.dtype.kind not in "iu":
        raise UserError(f"found {data.dtype} {list(data.shape)}; expected at least two token ids in a row")
    if not 1 <= block_size <= limit:
        raise UserError(f"windows of {block_size} tokens; the model takes 1 to {limit}")
    return data
