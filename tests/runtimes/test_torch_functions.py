"""The functions of integers in PyTorch against NumPy's and against their definition."""

import numpy as np
import pytest
import torch

from picogpt_jax.runtimes import numpy_integer
from picogpt_jax.runtimes.torch_functions import down, exponent_of, fit, gelu, power, rounded, weights


def test_powers_of_two_are_read_off_a_float() -> None:
    a = np.arange(1, 1 << 17, dtype=np.int32)
    floats = torch.from_numpy(a).float()
    np.testing.assert_array_equal(fit(floats).numpy(), 2.0 ** numpy_integer.fit(a[:, None])[:, 0])
    np.testing.assert_array_equal(down(floats, 11).numpy(), 2.0 ** (11 - numpy_integer.bits(a)))
    assert fit(torch.zeros(1)) == 1
    assert down(torch.zeros(1), 11) == torch.inf
    exponents = torch.arange(-100, 100, dtype=torch.int8)
    assert torch.equal(power(exponents), 2.0 ** exponents.float())
    assert torch.equal(exponent_of(power(exponents)), exponents.int())


@pytest.mark.parametrize("s", [1, 2, 3, 11, 22, 23, 24, 25, 30, 31])
def test_a_shift_to_the_right_is_exact_up_to_the_largest_sum(s: int) -> None:
    generator = np.random.default_rng(s)
    most = 127 * 127 * 1040
    near_halves = (np.arange(-999, 999)[:, None] * 2**s + 2 ** (s - 1) + np.arange(-1, 2)).ravel()
    ends = [most - np.arange(9), np.arange(9) - most]
    x = np.concatenate([generator.integers(-most, most + 1, 10_000), *ends, near_halves])
    x = x[np.abs(x) <= most]
    floats, factor = torch.from_numpy(x).float()[:, None], torch.full((len(x), 1), 2.0**-s)
    expected = (x + (1 << (s - 1))) >> s
    np.testing.assert_array_equal(rounded(floats, factor)[:, 0].numpy(), expected)
    np.testing.assert_array_equal(numpy_integer.shift(x.astype(np.int32), s), expected)


def test_rounding_is_the_same_whichever_dimension_the_factor_has() -> None:
    x = torch.arange(-60, 60).float().view(10, 12)
    row, column = 2.0 ** -(torch.arange(12) % 4).float(), 2.0 ** -(torch.arange(10) % 4).float()[:, None]
    assert torch.equal(rounded(x, row), (x * row + 0.5).floor())
    assert torch.equal(rounded(x, column), (x * column + 0.5).floor())


def test_gelu_is_numpys() -> None:
    u = np.concatenate([np.arange(-40_000, 40_000), [-(1 << 22), 1 << 22]]).astype(np.int32)
    np.testing.assert_array_equal(gelu(torch.from_numpy(u).float()).numpy(), numpy_integer.gelu(u))


def test_weights_of_scores_are_the_specifications() -> None:
    d = np.arange(15 * 256 + 1)
    f = d & 255
    expected = (4096 - ((f * (2753 - ((705 * f) >> 8))) >> 8)) >> (d >> 8)
    found = weights(torch.tensor(np.append(1000 - d, [-1e7, -np.inf]), dtype=torch.float32)[None])
    np.testing.assert_array_equal(found[0].numpy(), np.append(expected, [0, 0]))
