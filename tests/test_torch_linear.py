"""PyTorch's int8 product: the same integers by every kernel, and activations on their token's grid."""

import numpy as np
import pytest
import torch

from picogpt_jax.torch_linear import (
    EXACT_FEATURES,
    _aligned,
    integer_product,
    product_by_float,
    product_by_int_mm,
    quantize_activations,
)


def random_codes(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (rows, cols), dtype=torch.int8, generator=generator)


@pytest.mark.parametrize(
    ("rows", "features", "outputs"), [(1, 32, 96), (5, 33, 11), (64, 192, 65), (3, EXACT_FEATURES + 1, 9), (2, 3072, 8)]
)
def test_every_kernel_gives_the_same_integers(rows: int, features: int, outputs: int) -> None:
    x, w = random_codes(rows, features, 1), random_codes(outputs, features, 2)
    expected = (x.int() @ w.int().T).float()
    assert torch.equal(product_by_float(x, w), expected)
    assert torch.equal(product_by_int_mm(x, w), expected)
    assert torch.equal(product_by_int_mm(*_aligned(x, w))[:rows, :outputs], expected)
    assert torch.equal(integer_product(x, w), expected)


@pytest.mark.parametrize("features", [EXACT_FEATURES, EXACT_FEATURES + 1, 4096])
def test_the_float_kernel_is_exact_at_the_largest_sums(features: int) -> None:
    """An odd sum above 2**24 has no float32: it must be added up as an integer and rounded once."""
    x, w = torch.full((1, features), 127, dtype=torch.int8), torch.full((1, features), 127, dtype=torch.int8)
    w[0, 0] = 126
    assert product_by_float(x, w).item() == np.float32(features * 127 * 127 - 127)


def test_the_aligned_operands_are_what_cuda_asks_for() -> None:
    x, w = _aligned(random_codes(1, 33), random_codes(11, 33))
    assert x.shape == (17, 40)
    assert w.shape == (16, 40)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_integers() -> None:
    x, w = random_codes(5, 33), random_codes(11, 33)
    assert torch.equal(integer_product(x.cuda(), w.cuda()).cpu(), (x.int() @ w.int().T).float())


def test_activations_are_rounded_half_to_even_on_the_grid_of_their_token() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0], [-3.0, 1.0, 2.0, 3.0], [1e-44, 0.0, 0.0, 0.0]])
    codes, scale = quantize_activations(x)
    assert codes.dtype == torch.int8
    assert codes[0].tolist() == [127, 0, 2, -2]
    assert codes[1].tolist() == codes[3].tolist() == [0, 0, 0, 0]
    assert codes[2].tolist() == [-127, 42, 85, 127]
    expected = [np.float32(absmax) * np.float32(1 / 127) for absmax in (127, 1, 3, 1)]
    assert scale[:, 0].tolist() == [float(value) for value in expected]
