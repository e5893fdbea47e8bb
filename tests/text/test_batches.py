import math
from pathlib import Path

import numpy as np
import pytest

from picogpt_jax.errors import UserError
from picogpt_jax.text.batches import Tokens, batch_starts, evaluation_windows, padded_windows, target_count


def test_batches_are_a_function_of_seed_and_step() -> None:
    def starts(seed: int, step: int) -> list[int]:
        return batch_starts(seed, step, n_tokens=1000, batch_size=16, block_size=8).tolist()

    assert starts(1337, 5) == starts(1337, 5)
    batches = [starts(seed, step) for seed in (1337, 1338, 2**32 - 1) for step in (0, 1, 2, 10**9)]
    assert len(set(map(tuple, batches))) == len(batches), "every seed and every step has a batch of its own"


def test_the_batches_of_a_seed_never_change() -> None:
    """A run made with an earlier release resumes with the same batches. A change here breaks that promise."""
    assert batch_starts(1337, 0, 1_000_000, 4, 128).tolist() == [718098, 919498, 964033, 984275]


def test_starts_are_uniform_over_all_positions_and_no_others() -> None:
    n_tokens, block_size = 20, 8
    starts = np.concatenate([batch_starts(0, step, n_tokens, 64, block_size) for step in range(60)])
    values, counts = np.unique(starts, return_counts=True)
    assert values.tolist() == list(range(n_tokens - block_size)), "from the first token up to the last whole block"
    expected = len(starts) / len(values)
    assert np.abs(counts - expected).max() < 4 * np.sqrt(expected)


def test_the_shortest_text_has_one_block() -> None:
    assert batch_starts(0, 0, n_tokens=9, batch_size=3, block_size=8).tolist() == [0, 0, 0]


@pytest.mark.parametrize("n_tokens", [2, 8, 9, 10, 16, 17, 18, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_evaluation_covers_every_target_once(n_tokens: int, batch_size: int) -> None:
    block_size = 8
    ids = np.arange(n_tokens, dtype=np.uint16)  # every token is its own position
    batches = evaluation_windows(n_tokens, block_size, batch_size)
    assert batches.shape[1] == batch_size
    covered = []
    for starts in batches:
        inputs, targets = padded_windows(ids, starts, block_size)
        assert inputs.shape == targets.shape == (batch_size, block_size)
        assert inputs.dtype == targets.dtype == np.int32
        assert inputs.min() >= 0
        counted = targets >= 0
        np.testing.assert_array_equal(targets[counted], inputs[counted] + 1)  # the next token
        covered += targets[counted].tolist()
    assert covered == list(range(1, n_tokens)), "in order, none twice, none left out"
    windows = math.ceil((n_tokens - 1) / block_size)
    assert len(batches) == math.ceil(windows / batch_size), "no batch is empty"


def test_a_limited_evaluation_takes_whole_windows_spread_over_the_text() -> None:
    windows = evaluation_windows(n_tokens=1001, block_size=10, batch_size=4, max_windows=5)
    starts = windows[windows >= 0]
    assert starts.tolist() == [0, 240, 490, 740, 990]
    assert windows.shape == (2, 4)
    everything = evaluation_windows(n_tokens=1001, block_size=10, batch_size=4)
    np.testing.assert_array_equal(everything, evaluation_windows(1001, 10, 4, max_windows=100))


def write(folder: Path, ids: list[int]) -> None:
    np.array(ids, "<u2").tofile(folder / "train.bin")


def test_a_split_is_read_as_little_endian_uint16(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(bytes([1, 0, 0, 1, 255, 255]))
    tokens = Tokens.open(tmp_path, "train", block_size=2, vocab_size=1 << 16)
    assert tokens.ids.tolist() == [1, 256, 65535]
    assert len(tokens) == 3
    assert isinstance(tokens.ids, np.memmap), "a split of many gigabytes is not read as a whole"


def test_windows_are_the_tokens_from_each_start(tmp_path: Path) -> None:
    write(tmp_path, list(range(10)))
    tokens = Tokens.open(tmp_path, "train", block_size=4, vocab_size=10)
    windows = tokens.windows(np.array([[0, 5], [2, 6]]), 4)
    assert windows.dtype == np.uint16
    assert windows.tolist() == [[[0, 1, 2, 3], [5, 6, 7, 8]], [[2, 3, 4, 5], [6, 7, 8, 9]]]


def test_a_missing_split_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"val\.bin does not exist; give the full path of a folder that a data/\*/prepare\.py has written",
    ):
        Tokens.open(tmp_path, "val", block_size=4, vocab_size=10)


def test_a_split_of_half_a_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(bytes(101))
    with pytest.raises(UserError, match=r"train\.bin has 101 bytes; expected an even number"):
        Tokens.open(tmp_path, "train", block_size=4, vocab_size=10)


def test_a_split_shorter_than_a_block_and_its_last_target_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [0] * 5)
    assert len(Tokens.open(tmp_path, "train", block_size=4, vocab_size=10)) == 5
    with pytest.raises(UserError, match=r"has 10 bytes; .* at least 12 for one block of model\.block_size=5; .* lower"):
        Tokens.open(tmp_path, "train", block_size=5, vocab_size=10)
    write(tmp_path, [])
    with pytest.raises(UserError, match=r"has 0 bytes"):
        Tokens.open(tmp_path, "train", block_size=1, vocab_size=10)


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [0] * 50 + [10])
    assert len(Tokens.open(tmp_path, "train", block_size=4, vocab_size=11)) == 51
    with pytest.raises(UserError, match=r"holds token id 10; the vocabulary has 10: prepare the data again"):
        Tokens.open(tmp_path, "train", block_size=4, vocab_size=10)


@pytest.mark.parametrize("n_tokens", [2, 9, 17, 20])
def test_targets_are_counted_as_they_are_filled_in(n_tokens: int) -> None:
    ids = np.zeros(n_tokens, np.uint16)
    for starts in evaluation_windows(n_tokens, block_size=8, batch_size=2):
        assert target_count(n_tokens, starts, 8) == (padded_windows(ids, starts, 8)[1] >= 0).sum()


def test_two_texts_have_two_fingerprints(tmp_path: Path) -> None:
    ids = np.arange(6000, dtype="<u2")
    one = Tokens(ids, tmp_path).fingerprint()
    assert Tokens(ids.copy(), tmp_path).fingerprint() == one
    assert Tokens(ids[:-1], tmp_path).fingerprint() != one
    assert Tokens(ids[::-1], tmp_path).fingerprint() != one
