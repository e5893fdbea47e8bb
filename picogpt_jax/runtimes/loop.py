"""Generation and evaluation in NumPy, for every runtime that computes logits and has no loop of its own.

Shapes: B streams, T time, V vocabulary, N new tokens.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from picogpt_jax.errors import UserError

Overflow = Literal["slide", "refill"]
Stream = Callable[[npt.NDArray[np.int64]], object]  # called with the tokens just drawn, int64 [B, 1]
Choose = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.int64]]  # logits [B, V] -> one token of each stream, [B]

NOISE_TOKENS = 64  # drawn at once: a call of the random generator costs as much as choosing a token


class Cache(Protocol):
    """Keys and values of the first `length` positions."""

    @property
    def length(self) -> int: ...


C = TypeVar("C", bound=Cache)


class Runtime(Protocol[C]):
    """What computes the logits of an int8 model."""

    @property
    def block_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def windows_at_once(self) -> int:
        """Windows that take as long as one; where it is two or more, two threads may call `forward` at a time."""
        ...

    def new_cache(self, batch: int) -> C:
        """A cache of no positions."""
        ...

    def forward(
        self, tokens_BT: npt.NDArray[np.int64], cache: C | None = None, last_only: bool = False
    ) -> npt.NDArray[np.float32]:
        """Logits of the next token at every position, float32 [B, T, V]; `last_only`: at the last, [B, 1, V].

        The tokens stand at positions 0.., or follow those in the cache, which they then extend.
        """
        ...


def generate(
    runtime: Runtime[C],
    tokens_BT: npt.NDArray[np.integer],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    overflow: Overflow = "slide",
    stream: Stream | None = None,
    choose: Choose | None = None,
) -> npt.NDArray[np.int64]:
    """Continues every row of `tokens_BT`, of which the model sees the last `block_size` tokens.

    Args:
        tokens_BT: the prompts, at least one token each.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens; None or 0: among all.
        seed: of the draws; the same seed gives the same tokens, in every runtime whose logits agree.
        overflow: once `block_size` tokens are seen, "slide" recomputes the window of the last `block_size` tokens for
            every token (nanoGPT's way, exact; with two threads in two pieces, whose float32 sums may differ in the last
            bit from those of one); "refill" goes on with a cache of the last `block_size // 2` tokens, the
            newest included, which is far faster.
        stream: called with the new tokens when they are drawn; twice in a row where two threads take turns.
        choose: draws in place of `draw`, by whatever seed, temperature and top_k it has.

    Returns:
        int64 [B, T + max_new_tokens]: the prompts and what follows.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary, or a setting out of range.
    """
    check_generation(max_new_tokens, temperature, top_k, seed, overflow)
    prompt_BT = checked_tokens(tokens_BT, runtime.vocab_size, "the prompt")
    batch, length = prompt_BT.shape
    text_BT = np.concatenate([prompt_BT, np.zeros((batch, max_new_tokens), np.int64)], axis=1)
    if choose is None:
        noise = Noise(seed, batch, runtime.vocab_size, temperature)
        choose = lambda logits_BV: draw(logits_BV, noise.next(), top_k)  # noqa: E731
    text = Text(runtime, text_BT, choose, stream or (lambda _: None))
    first, stop = max(length - runtime.block_size, 0), length + max_new_tokens
    slides_from = stop if overflow == "refill" else min(first + runtime.block_size + 1, stop)
    text.by_steps(first, range(length, slides_from))
    text.by_windows(range(max(length, slides_from), stop))
    return text_BT


class Text(Generic[C]):
    """Text that grows; `ends` are the indices of the tokens to draw, all before them being there.

    Args:
        text_BT: the tokens, with room for more.
        choose: draws [B] from logits [B, V]; called once a token, in order.
        stream: called with every new token [B, 1], by the thread that calls `by_steps` or `by_windows`.
    """

    def __init__(
        self,
        runtime: Runtime[C],
        text_BT: npt.NDArray[np.int64],
        choose: Choose,
        stream: Stream,
    ) -> None:
        self._runtime, self._text_BT, self._choose, self._stream_piece = runtime, text_BT, choose, stream

    def by_steps(self, first: int, ends: range) -> None:
        """With a cache of the tokens from `first` on, which goes on with its newest half when it is full."""
        block_size, cache, seen = self._runtime.block_size, self._runtime.new_cache(len(self._text_BT)), first
        for end in ends:
            if cache.length + end - seen > block_size:
                cache, seen = self._runtime.new_cache(len(self._text_BT)), end - max(block_size // 2, 1)
            self._append(end, self._runtime.forward(self._text_BT[:, seen:end], cache, last_only=True))
            self._stream(end)
            seen = end

    def by_windows(self, ends: range) -> None:
        """Each from the window of the last `block_size` tokens."""
        is_alone = len(self._text_BT) == 1 and self._runtime.windows_at_once > 1  # several streams use the cores anyway
        if is_alone and len(ends) > 1 and self._runtime.block_size > 1:
            return self._by_windows_in_turns(ends)
        for end in ends:
            window_BT = self._text_BT[:, end - self._runtime.block_size : end]
            self._append(end, self._runtime.forward(window_BT, last_only=True))
            self._stream(end)

    def _by_windows_in_turns(self, ends: range) -> None:
        """The same by two threads, of which each draws every other token.

        A window is known but for its newest token while the other thread still computes that one: it is begun then, and
        the newest token is a step with a cache. On two cores that takes 0.75 to 0.8 of the time.
        """
        turns, is_over = (threading.Semaphore(1), threading.Semaphore(0)), threading.Event()

        def begin(end: int) -> C:
            cache = self._runtime.new_cache(len(self._text_BT))
            known_BT = self._text_BT[:, end - self._runtime.block_size : end - 1]
            self._runtime.forward(known_BT, cache, last_only=True)
            return cache

        def finish(end: int, cache: C) -> None:
            self._append(end, self._runtime.forward(self._text_BT[:, end - 1 : end], cache, last_only=True))

        def others() -> None:
            for end in ends[1::2]:
                cache = begin(end)
                turns[1].acquire()
                if is_over.is_set():
                    return
                finish(end, cache)
                turns[0].release()

        with ThreadPoolExecutor(1, "windows") as threads:
            try:
                other = threads.submit(others)
                other.add_done_callback(lambda _: turns[0].release())  # it may have failed
                for end in ends[::2]:
                    cache = begin(end)
                    turns[0].acquire()
                    if other.done():
                        other.result()
                    if end > ends[0]:
                        self._stream(end - 1)
                    finish(end, cache)
                    turns[1].release()
                    self._stream(end)
                other.result()
            finally:
                is_over.set()
                turns[1].release()
        if len(ends) % 2 == 0:
            self._stream(ends[-1])

    def _append(self, end: int, logits_B1V: npt.NDArray[np.float32]) -> None:
        self._text_BT[:, end] = self._choose(logits_B1V[:, 0])

    def _stream(self, end: int) -> None:
        self._stream_piece(self._text_BT[:, end : end + 1])


class Noise:
    """Gumbel noise times the temperature, [B, V] a token: the largest of logits + noise is a draw from
    softmax(logits / temperature); at temperature 0 there is none."""

    def __init__(self, seed: int, batch: int, vocab_size: int, temperature: float) -> None:
        self._generator = np.random.default_rng(seed)
        self._shape, self._temperature = (NOISE_TOKENS, batch, vocab_size), temperature
        self._noise_NBV, self._used = np.zeros(self._shape), NOISE_TOKENS

    def next(self) -> npt.NDArray[np.float64]:
        """The noise of the next token."""
        if self._used == NOISE_TOKENS:
            if self._temperature > 0:
                self._noise_NBV = self._temperature * self._generator.gumbel(size=self._shape)
            self._used = 0
        self._used += 1
        return self._noise_NBV[self._used - 1]


def draw(
    logits_BV: npt.NDArray[np.float32], noise_BV: npt.NDArray[np.float64], top_k: int | None
) -> npt.NDArray[np.int64]:
    """One token for each stream, int64 [B]."""
    if top_k and top_k < logits_BV.shape[1]:
        lowest_B1 = np.partition(logits_BV, -top_k, axis=-1)[:, -top_k, None]
        logits_BV = np.where(logits_BV < lowest_B1, np.float32(-np.inf), logits_BV)
    return (logits_BV + noise_BV).argmax(-1)


def evaluate(runtime: Runtime[C], tokens: npt.ArrayLike, block_size: int, batch_size: int = 32) -> float:
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


def _loss_sum(runtime: Runtime[C], data: npt.NDArray[np.integer], window: int) -> float:
    """Sum of the losses of data[1:] in windows."""
    ids = checked_tokens(data, runtime.vocab_size, "the data")
    logits_BTV = runtime.forward(ids[:-1].reshape(-1, window))
    return float(losses(logits_BTV.reshape(len(ids) - 1, -1), ids[1:]).sum())


def losses(logits_NV: npt.NDArray[np.float32], targets_N: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Negative log-likelihood of each target in nats, [N], in float64."""
    shifted_NV = logits_NV.astype(np.float64) - logits_NV.max(-1, keepdims=True)
    return np.log(np.exp(shifted_NV).sum(-1)) - shifted_NV[np.arange(len(targets_N)), targets_N]


def checked_data(tokens: npt.ArrayLike, block_size: int, limit: int) -> npt.NDArray[np.integer]:
    """The ids to evaluate [N], after checking that there are two at least and that a window fits into the model."""
    data = np.asarray(tokens)
    if data.ndim != 1 or len(data) < 2 or data.dtype.kind not in "iu":
        raise UserError(f"found {data.dtype} {list(data.shape)}; expected at least two token ids in a row")
    if not 1 <= block_size <= limit:
        raise UserError(f"windows of {block_size} tokens; the model takes 1 to {limit}")
    return data


def check_generation(max_new_tokens: int, temperature: float, top_k: int | None, seed: int, overflow: str) -> None:
    """Raises a UserError where a setting of `generate` is out of range."""
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens={max_new_tokens} is negative")
    if not 0 <= temperature <= 1e30:  # what it multiplies is a float32 number
        raise UserError(f"temperature={temperature} is not a number from 0 to 1e30; 1 draws as trained")
    if top_k is not None and top_k < 0:
        raise UserError(f"top_k={top_k} is negative; 0 draws from all tokens")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed} is not in [0, 2**63)")
    if overflow not in ("slide", "refill"):
        raise UserError(f"overflow={overflow!r} is not one of 'slide', 'refill'")


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
