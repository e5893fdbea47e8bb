"""Drawing a token in integers: "Drawing a token" of `picogpt_jax/int8/README.md`, in NumPy.

The same logits, seed, temperature and top_k give the same token in every runtime. What is written with operators alone
takes arrays of JAX as well.

Shapes: B streams, V vocabulary, N tokens.
"""

import math
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from picogpt_jax.runtimes.engine import Sampling

AT_ONCE = 64  # tokens for which bits are computed together: a call costs as much as choosing a token
LARGEST = 1 << 22  # of a logit with 10 fraction bits
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
Words = npt.NDArray[np.uint32]


def threefry(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Any, Any]:
    """Threefry-2x32 of 20 rounds (Salmon et al., SC 2011): two words of uint32 arrays that broadcast."""
    keys = (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    a, b = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            a = a + b
            b = ((b << rotation) | (b >> (32 - rotation))) ^ a
        a, b = a + keys[(group + 1) % 3], b + keys[(group + 2) % 3] + np.uint32(group + 1)
    return a, b


def random_bits(seed: int, first: int, count: int, streams: int) -> Words:
    """The bits of each stream's tokens from the index `first` on, [N, B]."""
    index_N1 = np.arange(first, first + count, dtype=np.uint32)[:, None]
    key = np.full(1, seed, np.uint32), np.arange(streams, dtype=np.uint32)
    return threefry(key, (index_N1, np.zeros(1, np.uint32)))[0]


class Scale(NamedTuple):
    """A temperature above 0 in integers.

    Attributes:
        multiplier: M of the specification, a factor of the distance to the largest logit.
        limit: L; a larger distance has weight 0.
    """

    multiplier: Any
    limit: Any

    @classmethod
    def of(cls, temperature: float) -> Self:
        """One division of doubles, and its result rounded: the only float."""
        quotient = 131072 * math.log2(math.e) / temperature
        multiplier = round(quotient) if quotient < 2**32 - 1 else 2**32 - 1
        return cls(np.uint32(multiplier), np.uint32((2**32 - 1) // max(multiplier, 1)))


def weights(d: Any, scale: Scale, vocab_size: int) -> Any:
    """2^-x in fixed point, uint32, of distances to the largest logit; the sum over the vocabulary is below 2^32."""
    x = (d * scale.multiplier) >> 11
    f = x & 65535
    power = 65536 - ((f * (45308 - ((f * (15096 - ((f * 2556) >> 16))) >> 16))) >> 16)
    weight_bits = min(24, 32 - vocab_size.bit_length())
    return (((power << 8) >> (x >> 16)) >> (24 - weight_bits)) * (d <= scale.limit)


def fixed(logits_BV: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """The logits as integers with 10 fraction bits."""
    return np.clip(np.rint(logits_BV * np.float32(1024)), -LARGEST, LARGEST).astype(np.int32)


def draw(
    logits_BV: npt.NDArray[np.float32], bits_B: Words, scale: Scale | None, top_k: int | None
) -> npt.NDArray[np.int64]:
    """One token for each stream, int64 [B]; `scale` None: the likeliest."""
    if scale is None:
        return logits_BV.argmax(-1)
    n_BV = fixed(logits_BV)
    w_BV = weights((n_BV.max(-1, keepdims=True) - n_BV).astype(np.uint32), scale, n_BV.shape[1])
    if top_k and top_k < n_BV.shape[1]:
        kept_BK = np.argsort(-n_BV, axis=-1, kind="stable")[:, :top_k]
        kept_BV = np.zeros(n_BV.shape, bool)
        np.put_along_axis(kept_BV, kept_BK, True, axis=-1)
        w_BV *= kept_BV
    ends_BV = w_BV.cumsum(-1, dtype=np.uint32)
    target_B1 = (bits_B[:, None].astype(np.uint64) * ends_BV[:, -1:]) >> 32
    return (ends_BV <= target_B1).sum(-1)


class Draws:
    """float32 logits [B, V] -> one token for each stream, int64 [B]; called once a token, in order."""

    def __init__(self, sampling: Sampling, streams: int) -> None:
        self._sampling, self._streams, self._index = sampling, streams, 0
        self._scale = Scale.of(sampling.temperature) if sampling.temperature > 0 else None
        self._bits_NB: Words = np.zeros((AT_ONCE, streams), np.uint32)

    def __call__(self, logits_BV: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        used = self._index % AT_ONCE
        if used == 0 and self._scale is not None:
            self._bits_NB = random_bits(self._sampling.seed, self._index, AT_ONCE, self._streams)
        self._index += 1
        return draw(logits_BV, self._bits_NB[used], self._scale, self._sampling.top_k)
