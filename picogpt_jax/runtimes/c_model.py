"""The integer model in C, as a runtime: `c/picogpt.c`, compiled for this processor, draws whole pieces of text.

Streams and windows are shared out among threads: a token of a small model takes microseconds, and threads that share it
would wait for each other. The streams of a thread go on together, so that each matrix is read once for all of them; of
windows, one is computed after the other. A window that slides alone is computed by two threads, the second of which has
its later tokens and follows the first from layer to layer.

Shapes: B streams or windows, T time, V vocabulary, N tokens of a piece.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from picogpt_jax.devices.cpu import cores
from picogpt_jax.int8.integer_model import IntegerModel
from picogpt_jax.runtimes import loop
from picogpt_jax.runtimes.c_library import Text, Weights, library
from picogpt_jax.runtimes.draws import Scale
from picogpt_jax.runtimes.engine import Sampling, checked_tokens

CHUNK = 32  # tokens of a prompt that each matrix is read for once
LOGIT = np.float32(1 / 1024)
PAIR_TOKENS = 64  # of a window that two threads share
PIECE_SECONDS = 0.02  # a piece is about as long: a call costs little then, and a reader does not wait


class Cache:
    """A text for each stream."""

    def __init__(self, texts: list[Text]) -> None:
        self.texts = texts

    @property
    def length(self) -> int:
        """Positions whose keys and values it holds."""
        return self.texts[0].position


class CGPT:
    """The model: a `picogpt_jax.runtimes.loop.Runtime` and a `picogpt_jax.runtimes.engine.Engine`.

    Args:
        threads: that compute; None: one per core.

    Raises:
        UserError: there is no compiler; see `c_library.library`.
    """

    def __init__(self, model: IntegerModel, threads: int | None = None) -> None:
        self.block_size, self.vocab_size = model.model.block_size, model.model.vocab_size
        self.windows_at_once = threads or cores()
        self._c = library()
        self._weights = Weights(self._c, model)
        self._threads = ThreadPoolExecutor(self.windows_at_once, "picogpt")
        self._idle: list[Text] = []  # of windows without a cache

    def new_cache(self, batch: int) -> Cache:
        """A cache of no positions."""
        return Cache([self._text() for _ in range(batch)])

    def _text(self) -> Text:
        return Text(self._c, self._weights, min(CHUNK, self.block_size))

    def forward(
        self, tokens_BT: npt.NDArray[np.integer], cache: Cache | None = None, last_only: bool = False
    ) -> npt.NDArray[np.float32]:
        """Logits of the next token at every position, float32 [B, T, V]; see `picogpt_jax.runtimes.loop.Runtime`.

        Raises:
            UserError: no token, or an id outside the vocabulary.
            ValueError: the positions do not fit into `block_size`.
        """
        batch, length = tokens_BT.shape
        end = length if cache is None else cache.length + length
        if end > self.block_size:
            raise ValueError(f"{end} positions do not fit into block_size={self.block_size}")
        ids_BT = np.ascontiguousarray(checked_tokens(tokens_BT, self.vocab_size, "the text"), np.int32)
        logits_BTV = np.empty((batch, 1 if last_only else length, self.vocab_size), np.float32)

        def compute(windows: range) -> None:
            try:
                lent = self._idle.pop()
            except IndexError:  # each thread has one
                lent = self._text()
            for window in windows:
                lent.position = 0
                text = cache.texts[window] if cache is not None else lent
                fixed_TV = logits_BTV[window].view(np.int32)
                arrays = ids_BT[window].ctypes.data, length, fixed_TV.ctypes.data, len(fixed_TV)
                self._c.picogpt_forward(ctypes.byref(text), *arrays)
                np.multiply(fixed_TV, LOGIT, out=logits_BTV[window])
            self._idle.append(lent)

        self._share_out(compute, batch)
        return logits_BTV

    def pieces(self, prompt_BT: npt.NDArray[np.integer], sampling: Sampling) -> Iterator[npt.NDArray[np.integer]]:
        """See `picogpt_jax.runtimes.engine.Engine`."""
        prompt_BT = checked_tokens(prompt_BT, self.vocab_size, "the prompt")
        room_BN = np.zeros((len(prompt_BT), sampling.max_new_tokens), np.int32)
        return self._pieces(np.concatenate([prompt_BT, room_BN], axis=1, dtype=np.int32), sampling)

    def _pieces(self, text_BT: npt.NDArray[np.int32], sampling: Sampling) -> Iterator[npt.NDArray[np.integer]]:
        batch, stop = text_BT.shape
        first = end = stop - sampling.max_new_tokens
        states = self.new_cache(batch).texts
        pointers = (ctypes.c_void_p * batch)(*map(ctypes.addressof, states))
        pointer_size = ctypes.sizeof(ctypes.c_void_p)
        multiplier = int(Scale.of(sampling.temperature).multiplier) if sampling.temperature > 0 else 0
        settings = (sampling.temperature == 0, multiplier, min(sampling.top_k or 0, 2**32 - 1), sampling.seed)
        words, slides = (ctypes.c_uint32 * 4)(*settings), sampling.overflow == "slide"
        count = 1

        def draw(streams: range) -> None:
            ids, texts = text_BT[streams.start].ctypes.data, ctypes.byref(pointers, streams.start * pointer_size)
            place = end - first, ids, stop, end
            self._c.picogpt_generate(texts, len(streams), words, streams.start, *place, count, slides)

        pair = self._pair() if slides and batch == 1 and self.windows_at_once > 1 else None
        while end < stop:
            count, began = min(count, stop - end), time.perf_counter()
            if pair is not None and end >= self.block_size:
                for place in range(end, end + count):
                    self._last_logits(pair, text_BT[0, place - self.block_size : place])
                    logits = pair[1].logits, self.vocab_size
                    text_BT[0, place] = self._c.picogpt_draw(*logits, words, 0, place - first)
            else:
                self._share_out(draw, batch)
            yield text_BT[:, end : end + count].astype(np.int64)
            end += count
            count = 2 * count if time.perf_counter() - began < PIECE_SECONDS / 2 else max(count // 2, 1)

    def _pair(self) -> list[Text] | None:
        """Two texts for `_last_logits`; None where a window is too short for two threads."""
        if self.block_size < PAIR_TOKENS:
            return None
        return [Text(self._c, self._weights, self.block_size) for _ in range(2)]

    def _last_logits(self, pair: list[Text], ids_T: npt.NDArray[np.int32]) -> None:
        """Computes the logits of a window's last token, those of the second text, with two threads."""
        # The later tokens look back at more keys, so there are fewer of them.
        cut = len(ids_T) * 9 // 16
        first, second = pair
        first.position, second.position = 0, cut
        self._c.picogpt_share(ctypes.byref(second), ctypes.byref(first))
        ids, size = ids_T.ctypes.data, ids_T.itemsize
        forward = self._c.picogpt_forward
        started = self._threads.submit(forward, ctypes.byref(first), ids, cut, first.logits, 0)
        forward(ctypes.byref(second), ids + cut * size, len(ids_T) - cut, second.logits, 1)
        started.result()

    def _share_out(self, compute: Callable[[range], None], count: int) -> None:
        """Computes range(count), in a part for each thread."""
        parts = min(self.windows_at_once, count)
        if parts == 1:
            compute(range(count))
            return
        edges = [count * part // parts for part in range(parts + 1)]
        list(self._threads.map(compute, map(range, edges[:-1], edges[1:])))

    def logits(self, tokens_BT: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """See `picogpt_jax.runtimes.engine.Engine`."""
        return self.forward(tokens_BT)

    def loss(self, ids: npt.NDArray[np.integer]) -> float:
        """See `picogpt_jax.runtimes.engine.Engine`."""
        return loop.evaluate(self, ids, self.block_size)
