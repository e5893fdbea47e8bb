"""An int8 matrix in PyTorch: linear layer and embedding table, multiplied int8 by int8 (extra: torch).

A matmul quantizes the activations that enter it, one scale per token, multiplies int8 by int8 with an exact int32 sum,
and then goes back to float32: y = int32 * activation_scale * weight_scale + bias. Two kernels compute the same sum:
`torch._int_mm`, fast on CUDA and on CPUs with int8 dot products and 40 times slower than float on others; and a float32
product of the codes, exact because a sum of 1,040 products of codes stays below 2**24.

Shapes: N rows (tokens), I input features, O output features of a matmul.
"""

import contextlib
from collections.abc import Iterator

import numpy as np

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("this needs PyTorch; install it with: pip install 'picogpt_jax[torch]'") from error

from picogpt_jax.devices.cpu import has_vnni
from picogpt_jax.int8.int8_model import MAX_CODE, SMALLEST_ABSMAX, Int8Tensor

Operand = tuple[Tensor, ...]  # codes and scales of activations, or activations alone

EXACT_FEATURES = 2**24 // MAX_CODE**2  # 1040: as many products of two codes sum up exactly in float32


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """One scale per token: scale = absmax * float32(1 / 127), codes = round_half_to_even(x * (1 / scale)).

    Nothing is clipped: |x| * (1 / scale) is at most a few roundings above 127, and rounds to 127.

    Args:
        x: float32 [..., I]; overwritten, as fresh memory costs as much as the product.

    Returns:
        int8 codes [..., I] and float32 scales [..., 1]; a token of zeros has scale 1 / 127.
    """
    absmax = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())  # no copy, as abs() makes
    scale = absmax.masked_fill_(absmax < float(SMALLEST_ABSMAX), 1.0).mul_(1.0 / MAX_CODE)
    codes = x.mul_(scale.reciprocal()).round_()
    return codes.to(torch.int8), scale


def integer_product(x_NI: Tensor, w_OI: Tensor) -> Tensor:
    """x w^T of int8 codes, summed exactly in int32, as float32 [N, O]; by whichever kernel is fast here."""
    if x_NI.is_cuda:
        return product_by_int_mm(*_aligned(x_NI, w_OI))[: len(x_NI), : len(w_OI)]
    if x_NI.device.type == "cpu" and has_vnni():
        return product_by_int_mm(x_NI, w_OI)
    return product_by_float(x_NI, w_OI)


def product_by_int_mm(x_NI: Tensor, w_OI: Tensor) -> Tensor:
    """`integer_product` by PyTorch's int8 kernel."""
    if x_NI.shape[1] == 1:  # that kernel then writes no result at all
        return x_NI.float() * w_OI.float().T
    sums_NO = torch._int_mm(x_NI, w_OI.T)
    return sums_NO.view(torch.float32).copy_(sums_NO)  # in place: fresh memory costs as much as the conversion


def product_by_float(x_NI: Tensor, w_OI: Tensor) -> Tensor:
    """`integer_product` by float32 products of as many features as sum up exactly."""
    features = x_NI.shape[1]
    if features <= EXACT_FEATURES:
        return x_NI.float() @ w_OI.float().T
    starts = range(0, features, EXACT_FEATURES)
    parts = (x_NI[:, i : i + EXACT_FEATURES].float() @ w_OI[:, i : i + EXACT_FEATURES].float().T for i in starts)
    total = torch.zeros(len(x_NI), len(w_OI), dtype=torch.int32, device=x_NI.device)
    for part in parts:
        total += part.int()
    return total.float()


def _aligned(x_NI: Tensor, w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Pads with zeros to what `torch._int_mm` asks for on CUDA: more than 16 rows, the other sizes multiples of 8."""
    features = -x_NI.shape[1] % 8
    x_rows, w_rows = max(17 - len(x_NI), 0), -len(w_OI) % 8
    return F.pad(x_NI, (0, features, 0, x_rows)), F.pad(w_OI, (0, features, 0, w_rows))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes with one thread until the end of the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Int8Matrix(nn.Module):
    """int8 codes [rows, cols] with their scales: a linear layer, an embedding table, or both (the tied head).

    It is not called, but `multiply` and `lookup` are.

    Args:
        tensor: codes and scales.
        bias: float32 [rows].
        activation_bits: 8, or None for float32 activations.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, tensor: Int8Tensor, bias: np.ndarray | None, activation_bits: int | None) -> None:
        super().__init__()
        self.activation_bits = activation_bits
        self.register_buffer("codes", torch.tensor(tensor.codes))
        self.register_buffer("scale", torch.tensor(tensor.scale[:, 0]))  # [rows], or [1] for one in all
        self.register_buffer("bias", None if bias is None else torch.tensor(bias))

    def lookup(self, ids: Tensor) -> Tensor:
        """float32 [..., cols]: the rows `ids`, dequantized."""
        scale = self.scale[:, None]
        if ids.numel() >= len(self.codes):  # each row once, not each time that it occurs
            return F.embedding(ids, self.codes.float() * scale)
        return F.embedding(ids, self.codes).float() * (scale if len(scale) == 1 else F.embedding(ids, scale))

    def multiply(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """float32 [..., cols], which is overwritten, -> float32 [..., rows]; `residual` as in `product`."""
        operand = self.operand(x)
        del x  # where nobody else holds it, the result takes its place in memory, and in the cache
        return self.product(operand, residual)

    def operand(self, x: Tensor) -> Operand:
        """What is multiplied for `x`, float32 [..., cols], which is overwritten."""
        return (x,) if self.activation_bits is None else quantize_activations(x)

    def product(self, operand: Operand, residual: Tensor | None = None) -> Tensor:
        """float32 [..., rows]: an operand times the matrix, added to `residual` in place where there is one."""
        x, *token_scale = operand
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO = integer_product(x_NI, self.codes) if token_scale else x_NI @ self.codes.float().T
        y = y_NO.view(*x.shape[:-1], -1)
        for scale in (*token_scale, self.scale):
            y.mul_(scale)
        if self.bias is not None:
            y += self.bias
        return y if residual is None else residual.add_(y)
