"""Compresses a file with an integer model; what one runtime wrote, every other one reads: their integers are the same.

The content becomes items: token ids of the vocabulary, and runs of up to 256 bytes that it cannot say. Items are cut
into blocks, which start anew and are computed side by side. Each item is coded by rANS (Duda, arXiv 1311.2540) with
frequencies that the logits decide. Little-endian, a file is

    "pgz", version 1 | model's digest, 16 bytes | length of the content u64 | items u64 | items of a block u32 |
    first 16 bytes of the content's SHA-256 | CRC-32 of all this u32 |
    of each block the number of its words u32 | of each block its last state u64 and its words u32

Shapes: B blocks or windows side by side, T time, V vocabulary.
"""

import hashlib
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt_jax.errors import UserError
from picogpt_jax.progress import tqdm
from picogpt_jax.runtimes.draws import Scale, fixed, weights
from picogpt_jax.runtimes.loop import Runtime
from picogpt_jax.text.vocabulary import TokenIds, Vocabulary

MAGIC, VERSION = b"pgz", 1
HEADER = struct.Struct("<3sB16sQQI16s")
CRC = struct.Struct("<I")
BLOCK_SIZE, LARGEST_BLOCK = 4096, 1 << 20
SIDE_BY_SIDE = 64  # blocks; what is written does not depend on it
LOGITS_AT_ONCE = 1 << 24  # 64 MB

TOTAL_BITS = 24  # of the frequencies of an item, which add up to 2^24
ESCAPE = 1 << 12  # the frequency of an item of bytes: 12 bits
BYTE_BITS = TOTAL_BITS - 8
LOWEST = 1 << 31  # of a state, which is below 2^63
STAND_IN = 0  # the id that the model is given before a block, and for an item of bytes

Item = int | bytes
Part = tuple[int, int]  # where a symbol's frequencies begin, and how many they are


def compress(
    content: bytes, runtime: Runtime, vocabulary: Vocabulary, digest: bytes, block_size: int = BLOCK_SIZE
) -> bytes:
    """The compressed file.

    Args:
        runtime: of an integer model.
        digest: of the model, 16 bytes.
        block_size: items of a block: more take less room and more time, as fewer are computed side by side.
    """
    if not 1 <= block_size <= LARGEST_BLOCK:
        raise UserError(f"block_size={block_size} is not in 1 to {LARGEST_BLOCK}")
    items = items_of(content, vocabulary)
    blocks = [items[first : first + block_size] for first in range(0, len(items), block_size)]
    encoded = [encode(parts) for parts in _parts(runtime, blocks)]
    header = HEADER.pack(
        MAGIC, VERSION, digest, len(content), len(items), block_size, hashlib.sha256(content).digest()[:16]
    )
    sizes = struct.pack(f"<{len(encoded)}I", *(len(words) for _, words in encoded))
    bodies = [struct.pack(f"<Q{len(words)}I", state, *words) for state, words in encoded]
    return b"".join([header, CRC.pack(zlib.crc32(header)), sizes, *bodies])


def decompress(data: bytes, runtime: Runtime, vocabulary: Vocabulary, digest: bytes) -> bytes:
    """The content of a compressed file.

    Raises:
        UserError: it is no such file, damaged, cut, followed by other bytes, or of another model.
    """
    length, count, block_size, checksum, words = _opened(data, digest)
    items: list[Item] = []
    with tqdm(total=count, unit=" items", desc="decompressing", disable=None) as bar:
        for first in range(0, len(words), SIDE_BY_SIDE):
            group = [Decoder(*coded) for coded in words[first : first + SIDE_BY_SIDE]]
            ends = [min(count - (first + index) * block_size, block_size) for index in range(len(group))]
            for block in _decoded(runtime, group, ends, bar.update):
                items.extend(block)
    content = bytes_of(items, vocabulary)
    if len(content) != length or hashlib.sha256(content).digest()[:16] != checksum:
        raise UserError("the compressed file is damaged: its content has another checksum; take another copy")
    return content


def _opened(data: bytes, digest: bytes) -> tuple[int, int, int, bytes, list[tuple[int, list[int]]]]:
    """What the header holds, and of each block its state and words."""
    if data[:3] != MAGIC:
        raise UserError(f"the file begins with {data[:3]!r}; a compressed file begins with {MAGIC!r}")
    if data[3:4] != bytes([VERSION]):
        raise UserError(f"the compressed file is of version {data[3:4].hex() or 'none'}; expected {VERSION:02x}")
    begin = HEADER.size + CRC.size
    if len(data) < begin:
        raise UserError(f"the compressed file is cut: {len(data)} bytes, its header alone has {begin}")
    if CRC.unpack_from(data, HEADER.size)[0] != zlib.crc32(data[: HEADER.size]):
        raise UserError("the compressed file is damaged: its header has another checksum; take another copy")
    _, _, found, length, count, block_size, checksum = HEADER.unpack_from(data)
    if found != digest:
        raise UserError(f"the file was compressed with the model {found.hex()}; this one is {digest.hex()}")
    blocks = -(-count // block_size) if 0 < block_size <= LARGEST_BLOCK else -1
    if blocks < 0 or blocks * 12 > len(data):
        raise UserError("the compressed file is cut, or damaged: it has no room for its blocks; take another copy")
    sizes = struct.unpack_from(f"<{blocks}I", data, begin)
    at, words = begin + 4 * blocks, []
    expected = at + sum(8 + 4 * size for size in sizes)
    if len(data) != expected:
        what = "cut" if len(data) < expected else "followed by other bytes"
        raise UserError(f"the compressed file is damaged or {what}: {len(data)} bytes; expected {expected}")
    for size in sizes:
        state, *block = struct.unpack_from(f"<Q{size}I", data, at)
        words.append((state, block))
        at += 8 + 4 * size
    return length, count, block_size, checksum, words


def items_of(content: bytes, vocabulary: Vocabulary) -> list[Item]:
    """Ids, and bytes where the vocabulary has no token; `bytes_of` is the inverse."""
    items: list[Item] = []
    if isinstance(vocabulary, TokenIds):
        return _runs(content)
    text = content.decode("utf-8", "surrogateescape")
    if type(vocabulary) is Vocabulary:
        ids = {char: index for index, char in enumerate(vocabulary.itos)}
        waiting = b""
        for char in text:
            if char in ids:
                items += _runs(waiting)
                items.append(ids[char])
                waiting = b""
            else:
                waiting += char.encode("utf-8", "surrogateescape")
        return items + _runs(waiting)
    for part in re.split("([\udc80-\udcff]+)", text):  # what is not UTF-8 stands between
        try:
            ids_T = vocabulary.encode(part).tolist()
        except (UserError, UnicodeError, TypeError):  # the library's, for half a surrogate pair
            ids_T = _runs(part.encode("utf-8", "surrogateescape"))
        items += ids_T
    return items if bytes_of(items, vocabulary) == content else _runs(content)


def _runs(content: bytes) -> list[Item]:
    return [content[first : first + 256] for first in range(0, len(content), 256)]


def bytes_of(items: list[Item], vocabulary: Vocabulary) -> bytes:
    """The content: ids are decoded together as far as no bytes come between, as a token may end within a character."""
    parts: list[bytes] = []
    waiting: list[int] = []
    for item in [*items, b""]:
        if isinstance(item, int):
            waiting.append(item)
            continue
        if waiting:
            parts.append(vocabulary.decode(waiting).encode("utf-8", "surrogatepass"))
            waiting = []
        parts.append(item)
    return b"".join(parts)


# ------------------------------------------------------------------------------------------------------ the frequencies


def frequencies(logits_NV: npt.NDArray[np.float32]) -> npt.NDArray[np.uint64]:
    """Of each id, and of the escape last; each at least 1, together 2^24, uint64 [N, V + 1].

    Of weights w (those of a draw at temperature 1) it is 1 + (w * R >> 32), where R is
    ((2^24 - 2^12 - V) << 32) // sum of w; what is left goes to the largest logit, the lowest id among equals.
    """
    n_NV = fixed(logits_NV)
    rows, vocab_size = n_NV.shape
    room = (1 << TOTAL_BITS) - ESCAPE - vocab_size
    d_NV = (n_NV.max(-1, keepdims=True) - n_NV).astype(np.uint32)
    w_NV = weights(d_NV, Scale.of(1.0), vocab_size).astype(np.uint64)
    reciprocal_N1 = np.uint64(room << 32) // w_NV.sum(-1, keepdims=True)
    found = np.full((rows, vocab_size + 1), ESCAPE, np.uint64)
    found[:, :-1] = 1 + ((w_NV * reciprocal_N1) >> np.uint64(32))
    found[np.arange(rows), n_NV.argmax(-1)] += np.uint64(1 << TOTAL_BITS) - found.sum(-1)
    return found


def window_starts(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, end): the items first..end - 1 are decided by a window of what was given from `start` on.

    A full window goes on with its newest half, as `--overflow=refill` does.
    """
    start, first = 0, 0
    while first < length:
        end = min(start + window, length)
        yield start, first, end
        start, first = end + 1 - max(window // 2, 1), end


def _parts(runtime: Runtime, blocks: list[list[Item]]) -> Iterator[list[Part]]:
    """What to code of each block; whole windows at once, whose logits are the same bits as step by step."""
    window, vocab_size = runtime.block_size, runtime.vocab_size
    at_once = max(1, min(32, LOGITS_AT_ONCE // (window * vocab_size)))
    with tqdm(total=sum(map(len, blocks)), unit=" items", desc="compressing", disable=None) as bar:
        for block in blocks:
            given = np.array([STAND_IN, *(item if isinstance(item, int) else STAND_IN for item in block)])
            parts: list[Part] = []
            spans = list(window_starts(len(block), window))
            for begin in range(0, len(spans), at_once):
                group = spans[begin : begin + at_once]
                tokens_BT = np.full((len(group), max(end - start for start, _, end in group)), STAND_IN, np.int64)
                for given_T, (start, _, end) in zip(tokens_BT, group, strict=True):
                    given_T[: end - start] = given[start:end]
                logits_BTV = runtime.forward(tokens_BT)
                for logits_TV, (start, first, end) in zip(logits_BTV, group, strict=True):
                    found = frequencies(logits_TV[first - start : end - start])
                    ends = found.cumsum(-1)
                    for row, item in enumerate(block[first:end]):
                        symbol = item if isinstance(item, int) else vocab_size
                        parts.append((int(ends[row, symbol] - found[row, symbol]), int(found[row, symbol])))
                        if isinstance(item, bytes):
                            parts += [(byte << BYTE_BITS, 1 << BYTE_BITS) for byte in (len(item) - 1, *item)]
                    bar.update(end - first)
            yield parts


def _decoded(
    runtime: Runtime, decoders: list["Decoder"], ends: list[int], progress: Callable[[int], Any]
) -> list[list[Item]]:
    """The items of blocks, side by side, a step at a time."""
    window, vocab_size = runtime.block_size, runtime.vocab_size
    items: list[list[Item]] = [[] for _ in decoders]
    given_BT = np.full((len(decoders), max(ends) + 1), STAND_IN, np.int64)
    cache, seen = runtime.new_cache(len(decoders)), 0
    for step in range(max(ends)):
        if cache.length == window:
            cache, seen = runtime.new_cache(len(decoders)), step + 1 - max(window // 2, 1)
        logits_BV = runtime.forward(given_BT[:, seen : step + 1], cache, last_only=True)[:, 0]
        seen = step + 1
        found = frequencies(logits_BV)
        limits = found.cumsum(-1)
        for index, decoder in enumerate(decoders):
            if step >= ends[index]:
                continue
            symbol = int(np.searchsorted(limits[index], decoder.slot, side="right"))
            size = int(found[index, symbol])
            decoder.take(int(limits[index, symbol]) - size, size)
            if symbol == vocab_size:
                items[index].append(bytes(decoder.byte() for _ in range(decoder.byte() + 1)))
            else:
                items[index].append(symbol)
                given_BT[index, step + 1] = symbol
            progress(1)
    for decoder in decoders:
        decoder.finish()
    return items


# ------------------------------------------------------------------------------------------------------------ the coder


def encode(parts: list[Part]) -> tuple[int, list[int]]:
    """The last state and the words, in the order in which they are read."""
    state, words = LOWEST, []
    for start, size in reversed(parts):
        if state >= size << (63 - TOTAL_BITS):
            words.append(state & 0xFFFFFFFF)
            state >>= 32
        state = ((state // size) << TOTAL_BITS) + state % size + start
    return state, words[::-1]


class Decoder:
    """Reads the symbols of one block."""

    def __init__(self, state: int, words: list[int]) -> None:
        self._state, self._words, self._used = state, words, 0

    @property
    def slot(self) -> int:
        """A number that lies among the next symbol's."""
        return self._state & ((1 << TOTAL_BITS) - 1)

    def take(self, start: int, size: int) -> None:
        """Goes on to the symbol after the one that has `size` numbers from `start` on."""
        self._state = size * (self._state >> TOTAL_BITS) + self.slot - start
        if self._state < LOWEST and self._used < len(self._words):
            self._state = (self._state << 32) | self._words[self._used]
            self._used += 1

    def byte(self) -> int:
        """The next symbol, where it is a byte."""
        byte = self.slot >> BYTE_BITS
        self.take(byte << BYTE_BITS, 1 << BYTE_BITS)
        return byte

    def finish(self) -> None:
        """Raises a UserError where the words did not end with the block."""
        if self._state != LOWEST or self._used != len(self._words):
            raise UserError("the compressed file is damaged: a block does not end where it should; take another copy")
