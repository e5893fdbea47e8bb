"""The generation and evaluation loops of the runtimes without their own; here with NumPy's."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_int8_model import random_model
from test_numpy_model import numpy_model, random_tokens

from picogpt_jax.errors import UserError
from picogpt_jax.numpy_model import NumpyGPT
from picogpt_jax.runtime import NOISE_TOKENS, Noise, draw, evaluate, generate
from picogpt_jax.torch_model import Int8GPT

# Float activations, where the last bit of a sum cannot become a whole step of the grid and another token.
INT8 = random_model(activation_bits=None)
MODEL = numpy_model(INT8)


def greedy_without_cache(model: NumpyGPT, tokens_BT: np.ndarray, new: int, overflow: str) -> np.ndarray:
    """Recomputes the whole window for every token."""
    window_BT = tokens_BT[:, -model.block_size :]
    for _ in range(new):
        if window_BT.shape[1] > model.block_size:
            keep = model.block_size if overflow == "slide" else model.block_size // 2
            window_BT = window_BT[:, -keep:]
        token_B1 = model.forward(window_BT)[:, -1].argmax(-1)[:, None]
        window_BT, tokens_BT = np.concatenate([window_BT, token_B1], 1), np.concatenate([tokens_BT, token_B1], 1)
    return tokens_BT


@pytest.mark.parametrize("overflow", ["slide", "refill"])
@pytest.mark.parametrize("prompt_length", [1, 5, 16, 21])
def test_greedy_generation_is_that_of_full_recomputation_and_of_pytorch(overflow: Any, prompt_length: int) -> None:
    prompt_BT = random_tokens(2, prompt_length)
    found_BT = generate(MODEL, prompt_BT, 40, temperature=0.0, overflow=overflow)
    np.testing.assert_array_equal(found_BT, greedy_without_cache(MODEL, prompt_BT, 40, overflow))
    by_torch = Int8GPT(INT8).generate(torch.from_numpy(prompt_BT), 40, temperature=0.0, overflow=overflow)
    np.testing.assert_array_equal(found_BT, by_torch.numpy())


def test_every_token_is_streamed_as_soon_as_it_is_drawn() -> None:
    pieces: list[np.ndarray] = []
    text_BT = generate(MODEL, random_tokens(3, 4), 20, seed=1, stream=lambda piece: pieces.append(piece.copy()))
    assert [piece.shape for piece in pieces] == [(3, 1)] * 20
    np.testing.assert_array_equal(np.concatenate(pieces, 1), text_BT[:, 4:])
    np.testing.assert_array_equal(text_BT[:, :4], random_tokens(3, 4))


def test_the_seed_decides_and_the_rows_differ() -> None:
    prompt_BT = np.zeros((2, 1), np.int64)
    first, again, other = (generate(MODEL, prompt_BT, NOISE_TOKENS + 9, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[0] != first[1]).any()
    assert generate(MODEL, prompt_BT, 0).shape == (2, 1)


def test_draws_follow_the_softmax() -> None:
    logits_1V = np.array([[0.0, 1.0, 0.5, -1.0]], np.float32)

    def frequencies(temperature: float, top_k: int | None) -> list[float]:
        noise = Noise(0, 1, 4, temperature)
        drawn = [draw(logits_1V, noise.next(), top_k).item() for _ in range(20_000)]
        return (np.bincount(drawn, minlength=4) / len(drawn)).tolist()

    weights = np.exp(logits_1V[0] / 0.5)
    everything = (weights / weights.sum()).tolist()
    for top_k in (None, 0, 99):
        assert frequencies(0.5, top_k) == pytest.approx(everything, abs=0.02)
    share = 1 / (1 + math.exp(-0.5))
    assert frequencies(1.0, 2) == pytest.approx([0, share, 1 - share, 0], abs=0.02)
    for certain in (frequencies(0.0, None), frequencies(1.0, 1), frequencies(1e-50, None)):
        assert certain == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1 is negative"),
        ({"temperature": math.nan}, "temperature=nan is not a finite number >= 0"),
        ({"top_k": -1}, "top_k=-1 is negative"),
        ({"seed": -1}, r"seed=-1 is not in \[0, 2\*\*63\)"),
        ({"overflow": "stop"}, "overflow='stop' is not one of"),
        ({"tokens_BT": np.zeros((1, 0), np.int64)}, "the prompt has no tokens"),
        ({"tokens_BT": np.array([[3, 11]])}, "the prompt holds the token id 11; the vocabulary has ids 0 to 10"),
        ({"tokens_BT": np.array([[-2]])}, "the prompt holds the token id -2"),
    ],
)
def test_generation_refuses_what_it_cannot_do(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(MODEL, **{"tokens_BT": random_tokens(1, 2), "max_new_tokens": 1} | setting)


@pytest.mark.parametrize("length", [2, 16, 17, 18, 33, 100])
def test_evaluation_counts_every_target_once(length: int) -> None:
    data = random_tokens(1, length)[0].astype(np.uint16)
    expected = Int8GPT(INT8).evaluate(data, 16, batch_size=3)
    assert evaluate(MODEL, data, 16, batch_size=2) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "block_size", "message"),
    [
        (np.array([1], np.uint16), 16, r"found uint16 \[1\]; expected at least two token ids"),
        (np.array([1.0, 2.0]), 16, r"found float64 \[2\]"),
        (np.array([1, 2]), 17, "windows of 17 tokens; the model takes 1 to 16"),
        (np.array([1, 99]), 16, "the data holds the token id 99"),
    ],
)
def test_evaluation_refuses_what_it_cannot_do(tokens: np.ndarray, block_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(MODEL, tokens, block_size)
