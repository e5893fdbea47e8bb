"""The generation and evaluation loops of the runtimes without their own; here with NumPy's."""

import collections
import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from test_int8_model import random_model
from test_numpy_model import numpy_model, random_tokens

from picogpt_jax.errors import UserError
from picogpt_jax.runtimes.draws import AT_ONCE
from picogpt_jax.runtimes.engine import Sampling
from picogpt_jax.runtimes.loop import evaluate, generate, pieces
from picogpt_jax.runtimes.numpy_model import KVCache, NumpyGPT
from picogpt_jax.runtimes.torch_model import Int8GPT

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


class TwoAtATime:
    """A runtime like `MODEL`, of which two threads may compute at a time; calls of `fails` threads end in an error."""

    windows_at_once = 2
    block_size, vocab_size = MODEL.block_size, MODEL.vocab_size

    def __init__(self, fails: str | None = None) -> None:
        self.fails, self.lengths = fails, collections.Counter[int]()

    def new_cache(self, batch: int) -> KVCache:
        return MODEL.new_cache(batch)

    def forward(
        self, tokens_BT: npt.NDArray[np.int64], cache: KVCache | None = None, last_only: bool = False
    ) -> npt.NDArray[np.float32]:
        name, length = threading.current_thread().name, tokens_BT.shape[1]
        if self.fails is not None and name.startswith(self.fails) and self.lengths[self.block_size - 1] > 4:
            raise RuntimeError(name)
        self.lengths[length] += 1
        return MODEL.forward(tokens_BT, cache, last_only)


@pytest.mark.parametrize("new", [13, 14, 16, 17, 40, 41])
def test_windows_begun_early_are_the_windows_one_by_one(new: int) -> None:
    prompt_BT, model = random_tokens(1, 3), TwoAtATime()
    text_BT = generate(model, prompt_BT, new, seed=3)
    np.testing.assert_array_equal(text_BT, generate(MODEL, prompt_BT, new, seed=3))
    assert model.lengths[MODEL.block_size - 1] == max(new - 14, 0), "begun without its newest token, each once"
    assert model.lengths[MODEL.block_size] == 0


@pytest.mark.parametrize("fails", ["MainThread", "windows"])
def test_a_failure_in_either_thread_ends_both(fails: str) -> None:
    with pytest.raises(RuntimeError, match=fails):
        generate(TwoAtATime(fails), random_tokens(1, 20), 50)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("windows")]


def test_a_reader_that_leaves_ends_both_threads() -> None:
    text = pieces(TwoAtATime(), random_tokens(1, 20), Sampling(50))
    for _ in range(9):
        next(text)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("windows")], "a control"
    del text
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("windows")]


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_several_streams_take_no_turns(at_once: int) -> None:
    model = TwoAtATime()
    model.windows_at_once = at_once
    found_BT = generate(model, random_tokens(2, 20), 5, temperature=0.0)
    np.testing.assert_array_equal(found_BT, generate(MODEL, random_tokens(2, 20), 5, temperature=0.0))
    assert set(model.lengths) == {MODEL.block_size}


def test_every_token_comes_as_soon_as_it_is_drawn() -> None:
    model, prompt_BT = TwoAtATime(), random_tokens(3, 4)
    text, found = pieces(model, prompt_BT, Sampling(20, seed=1)), [prompt_BT]
    for count in range(1, 21):
        found.append(next(text))
        assert model.lengths.total() == count, "no later token has been computed"
    assert next(text, None) is None
    np.testing.assert_array_equal(np.concatenate(found, 1), generate(MODEL, prompt_BT, 20, seed=1))


def test_the_seed_decides_and_the_rows_differ() -> None:
    prompt_BT = np.zeros((2, 1), np.int64)
    first, again, other = (generate(MODEL, prompt_BT, AT_ONCE + 9, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[0] != first[1]).any()
    assert generate(MODEL, prompt_BT, 0).shape == (2, 1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1 is negative"),
        ({"temperature": math.nan}, "temperature=nan is not a number from 0 to 1e30"),
        ({"temperature": 1e39}, r"temperature=1e\+39 is not a number from 0 to 1e30"),
        ({"top_k": -1}, "top_k=-1 is negative"),
        ({"seed": -1}, r"seed=-1 is not in \[0, 2\*\*32\)"),
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
