"""The integer model in PyTorch: the same bits as NumPy, by the instructions that are fast here (extra: torch).

It computes "Version 2" of `picogpt_jax/int8/README.md`, which names every step. Weights are multiplied as int8
(`runtimes.torch_linear`), the rest is float32 (`runtimes.torch_functions`). Where there is a choice, the longest
dimension is the last one: a reduction, or a factor, over a short one is slow. Attention takes some queries at a time.

Shapes: B batch, T time (query), S time (key), C width, H heads, D head size, V vocabulary, L layers; N tokens (B T);
I inputs, O outputs; K 1 or 2 of queries, keys, values.
"""

import contextlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("this needs PyTorch; install it with: pip install 'picogpt_jax[torch]'") from error

from picogpt_jax.config import ModelConfig
from picogpt_jax.devices.cpu import is_small_call
from picogpt_jax.int8.integer_model import HEAD_BITS, HIDDEN_BITS, NORM_BITS, RESIDUAL_BITS, IntegerModel
from picogpt_jax.runtimes.torch_functions import (
    down,
    exponent_of,
    fit,
    gelu,
    half_or_unseen,
    largest,
    number,
    power,
    rounded,
    rounded_,
    weights,
)
from picogpt_jax.runtimes.torch_linear import EXACT_FEATURES, integer_product, one_thread

LIMIT = 2.0**22  # of a fixed-point value
LARGEST = 2.0**23 - 1  # of the residual stream
SCORES_AT_ONCE = 1 << 19  # as many stay in the cache between two operations


class Matrix(nn.Module):
    """int8 codes [O, I] and exponents: a linear layer, an embedding table, or both (the tied head).

    Args:
        name: of the module in the file.
        fraction_bits: of the outputs, less those of the inputs that the inputs' scale does not count.
        rows: a part of the matrix.
    """

    codes: Tensor
    exponent: Tensor
    bias: Tensor | None
    scale: Tensor

    def __init__(self, model: IntegerModel, name: str, fraction_bits: int, rows: slice = slice(None)) -> None:
        super().__init__()
        exponent, bias = model.tensors[f"{name}.weight_exponent"][:, 0], model.tensors.get(f"{name}.bias")
        self.register_buffer("codes", torch.tensor(model.tensors[f"{name}.weight"][rows]))
        self.register_buffer("exponent", torch.tensor(exponent if len(exponent) == 1 else exponent[rows]))
        self.register_buffer("bias", None if bias is None else torch.tensor(bias[rows]))
        self.register_buffer("scale", power(self.exponent) * 2.0**fraction_bits, persistent=False)

    def lookup(self, ids: Tensor) -> Tensor:
        """The rows `ids`, float32 [..., I], with the fraction bits of the outputs."""
        scale = (self.scale if len(self.scale) == 1 else self.scale[ids])[..., None]
        return rounded_(self.codes[ids].float(), scale).clamp_(-LIMIT, LIMIT)

    def forward(self, x_NI: Tensor, scale_N1: Tensor) -> Tensor:
        """Of int8 codes and the scales of the tokens: float32 [N, O]."""
        acc_NO = sums(x_NI, self.codes).mul_(scale_N1)
        y_NO = rounded_(acc_NO, self.scale.to(acc_NO.dtype)).clamp_(-LIMIT, LIMIT).float()
        return y_NO if self.bias is None else y_NO.add_(self.bias)

    def transposed(self, x_NI: Tensor, scale_N1: Tensor) -> Tensor:
        """The same, [O, N]."""
        acc_ON = sums(self.codes, x_NI).mul_(self.scale[:, None])
        y_ON = rounded_(acc_ON, scale_N1.view(-1).to(acc_ON.dtype)).clamp_(-LIMIT, LIMIT).float()
        return y_ON if self.bias is None else y_ON.add_(self.bias[:, None])


def sums(x_NI: Tensor, w_OI: Tensor) -> Tensor:
    """x w^T of codes, float32, or float64 where float32 cannot hold it."""
    if x_NI.shape[1] <= EXACT_FEATURES:
        return integer_product(x_NI, w_OI)
    parts = zip(x_NI.split(EXACT_FEATURES, 1), w_OI.split(EXACT_FEATURES, 1), strict=True)
    return torch.stack([integer_product(x, w).double() for x, w in parts]).sum(0)


class Norm(nn.Module):
    """LayerNorm, quantized."""

    weight: Tensor
    exponent: Tensor
    bias: Tensor | None
    factor: Tensor
    scale: Tensor

    def __init__(self, model: IntegerModel, name: str) -> None:
        super().__init__()
        bias = model.tensors.get(f"{name}.bias")
        self.register_buffer("weight", torch.tensor(model.tensors[f"{name}.weight"]))
        self.register_buffer("exponent", torch.tensor(model.tensors[f"{name}.weight_exponent"]))
        self.register_buffer("bias", None if bias is None else torch.tensor(bias))
        self.width = width = len(self.weight)
        self.v = 5 if width <= 1024 else 6 if width <= 4096 else 7
        k = (40 - width.bit_length()) >> 1
        self.K = float(math.isqrt(width << (2 * k)))
        self.is_plain = bool((self.weight == 4096).all())  # as where it was multiplied into the next matrix
        self.register_buffer("factor", self.weight.float() * 2.0**-12, persistent=False)
        self.register_buffer("scale", power(self.exponent) * 2.0 ** (12 - k - self.v), persistent=False)

    def forward(self, x_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """int8 codes [N, C] and their scales [N, 1]."""
        x_NC = x_BTC.flatten(0, 1)
        d = rounded(x_NC, down(largest(x_NC), 11).clamp_max_(LIMIT))
        total = d.sum(-1, keepdim=True).int()
        total = torch.add(total, total.sign(), alpha=self.width >> 1)
        d.sub_(total.div_(number(self.width), rounding_mode="trunc"))
        variance = torch.mul(d, number(2.0**-self.v)).add_(number(0.5)).floor_().square_().sum(-1, keepdim=True)
        deviation = variance.clamp_min_(1).double().sqrt_().float()  # in float32 it may be wrong in the last bit
        size = down(deviation, 12)  # 2^j
        q = deviation.mul_(size).floor_()
        r = torch.mul(q, number(0.5)).floor_().add_(number(self.K)).div_(q).floor_()
        if not self.is_plain:
            rounded_(d, self.factor)
        scale = size.mul_(self.scale)
        if self.bias is None:
            t = fit(largest(d).mul_(r))
            return rounded_(d, r.div_(t)).to(torch.int8), scale.mul_(t)
        u = rounded_(d, r.mul_(scale).mul_(number(2.0**NORM_BITS))).clamp_(-LIMIT, LIMIT).add_(self.bias)
        t = fit(largest(u))
        return rounded_(u, t.reciprocal()).to(torch.int8), t.mul_(number(2.0**-NORM_BITS))


class Cache:
    """Of each layer the codes and exponents of keys and values: int8 [L, 2, B, H, D and 1, block_size]."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device) -> None:
        shape = (config.n_layer, 2, batch, config.n_head, config.head_size + 1, config.block_size)
        self.codes, self.exponents = torch.zeros(shape, dtype=torch.int8, device=device).tensor_split((-1,), 4)
        self.length = 0

    def extend(self, layer: int, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's next positions, returns all so far; the model moves `length` on after the last layer."""
        end = self.length + codes.shape[-1]
        self.codes[layer, ..., self.length : end] = codes
        self.exponents[layer, ..., self.length : end] = exponent_of(scales)
        return self.codes[layer, ..., :end].float(), power(self.exponents[layer, ..., :end])


class Attention(nn.Module):
    """Causal attention, up to the codes that `attn.c_proj` multiplies."""

    def __init__(self, model: IntegerModel, layer: int) -> None:
        super().__init__()
        config, name = model.model, f"transformer.h.{layer}.attn.c_attn"
        self.layer, self.n_head, self.head_size = layer, config.n_head, config.head_size
        queries, others = slice(config.n_embd), slice(config.n_embd, None)
        self.query, self.key_value = (Matrix(model, name, HEAD_BITS, rows) for rows in (queries, others))
        most = 127 * 127 * config.head_size
        self.cap = (24 - most.bit_length()) >> 1
        # Scores from 2^23 on, which float32 cannot add 0.5 to, are even numbers in smaller heads: then it rounds well.
        self.dtype = torch.float64 if most >= 1 << 23 else torch.float32
        self.weight_bits = 8 - max((config.block_size - 1) // 512, 0).bit_length()

    def forward(
        self, codes_NC: Tensor, scale_N1: Tensor, batch: int, cache: Cache | None, last_only: bool
    ) -> tuple[Tensor, Tensor]:
        """int8 codes [N, C] and their scales [N, 1]; the queries are the last T of the S positions."""
        kept = [part.unflatten(0, (batch, -1))[:, -1] if last_only else part for part in (codes_NC, scale_N1)]
        (q_BHDT,), (tq,) = self._heads(self.query.transposed(*kept), batch)
        kv, t = self._heads(self.key_value.transposed(codes_NC, scale_N1), batch)
        if cache is not None:
            kv, t = cache.extend(self.layer, kv, t)
        (k_BHDS, v_BHDS), (tk, tv) = kv, t
        q_NDT, k_NDS = (self._scaled(*operand) for operand in ((q_BHDT, tq), (k_BHDS, tk)))
        v_NDS, tv_N1S = v_BHDS.flatten(0, 1), tv.flatten(0, 1)
        queries, keys = q_NDT.shape[2], k_NDS.shape[2]
        rows = max(SCORES_AT_ONCE // (len(q_NDT) * keys), 16)
        parts = []
        for first in range(0, queries, rows):
            end = min(first + rows, queries)
            seen = keys - queries + end
            z = self._scores(q_NDT[:, :, first:end], k_NDS[:, :, :seen])
            parts.append(self._sums(weights(z), v_NDS[:, :, :seen], tv_N1S[:, :, :seen]))
        o, den, top = (torch.cat(part, -1).unflatten(0, (batch, -1)) for part in zip(*parts, strict=True))
        return self._joined(o, den, top)

    def _heads(self, y_ON: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Quantizes each head: codes as float32 [K, B, H, D, T], and their scales [K, B, H, 1, T]."""
        heads = y_ON.view(-1, self.n_head, self.head_size, y_ON.shape[1])
        t = fit(largest(heads, 2))
        parts = (rounded_(heads, t.reciprocal()), t)
        codes, t = (part.unflatten(3, (batch, -1)).permute(0, 3, 1, 2, 4) for part in parts)
        return codes, t

    def _scaled(self, codes_BHDT: Tensor, t: Tensor) -> Tensor:
        """What two of are multiplied to scores with 8 fraction bits, [B H, D, T]."""
        factor = t.mul(number(2.0**-8)).clamp_max_(2.0**self.cap)
        scaled = torch.empty(codes_BHDT.shape, dtype=self.dtype, device=t.device)
        return torch.mul(codes_BHDT, factor, out=scaled).flatten(0, 1)

    def _scores(self, q_NDT: Tensor, k_NDS: Tensor) -> Tensor:
        shape = q_NDT.shape[2], k_NDS.shape[2]
        start_TS = half_or_unseen(*shape, self.dtype, q_NDT.device)
        return torch.baddbmm(start_TS.expand(len(q_NDT), *shape), q_NDT.mT, k_NDS).floor_().float()

    def _sums(self, p: Tensor, v_NDS: Tensor, tv_N1S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sums of values [B H, D, T], and [B H, 1, T] the sums of the weights and the powers of their unit."""
        den = p.sum(-1, keepdim=True)
        p.mul_(tv_N1S)
        unit = down(p.amax(-1, keepdim=True), self.weight_bits)
        w_NTS = rounded_(p, unit).clamp_max_(2**self.weight_bits - 1)
        return v_NDS @ w_NTS.mT, den.mT, unit.reciprocal_().mT

    def _joined(self, o_BHDT: Tensor, den: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """Divides by the sums of the weights `den`, and quantizes the heads of a token together."""
        n = down(largest(o_BHDT, 2), 15).clamp_max_(1)
        o = rounded_(o_BHDT, n)
        dt = down(den, 8)
        narrow = den.mul_(dt).add_(number(0.5)).floor_()
        r = torch.mul(narrow, number(0.5)).floor_().add_(number(2.0**15)).div_(narrow).floor_()
        scale = top.div_(n).mul_(dt).mul_(number(2.0 ** -(HEAD_BITS + 15)))
        a = largest(o, 2).mul_(r)
        t = fit(a).mul_(scale).masked_fill_(a == 0, 0).amax(1, keepdim=True)
        t.masked_fill_(t == 0, 1)
        codes_BHDT = rounded_(o, r.mul_(scale).div_(t)).to(torch.int8)
        codes_CN = codes_BHDT.permute(1, 2, 0, 3).reshape(self.n_head * self.head_size, -1)
        codes_NC = codes_CN.T if codes_CN.shape[1] > 1 else codes_CN.view(1, -1)  # of strides (1, 1) the sums are wrong
        return codes_NC, t.view(-1, 1)


class Block(nn.Module):
    """A pre-LayerNorm transformer block."""

    def __init__(self, model: IntegerModel, layer: int) -> None:
        super().__init__()
        name, activation = f"transformer.h.{layer}", model.model.activation
        self.is_relu = activation == "relu"
        self.ln_1, self.ln_2 = Norm(model, f"{name}.ln_1"), Norm(model, f"{name}.ln_2")
        self.attention = Attention(model, layer)
        self.attn_proj = Matrix(model, f"{name}.attn.c_proj", RESIDUAL_BITS)
        self.c_fc = Matrix(model, f"{name}.mlp.c_fc", HIDDEN_BITS[activation])
        self.mlp_proj = Matrix(model, f"{name}.mlp.c_proj", 0)  # the hidden units have RESIDUAL_BITS as well

    def forward(self, x_BTC: Tensor, cache: Cache | None, last_only: bool) -> Tensor:
        """`last_only`: the last position's values only, [B, 1, C]; the cache takes all keys and values."""
        y_NC = self.attn_proj(*self.attention(*self.ln_1(x_BTC), len(x_BTC), cache, last_only))
        x_BTC = x_BTC[:, -1:] if last_only else x_BTC
        x_BTC = y_NC.view(x_BTC.shape).add_(x_BTC).clamp_(-LARGEST, LARGEST)
        h_NF = self.c_fc(*self.ln_2(x_BTC))
        h_NF = h_NF.clamp_min_(0) if self.is_relu else gelu(h_NF)
        t = fit(largest(h_NF))
        y_NC = self.mlp_proj(rounded_(h_NF, t.reciprocal()).to(torch.int8), t)
        return x_BTC.add_(y_NC.view(x_BTC.shape)).clamp_(-LARGEST, LARGEST)


class IntegerGPT(nn.Module):
    """The integer model; it has buffers only, and those of its state are the integers of the file.

    Attributes:
        config: the architecture.
    """

    def __init__(self, model: IntegerModel) -> None:
        super().__init__()
        self.config = model.model
        self.wte, self.wpe = (Matrix(model, f"transformer.{name}", RESIDUAL_BITS) for name in ("wte", "wpe"))
        self.h = nn.ModuleList([Block(model, layer) for layer in range(self.config.n_layer)])
        self.ln_f = Norm(model, "transformer.ln_f")
        self._bytes = model.n_bytes

    def forward(self, tokens_BT: Tensor, cache: Cache | None = None, last_only: bool = False) -> Tensor:
        """Logits of the next token at every position, float32 [B, T, V], or [B, 1, V]; see `loop.Runtime`.

        Raises:
            ValueError: the positions do not fit into `block_size`.
        """
        first = 0 if cache is None else cache.length
        end = first + tokens_BT.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} positions do not fit into block_size={self.config.block_size}")
        is_small = tokens_BT.device.type == "cpu" and is_small_call(tokens_BT.numel(), self._bytes)
        with one_thread() if is_small else contextlib.nullcontext():
            x_BTC = self.wte.lookup(tokens_BT).add_(self.wpe.lookup(torch.arange(first, end, device=tokens_BT.device)))
            for layer, block in enumerate(self.h):
                x_BTC = block(x_BTC, cache, last_only and layer == len(self.h) - 1)
            if cache is not None:
                cache.length = end
            logits_NV = self.wte(*self.ln_f(x_BTC)).mul_(number(2.0**-RESIDUAL_BITS))
            return logits_NV.view(*x_BTC.shape[:2], -1)


class TorchIntegerGPT:
    """The integer model as a `picogpt_jax.runtimes.loop.Runtime`: NumPy arrays in and out.

    Attributes:
        network: the `IntegerGPT` that computes, on whichever device.
    """

    windows_at_once = 1

    def __init__(self, model: IntegerModel) -> None:
        self.network = IntegerGPT(model)
        self.block_size, self.vocab_size = model.model.block_size, model.model.vocab_size

    def new_cache(self, batch: int) -> Cache:
        """A cache of no positions."""
        return Cache(self.network.config, batch, self.network.wte.codes.device)

    @torch.no_grad()
    def forward(
        self, tokens_BT: npt.NDArray[np.int64], cache: Any = None, last_only: bool = False
    ) -> npt.NDArray[np.float32]:
        """Logits of the next token at every position, float32 [B, T, V]; see `picogpt_jax.runtimes.loop.Runtime`."""
        logits_BTV: Tensor = self.network(
            torch.from_numpy(tokens_BT).to(self.network.wte.codes.device), cache, last_only
        )
        return logits_BTV.cpu().numpy()
