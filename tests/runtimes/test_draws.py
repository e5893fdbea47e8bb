"""A token drawn in integers: Threefry's known words, the specification in Python's own integers, and the softmax."""

import math

import numpy as np
import pytest

from picogpt_jax.runtimes.draws import AT_ONCE, Draws, Scale, draw, fixed, random_bits, threefry, weights
from picogpt_jax.runtimes.engine import Sampling


def words(key: tuple[int, int], counter: tuple[int, int]) -> list[str]:
    arrays = [np.array([word], np.uint32) for word in (*key, *counter)]
    return [f"{word[0]:08x}" for word in threefry((arrays[0], arrays[1]), (arrays[2], arrays[3]))]


def test_threefry_has_the_words_of_its_authors() -> None:
    """kat_vectors of Random123."""
    ones = (2**32 - 1, 2**32 - 1)
    assert words((0, 0), (0, 0)) == ["6b200159", "99ba4efe"]
    assert words(ones, ones) == ["1cb996fc", "bb002be7"]
    assert words((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3)) == ["c4923a9c", "483df7a0"]


def test_the_bits_are_the_first_word_of_seed_stream_and_index() -> None:
    bits_NB = random_bits(1337, 2, 3, 4)
    assert bits_NB.shape == (3, 4)
    assert f"{bits_NB[0, 1]:08x}" == words((1337, 1), (2, 0))[0] == "551ab488", "the example of the specification"
    assert f"{bits_NB[2, 3]:08x}" == words((1337, 3), (4, 0))[0]


def drawn_by_hand(logits: list[float], bits: int, temperature: float, top_k: int) -> int:
    """The specification, in numbers without a limit."""
    n = [round(logit * 1024) for logit in logits]
    order = sorted(range(len(n)), key=lambda index: (-n[index], index))
    kept = set(order[: top_k or len(n)])
    multiplier = min(round(131072 * math.log2(math.e) / temperature), 2**32 - 1)
    ends, total = [], 0
    for index, value in enumerate(n):
        d = max(n) - value
        if index in kept and d * multiplier < 2**32:
            x = d * multiplier >> 11
            f = x & 65535
            power = 65536 - (f * (45308 - (f * (15096 - (f * 2556 >> 16)) >> 16)) >> 16)
            total += (power << 8) >> (x >> 16) >> (24 - min(24, 32 - len(n).bit_length()))
        ends.append(total)
    return next(index for index, end in enumerate(ends) if end > bits * total >> 32)


@pytest.mark.parametrize("temperature", [1e-9, 1e-4, 0.1, 0.8, 1.0, 5.0, 1e30])
@pytest.mark.parametrize("top_k", [0, 1, 5, 99])
def test_the_draw_is_the_specification(temperature: float, top_k: int) -> None:
    generator = np.random.default_rng(0)
    for vocab_size in (1, 11, 300):
        logits_BV = (generator.integers(-9, 9, (20, vocab_size)) / 2).astype(np.float32)  # many are equal
        bits_B = generator.integers(0, 2**32, 20, dtype=np.uint32)
        bits_B[:2] = 0, 2**32 - 1
        found = draw(logits_BV, bits_B, Scale.of(temperature), top_k).tolist()
        rows = zip(logits_BV.tolist(), bits_B.tolist(), strict=True)
        assert found == [drawn_by_hand(row, bits, temperature, top_k) for row, bits in rows]


def test_temperature_zero_takes_the_first_of_the_largest() -> None:
    drawn = Draws(Sampling(1, temperature=0.0), 2)(np.array([[1, 3, 3], [2, 0, 2]], np.float32))
    assert drawn.tolist() == [1, 0]


def test_top_k_keeps_the_lower_of_equal_ids() -> None:
    bits_B = random_bits(0, 0, 1, 500)[0]
    drawn = draw(np.tile(np.array([1, 1, 2, 1], np.float32), (500, 1)), bits_B, Scale.of(1.0), 3)
    assert set(drawn.tolist()) == {0, 1, 2}


def test_the_power_is_close() -> None:
    d = np.arange(24 * 1024, dtype=np.uint32)
    scale = Scale.of(math.log2(math.e))  # a step of d is then 2^(-1/1024)
    found, expected = weights(d, scale, 100).astype(np.float64), 2**24 * 2.0 ** (-d.astype(np.float64) / 1024)
    assert np.all(np.abs(found - expected) <= 1 + 1.8e-4 * expected)
    assert found[0] == 2**24


@pytest.mark.parametrize("vocab_size", [255, 256, 50257, 65535, 65536, 1 << 20])
def test_the_sum_of_the_weights_stays_below_32_bits(vocab_size: int) -> None:
    largest = int(weights(np.zeros(1, np.uint32), Scale.of(1.0), vocab_size)[0])
    assert 2**30 < largest * vocab_size < 2**32


def test_large_logits_are_limited() -> None:
    assert fixed(np.array([1e30, -np.inf, 4096.5, 1.5], np.float32)).tolist() == [1 << 22, -(1 << 22), 1 << 22, 1536]


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3), (5.0, None)])
def test_tokens_are_drawn_with_their_probability(temperature: float, top_k: int | None) -> None:
    """Pearson's statistic of 40,000 draws; with 4 degrees of freedom it is above 23 once in 10,000 seeds."""
    logits, count = np.array([1.0, 2.0, 0.0, -1.0, 1.5], np.float32), 40_000
    draws = Draws(Sampling(1, temperature, top_k, seed=5), count // 200)
    drawn = np.concatenate([draws(np.tile(logits, (count // 200, 1))) for _ in range(200)])
    chances = np.exp(logits.astype(np.float64) / temperature)
    if top_k is not None:
        chances[np.argsort(logits)[:-top_k]] = 0
    expected = count * chances / chances.sum()
    found = np.bincount(drawn, minlength=5)
    assert np.all(found[expected == 0] == 0)
    kept = expected > 0
    assert (np.square(found - expected)[kept] / expected[kept]).sum() < 23


def test_a_stream_draws_as_if_alone() -> None:
    logits_BV = np.random.default_rng(1).normal(size=(6, 11)).astype(np.float32)
    many, one = Draws(Sampling(1, seed=3), 6), Draws(Sampling(1, seed=3), 1)
    for index in range(AT_ONCE + 9):
        both = many(logits_BV)
        assert both[0] == one(logits_BV[:1])[0]
        for stream in range(6):
            bits_B = np.array([int(words((3, stream), (index, 0))[0], 16)], np.uint32)
            assert both[stream] == draw(logits_BV[stream, None], bits_B, Scale.of(1.0), None)[0]


def test_the_temperature_is_one_division() -> None:
    assert Scale.of(1.0) == (189097, 22713)
    assert Scale.of(1e-300) == (2**32 - 1, 1)
    assert Scale.of(1e30) == (0, 2**32 - 1)
