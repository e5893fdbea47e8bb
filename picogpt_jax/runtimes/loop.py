"""Text and losses in NumPy, for every runtime that computes logits and has no loop of its own.

Shapes: B streams, T time, V vocabulary.
"""

import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from picogpt_jax.runtimes.draws import Draws
from picogpt_jax.runtimes.engine import BATCH_SIZE, Sampling, checked_data, checked_tokens


class Runtime(Protocol):
    """What computes the logits of an int8 model.

    Its caches, which only itself looks into, have a `length`: the positions whose keys and values they hold.
    """

    @property
    def block_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def windows_at_once(self) -> int:
        """Windows that take as long as one; where it is two or more, two threads may call `forward` at a time."""
        ...

    def new_cache(self, batch: int) -> Any:
        """A cache of no positions."""
        ...

    def forward(
        self, tokens_BT: npt.NDArray[np.int64], cache: Any = None, last_only: bool = False
    ) -> npt.NDArray[np.float32]:
        """Logits of the next token at every position, float32 [B, T, V]; `last_only`: at the last, [B, 1, V].

        The tokens stand at positions 0.., or follow those in the cache, which they then extend.
        """
        ...


def generate(
    runtime: Runtime, tokens_BT: npt.NDArray[np.integer], *settings: Any, **named: Any
) -> npt.NDArray[np.int64]:
    """Continues every row of `tokens_BT`, of which the model sees the last `block_size` tokens.

    Args:
        tokens_BT: the prompts, at least one token each.
        settings, named: of `Sampling`.

    Returns:
        int64 [B, T + max_new_tokens]: the prompts and what follows.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary, or a setting out of range.
    """
    sampling = Sampling(*settings, **named)
    return np.concatenate([tokens_BT, *pieces(runtime, tokens_BT, sampling)], axis=1, dtype=np.int64)


def pieces(runtime: Runtime, prompt_BT: npt.NDArray[np.integer], sampling: Sampling) -> Iterator[npt.NDArray[np.int64]]:
    """The tokens that follow, int64 [B, 1] each, as soon as they are drawn; see `Engine.pieces`.

    A window that slides may be computed in two pieces, side by side with the next one (`Runtime.windows_at_once`); its
    float32 sums then differ in the last bit from those of one piece.
    """
    prompt_BT = checked_tokens(prompt_BT, runtime.vocab_size, "the prompt")
    streams, length = prompt_BT.shape
    stop = length + sampling.max_new_tokens
    text_BT = np.concatenate([prompt_BT, np.zeros((streams, sampling.max_new_tokens), np.int64)], axis=1)
    text = Text(runtime, text_BT, Draws(sampling, streams))
    first = max(length - runtime.block_size, 0)
    slides_from = stop if sampling.overflow == "refill" else min(first + runtime.block_size + 1, stop)
    steps = text.by_steps(first, range(length, slides_from))
    return itertools.chain(steps, text.by_windows(range(max(length, slides_from), stop)))


class Text:
    """Text that grows; `ends` are the indices of the tokens to draw, all before them being there.

    Args:
        text_BT: the tokens, with room for more.
    """

    def __init__(self, runtime: Runtime, text_BT: npt.NDArray[np.int64], draws: Draws) -> None:
        self._runtime, self._text_BT, self._draws = runtime, text_BT, draws

    def by_steps(self, first: int, ends: range) -> Iterator[npt.NDArray[np.int64]]:
        """With a cache of the tokens from `first` on, which goes on with its newest half when it is full."""
        block_size, cache, seen = self._runtime.block_size, self._runtime.new_cache(len(self._text_BT)), first
        for end in ends:
            if cache.length + end - seen > block_size:
                cache, seen = self._runtime.new_cache(len(self._text_BT)), end - max(block_size // 2, 1)
            yield self._drawn(end, self._runtime.forward(self._text_BT[:, seen:end], cache, last_only=True))
            seen = end

    def by_windows(self, ends: range) -> Iterator[npt.NDArray[np.int64]]:
        """Each from the window of the last `block_size` tokens."""
        block_size = self._runtime.block_size
        is_alone = len(self._text_BT) == 1 and self._runtime.windows_at_once > 1  # several streams use the cores anyway
        if is_alone and len(ends) > 1 and block_size > 1:
            yield from self._by_windows_begun_early(ends)
            return
        for end in ends:
            yield self._drawn(end, self._runtime.forward(self._text_BT[:, end - block_size : end], last_only=True))

    def _by_windows_begun_early(self, ends: range) -> Iterator[npt.NDArray[np.int64]]:
        """The same by two threads at a time.

        A window is known but for its newest token while that one is still being computed: it is begun then, and the
        newest token is a step with a cache. On two cores that takes 0.75 to 0.8 of the time.
        """

        def begin(end: int) -> Any:
            cache = self._runtime.new_cache(len(self._text_BT))
            known_BT = self._text_BT[:, end - self._runtime.block_size : end - 1]
            self._runtime.forward(known_BT, cache, last_only=True)
            return cache

        with ThreadPoolExecutor(2, "windows") as threads:
            next_begun = threads.submit(begin, ends[0])
            for end in ends:
                begun = next_begun
                if end < ends[-1]:
                    next_begun = threads.submit(begin, end + 1)
                newest_B1 = self._text_BT[:, end - 1 : end]
                yield self._drawn(end, self._runtime.forward(newest_B1, begun.result(), last_only=True))

    def _drawn(self, end: int, logits_B1V: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        self._text_BT[:, end] = self._draws(logits_B1V[:, 0])
        return self._text_BT[:, end : end + 1]


def evaluate(runtime: Runtime, tokens: npt.ArrayLike, block_size: int, batch_size: int = BATCH_SIZE) -> float:
    """Mean loss in nats per token: one pass in consecutive windows, every token but the first a target once.

    Args:
        tokens: token ids, integers [N].
        block_size: window length; the last window is shorter where N - 1 is no multiple of it.
        batch_size: windows computed at a time.

    Raises:
        UserError: fewer than two tokens, an id outside the vocabulary, or a window longer than the model's.
    """
    data = checked_data(tokens, block_size, runtime.block_size)
    total, n_targets = 0.0, len(data) - 1
    n_whole = n_targets - n_targets % block_size
    for start in range(0, n_whole, batch_size * block_size):
        end = min(start + batch_size * block_size, n_whole)
        total += _loss_sum(runtime, data[start : end + 1], block_size)
    if n_whole < n_targets:
        total += _loss_sum(runtime, data[n_whole:], n_targets - n_whole)
    return total / n_targets


def _loss_sum(runtime: Runtime, data: npt.NDArray[np.integer], window: int) -> float:
    """Sum of the losses of data[1:] in windows."""
    ids = checked_tokens(data, runtime.vocab_size, "the data")
    logits_NV = runtime.forward(ids[:-1].reshape(-1, window)).reshape(len(ids) - 1, -1)
    return float(losses(logits_NV, ids[1:]).sum())


def losses(logits_NV: npt.NDArray[np.float32], targets_N: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Negative log-likelihood of each target in nats, float64 [N]."""
    shifted_NV = logits_NV.astype(np.float64) - logits_NV.max(-1, keepdims=True)
    return np.log(np.exp(shifted_NV).sum(-1)) - shifted_NV[np.arange(len(targets_N)), targets_N]


class Loop:
    """An `Engine` of a runtime that only computes logits."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.pieces = functools.partial(pieces, runtime)

    def logits(self, tokens_BT: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """See `Engine`."""
        return self.runtime.forward(tokens_BT.astype(np.int64))

    def loss(self, ids: npt.NDArray[np.integer]) -> float:
        """See `Engine`."""
        return evaluate(self.runtime, ids, self.runtime.block_size)
