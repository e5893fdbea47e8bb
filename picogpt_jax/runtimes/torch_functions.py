"""The functions of integers in PyTorch, in float32 (extra: torch).

Those of "Version 2" of `picogpt_jax/int8/README.md`; a float32 holds their integers exactly:

- A shift, x / 2^s rounded, is `floor(x * 2^-s + 0.5)` for all |x| < 2^24 where s > 0. Where s <= 0 the sum is rounded
  from 2^23 on, which only a limit of 2^22 may follow.
- An exponent is carried as its power of two, which is read off the bits of a float.

What costs time is to pass over memory, so most operations are in place.

Shapes: T time (query), S time (key).
"""

import functools
import math

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("this needs PyTorch; install it with: pip install 'picogpt_jax[torch]'") from error

LARGEST_ROW = 1 << 15  # of numbers that have a factor in common
EXPONENT = 0x7F800000  # the bits of a float32's exponent
LARGEST_HIDDEN, FLAT = 32767, 1024  # of a GELU: the largest input, and where it is the identity or 0


@functools.lru_cache(None, typed=True)
def number(value: float) -> Tensor:
    """An int32 or a float32 without a dimension: PyTorch converts Python's numbers anew in every operation."""
    return torch.tensor(value, dtype=torch.int32 if type(value) is int else torch.float32)


@functools.cache
def halves(device: torch.device) -> Tensor:
    """As many 0.5 as a row may be long."""
    return torch.full((LARGEST_ROW,), 0.5, device=device)


def rounded(x: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor:
    """floor(x * factor + 0.5) in two passes, into `out`, which may be x.

    PyTorch vectorizes an operation if at most one operand is the same along the last dimension: `factor`, or 0.5.
    """
    half = halves(x.device)
    half = half[0] if factor.shape[-1] == x.shape[-1] else half[: x.shape[-1]]
    return torch.addcmul(half, x, factor, out=out).floor_()


def rounded_(x: Tensor, factor: Tensor) -> Tensor:
    """`rounded` in place."""
    return rounded(x, factor, x)


def largest(x: Tensor, dim: int = -1) -> Tensor:
    """max |x| over `dim`, which is kept."""
    return torch.maximum(x.amax(dim, keepdim=True), x.amin(dim, keepdim=True).neg_())  # no copy, as abs() makes


def fit(a: Tensor) -> Tensor:
    """2^t, t the smallest shift that makes codes of integers up to a.

    From 255/256 of a power of two on, a carry of the addition adds the one more.
    """
    bits = torch.add(a.view(torch.int32), number(1 << 16)).bitwise_and_(number(EXPONENT))
    return bits.view(torch.float32).mul_(number(2.0**-6)).clamp_min_(1)


def down(a: Tensor, length: int) -> Tensor:
    """2^(length - bits(a)), of integers a >= 1: it makes them numbers of `length` bits; of 0 it is infinite."""
    bits = torch.bitwise_and(a.view(torch.int32), number(EXPONENT))  # of 2^(bits(a) - 1)
    return torch.div(number(2.0 ** (length - 1)), bits.view(torch.float32))


def power(exponent: Tensor) -> Tensor:
    """2^exponent."""
    bits = torch.add(exponent.int(), number(127)).bitwise_left_shift_(number(23))
    return bits.view(torch.float32)


def exponent_of(power: Tensor) -> Tensor:
    """Of a power of two."""
    return torch.bitwise_right_shift(power.view(torch.int32), number(23)).sub_(number(127))


@functools.lru_cache(8)
def gelu_table(device: torch.device) -> Tensor:
    """GELU of -1024 to 32767, from 8 fraction bits to 10: to look it up takes half the time of computing it."""
    h = torch.arange(-FLAT, LARGEST_HIDDEN + 1, device=device)
    a = h.abs().clamp(max=FLAT)
    p = 4096 - ((a * (3276 + ((a * (4220 - ((a * 3908) >> 10))) >> 10))) >> 10)
    square = (p * p) >> 12
    return (4 * h.clamp(min=0) - ((a * ((square * square) >> 12) + 1024) >> 11)).float()


def gelu(u: Tensor) -> Tensor:
    """From 8 fraction bits to 10."""
    index = u.clamp_(-FLAT, LARGEST_HIDDEN).add_(number(float(FLAT))).to(torch.int32)
    return gelu_table(u.device).index_select(0, index.view(-1)).view(u.shape)


@functools.lru_cache(256)
def half_or_unseen(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What scores [T, S] start from: 0.5, and -infinity for keys after the query."""
    return torch.full((queries, keys), -math.inf, dtype=dtype, device=device).triu_(keys - queries + 1).add_(0.5)


def weights(z: Tensor) -> Tensor:
    """4096 * 2^-d, d from 0 to 15 * 256 by how much scores are below the row's largest; overwrites `z`.

    With c - (x >> 8) == (256 c + 255 - x) >> 8 there are fewer operations; 8 * 256 is in `i` for the last shift.
    """
    i = torch.sub(z.amax(-1, keepdim=True).add_(number(8.0 * 256)), z, out=z).clamp_max_((8 + 15) * 256).int()
    f = i & number(255)
    x = torch.sub(number(256 * 2753 + 255), f, alpha=705).bitwise_right_shift_(number(8)).mul_(f)
    p = torch.sub(number(256 * 4096 + 255), x, out=x).bitwise_right_shift_(i.bitwise_right_shift_(number(8)))
    return z.copy_(p)
