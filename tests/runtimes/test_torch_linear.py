"""PyTorch's int8 product: the same integers by every kernel, and activations on their token's grid."""

import numpy as np
import pytest
import torch

from picogpt_jax.int8.int8_model import Int8Tensor
from picogpt_jax.runtimes import torch_linear
from picogpt_jax.runtimes.torch_linear import (
    EXACT_FEATURES,
    Int8Matrix,
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


@pytest.mark.parametrize("activation_bits", [8, None])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("n_scales", [1, 48])
def test_a_product_is_scaled_and_added(activation_bits: int | None, with_bias: bool, n_scales: int) -> None:
    generator = np.random.default_rng(0)
    scale = generator.uniform(0.001, 0.01, (n_scales, 1)).astype(np.float32)
    bias = generator.normal(size=48).astype(np.float32) if with_bias else None
    matrix = Int8Matrix(Int8Tensor(random_codes(48, 32).numpy(), scale), bias, activation_bits)
    x, residual = torch.randn(3, 32), torch.randn(3, 48)
    if activation_bits is None:
        expected = x @ matrix.codes.float().T * matrix.scale
    else:
        codes, token_scale = quantize_activations(x.clone())
        expected = (codes.int() @ matrix.codes.int().T).float() * token_scale * matrix.scale
    expected = expected if bias is None else expected + torch.from_numpy(bias)
    torch.testing.assert_close(matrix.multiply(x.clone()), expected)
    before = residual.clone()
    torch.testing.assert_close(matrix.multiply(x, residual), before + expected)
    torch.testing.assert_close(residual, before + expected, msg="in place")


def test_a_row_looked_up_often_is_dequantized_as_if_once() -> None:
    scale = torch.linspace(0.01, 0.02, 5)[:, None].numpy()
    table = Int8Matrix(Int8Tensor(random_codes(5, 8).numpy(), scale), None, None)
    ids = torch.tensor([[4, 0, 0], [1, 2, 2]])
    expected = table.codes.float() * table.scale[:, None]
    assert torch.equal(table.lookup(ids), expected[ids])
    assert torch.equal(table.lookup(ids[:, :1]), expected[ids[:, :1]])
    for outside in (ids - 1, ids[:1, :1] - 5):
        with pytest.raises(IndexError):
            table.lookup(outside)


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


@pytest.mark.parametrize("vnni", [False, True])
def test_the_int8_kernel_is_taken_where_the_processor_has_the_instructions(
    vnni: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_linear, "has_vnni", lambda: vnni)
    for name in ("product_by_int_mm", "product_by_float"):
        monkeypatch.setattr(torch_linear, name, lambda x, w, name=name: name)
    kernel = integer_product(random_codes(5, 33), random_codes(11, 33))
    assert kernel == ("product_by_int_mm" if vnni else "product_by_float")


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
