"""The integer model in PyTorch: the same bits as NumPy, by the instructions that are fast here (extra: torch).

It computes "Version 2" of `picogpt_jax/int8/README.md`, which names every step. Weights are multiplied as int8
(`runtimes.torch_linear`); everything else is float32, which holds the integers exactly. So

- a shift to the right, and a saturating one to the left, is `floor(x * 2^-s + 0.5)`, for all |x| < 2^24: what a float32
  cannot hold after it lies above 2^23 and is limited to 2^22 there;
- an exponent is carried as the power of two that it stands for: a float whose fraction is zero. `fit` and
  `above` read it off the bits of a float, without a logarithm;
- an operation whose operands are all in the cache is free compared with one more pass over memory, so most are in
  place, and `half` is added with the product before it.

Shapes: B batch, T time (query), S time (key), C width, H heads, D head size, V vocabulary, L layers; I inputs, O outputs.
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
from picogpt_jax.runtimes.torch_linear import EXACT_FEATURES, integer_product, one_thread
from picogpt_jax.runtimes.torch_model import keep_freed_memory

LIMIT = 2.0**22  # of a fixed-point value
LARGEST = 2.0**23 - 1  # of the residual stream
FARTHEST = 15 * 256  # between two scores; beyond it a weight is 0
EXPONENT = 0x7F800000  # the bits of a float32's exponent
ONE = 127 << 23  # the bits of 1.0


def fit(a: Tensor) -> Tensor:
    """2^t as float32, t the smallest shift that makes codes of integers up to a.

    Where the seven bits after the first are ones, 255/256 and more of the next power of two, the carry of the addition
    gives the one more.
    """
    return (a.view(torch.int32) + (1 << 16)).bitwise_and_(EXPONENT).sub_(6 << 23).clamp_min_(ONE).view(torch.float32)


def above(a: Tensor) -> Tensor:
    """2^bits(a) as float32, of integers a >= 1; 1 or 2 of 0."""
    return (a.view(torch.int32) & EXPONENT).clamp_min_(ONE - (1 << 23)).add_(1 << 23).view(torch.float32)


def power(exponent: Tensor) -> Tensor:
    """2^exponent as float32."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def exponent_of(power: Tensor) -> Tensor:
    """The int8 exponent of a power of two."""
    return ((power.view(torch.int32) >> 23) - 127).to(torch.int8)


def largest(x: Tensor) -> Tensor:
    """max |x| over the last dimension, [..., 1]."""
    return torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())  # no copy, as abs() makes


def rounded(x: Tensor, factor: Tensor, half: Tensor) -> Tensor:
    """floor(x * factor + 0.5) in place; `half` is 0.5, as a vector where `factor` is a column: one pass, vectorized."""
    return torch.addcmul(half, x, factor, out=x).floor_()


class Matrix(nn.Module):
    """int8 codes [O, I] and exponents: a linear layer, an embedding table, or both (the tied head)."""

    codes: Tensor
    exponent: Tensor
    bias: Tensor | None
    scale: Tensor
    one_half: Tensor

    def __init__(self, model: IntegerModel, name: str, rows: slice = slice(None)) -> None:
        super().__init__()
        exponent, bias = model.tensors[f"{name}.weight_exponent"][:, 0], model.tensors.get(f"{name}.bias")
        self.register_buffer("codes", torch.tensor(model.tensors[f"{name}.weight"][rows]))
        self.register_buffer("exponent", torch.tensor(exponent if len(exponent) == 1 else exponent[rows]))
        self.register_buffer("bias", None if bias is None else torch.tensor(bias[rows]))
        self.register_buffer("scale", power(self.exponent), persistent=False)
        self.register_buffer("one_half", torch.tensor(0.5), persistent=False)

    def lookup(self, ids: Tensor) -> Tensor:
        """The rows `ids`, float32 [..., I], with the fraction bits of the residual stream."""
        scale = (self.scale if len(self.scale) == 1 else self.scale[ids])[..., None] * 2.0**RESIDUAL_BITS
        return self.codes[ids].float().mul_(scale).add_(0.5).floor_().clamp_(-LIMIT, LIMIT)

    def forward(self, codes: Tensor, scale: Tensor, fraction_bits: int) -> Tensor:
        """Of int8 codes [..., I] and their scales [..., 1]: float32 [..., O] with so many fraction bits."""
        acc_NO = self._sums(codes.reshape(-1, codes.shape[-1]))
        acc_NO.mul_(scale.reshape(-1, 1) * 2.0**fraction_bits)
        y_NO = (
            rounded(acc_NO, self.scale.to(acc_NO.dtype), self.one_half.to(acc_NO.dtype)).clamp_(-LIMIT, LIMIT).float()
        )
        if self.bias is not None:
            y_NO += self.bias
        return y_NO.view(*codes.shape[:-1], -1)

    def _sums(self, x_NI: Tensor) -> Tensor:
        """float32, or float64 where float32 cannot hold them."""
        if x_NI.shape[1] <= EXACT_FEATURES:
            return integer_product(x_NI, self.codes)
        parts = zip(x_NI.split(EXACT_FEATURES, 1), self.codes.split(EXACT_FEATURES, 1), strict=True)
        return torch.stack([integer_product(x, w).double() for x, w in parts]).sum(0)


class Norm(nn.Module):
    """LayerNorm, quantized."""

    m: Tensor
    exponent: Tensor
    bias: Tensor | None
    factor: Tensor
    scale: Tensor
    half_C: Tensor

    def __init__(self, model: IntegerModel, name: str) -> None:
        super().__init__()
        bias = model.tensors.get(f"{name}.bias")
        self.register_buffer("m", torch.tensor(model.tensors[f"{name}.weight"]))
        self.register_buffer("exponent", torch.tensor(model.tensors[f"{name}.weight_exponent"]))
        self.register_buffer("bias", None if bias is None else torch.tensor(bias))
        self.width = width = len(self.m)
        self.v = 5 if width <= 1024 else 6 if width <= 4096 else 7
        k = (40 - width.bit_length()) >> 1
        self.K = math.isqrt(width << (2 * k))
        self.is_plain = bool((self.m == 4096).all())  # as where the weight is in the matrix that follows
        self.register_buffer("factor", self.m.float() * 2.0**-12, persistent=False)
        self.register_buffer("scale", power(self.exponent) * 2.0 ** (12 - k - self.v), persistent=False)
        self.register_buffer("half_C", torch.full((width,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """int8 codes [..., C] and their scales [..., 1]."""
        x = torch.addcmul(self.half_C, x, above(largest(x)).reciprocal_().mul_(2.0**11)).floor_()
        total = x.sum(-1, keepdim=True).int()
        d = x.sub_(torch.add(total, total.sign(), alpha=self.width >> 1).div_(self.width, rounding_mode="trunc"))
        deviation = torch.mul(d, 2.0**-self.v).add_(0.5).floor_().square_().sum(-1, keepdim=True).clamp_min_(1).sqrt_()
        size = above(deviation).mul_(2.0**-12)  # 2^-j
        q = (deviation / size).floor_()
        r = (q * 0.5).floor_().add_(self.K).div_(q).floor_()
        if not self.is_plain:
            rounded(d, self.factor, self.half_C)
        scale = self.scale / size
        if self.bias is None:
            t = fit(largest(d).mul_(r))
            return rounded(d, r.div_(t), self.half_C).to(torch.int8), scale.mul_(t)
        u = rounded(d, r.mul_(scale).mul_(2.0**NORM_BITS), self.half_C).clamp_(-LIMIT, LIMIT).add_(self.bias)
        t = fit(largest(u))
        return rounded(u, t.reciprocal(), self.half_C).to(torch.int8), t.mul_(2.0**-NORM_BITS)


def gelu(u: Tensor) -> Tensor:
    """From 8 fraction bits to 10."""
    half = torch.tensor(0.5, device=u.device)
    h = u.clamp_(-32767, 32767)
    t = torch.rsub(h.abs(), 640).clamp_min_(0)
    near_one = torch.addcmul(half, t, t, value=2.0**-8, out=t).floor_().mul_(591 * 2.0**-12).add_(0.5).floor_()
    factor = torch.rsub(near_one, 256).copysign_(h).add_(256)
    return torch.addcmul(half, h, factor, value=2.0**-7, out=h).floor_()


def fractions() -> Tensor:
    """The weight [3841] of a score, by how much it is above the one that is farthest from the row's largest."""
    d = np.arange(FARTHEST, -1, -1)
    f = d & 255
    return torch.tensor((4096 - ((f * (2753 - ((705 * f) >> 8))) >> 8)) >> (d >> 8), dtype=torch.float32)


class Cache:
    """Of each layer the codes and exponents of keys and values: int8 [L, 2, B, H, block_size, D and 1]."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device) -> None:
        shape = (config.n_layer, 2, batch, config.n_head, config.block_size)
        self.codes = torch.zeros(*shape, config.head_size, dtype=torch.int8, device=device)
        self.exponents = torch.zeros(*shape, 1, dtype=torch.int8, device=device)
        self.length = 0

    def extend(self, layer: int, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's next positions, returns all so far; the model moves `length` on after the last layer."""
        end = self.length + codes.shape[3]
        self.codes[layer, :, :, :, self.length : end] = codes
        self.exponents[layer, :, :, :, self.length : end] = exponent_of(scales)
        return self.codes[layer, :, :, :, :end].float(), power(self.exponents[layer, :, :, :, :end])


class Attention(nn.Module):
    """Causal attention up to the codes that `attn.c_proj` multiplies."""

    fractions: Tensor

    def __init__(self, model: IntegerModel, layer: int) -> None:
        super().__init__()
        config = model.model
        self.layer, self.n_head = layer, config.n_head
        name, width = f"transformer.h.{layer}.attn.c_attn", config.n_embd
        self.query, self.key_value = Matrix(model, name, slice(width)), Matrix(model, name, slice(width, None))
        self.cap = (24 - (127 * 127 * config.head_size).bit_length()) >> 1
        # Scores from 2^23 on, to which 0.5 cannot be added in float32, are even numbers in smaller heads.
        self.dtype = torch.float64 if 127 * 127 * config.head_size >= 1 << 23 else torch.float32
        self.weight_bits = 8 - max((config.block_size - 1) // 512, 0).bit_length()
        self.register_buffer("fractions", fractions(), persistent=False)

    def forward(self, codes: Tensor, scale: Tensor, cache: Cache | None, last_only: bool) -> tuple[Tensor, Tensor]:
        """int8 codes [B, T, C] and their scales [B, T, 1]; the queries are the last T of the S positions."""
        kept = (codes[:, -1:], scale[:, -1:]) if last_only else (codes, scale)
        (q_BHTD,), (tq,) = self._heads(self.query(*kept, HEAD_BITS))
        kv, t = self._heads(self.key_value(codes, scale, HEAD_BITS))
        if cache is not None:
            kv, t = cache.extend(self.layer, kv, t)
        (k_BHSD, v_BHSD), (tk, tv) = kv, t
        queries, keys = q_BHTD.shape[2], k_BHSD.shape[2]
        q_BHTD.mul_(tq.mul_(2.0**-8).clamp_max_(2.0**self.cap))
        k_BHSD.mul_(tk.mul_(2.0**-8).clamp_max_(2.0**self.cap))
        unseen_TS = torch.full((queries, keys), -math.inf, dtype=self.dtype, device=kv.device).triu_(keys - queries + 1)
        start = unseen_TS.add_(0.5).expand(q_BHTD.shape[0] * self.n_head, -1, -1)
        scores = torch.baddbmm(start, q_BHTD.flatten(0, 1).to(self.dtype), k_BHSD.flatten(0, 1).to(self.dtype).mT)
        z = scores.floor_().float().view(-1, self.n_head, queries, keys)
        index = z.sub_(z.amax(-1, keepdim=True).sub_(FARTHEST)).clamp_min_(0).int()
        p = self.fractions.index_select(0, index.view(-1)).view_as(z)
        den = p.sum(-1, keepdim=True)
        p.mul_(tv.mT)
        top = above(p.amax(-1, keepdim=True)).mul_(2.0**-self.weight_bits)
        half_S = torch.full((keys,), 0.5, device=kv.device)
        o = rounded(p, top.reciprocal(), half_S).clamp_max_(2**self.weight_bits - 1) @ v_BHSD
        return self._joined(o, den, top)

    def _heads(self, y_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """Quantizes each head: codes as float32 [K, B, H, T, D], K = 1 or 2, and their scales [K, B, H, T, 1]."""
        batch, time, width = y_BTC.shape
        size = self.key_value.codes.shape[1] // self.n_head
        heads = y_BTC.view(batch, time, -1, self.n_head, size).permute(2, 0, 3, 1, 4)
        t = fit(largest(heads).contiguous())
        codes = torch.mul(heads, t.reciprocal(), out=torch.empty(heads.shape, device=y_BTC.device))
        return codes.add_(0.5).floor_(), t

    def _joined(self, o_BHTD: Tensor, den: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """Divides by the sums of the weights `den`, and quantizes the heads of a token together."""
        n = above(largest(o_BHTD)).mul_(2.0**-15).clamp_min_(1)
        half_D = torch.full((o_BHTD.shape[-1],), 0.5, device=o_BHTD.device)
        o = rounded(o_BHTD, n.reciprocal(), half_D)
        dt = above(den).mul_(2.0**-8)
        narrow = (den / dt).add_(0.5).floor_()
        r = (narrow * 0.5).floor_().add_(2.0**15).div_(narrow).floor_()
        scale = top.mul_(n).div_(dt).mul_(2.0 ** -(HEAD_BITS + 15))
        a = largest(o).mul_(r)
        fitted = fit(a).mul_(scale).masked_fill_(a == 0, 0)
        t = fitted.amax(1, keepdim=True)
        t.masked_fill_(t == 0, 1)
        codes = rounded(o, r.mul_(scale).div_(t), half_D).to(torch.int8)
        return codes.transpose(1, 2).flatten(2), t[:, 0]


class Block(nn.Module):
    """A pre-LayerNorm transformer block."""

    half_F: Tensor

    def __init__(self, model: IntegerModel, layer: int) -> None:
        super().__init__()
        name = f"transformer.h.{layer}"
        self.hidden_bits, self.is_relu = HIDDEN_BITS[model.model.activation], model.model.activation == "relu"
        self.ln_1, self.ln_2 = Norm(model, f"{name}.ln_1"), Norm(model, f"{name}.ln_2")
        self.attention = Attention(model, layer)
        self.attn_proj = Matrix(model, f"{name}.attn.c_proj")
        self.c_fc, self.mlp_proj = Matrix(model, f"{name}.mlp.c_fc"), Matrix(model, f"{name}.mlp.c_proj")
        self.register_buffer("half_F", torch.full((model.model.n_hidden,), 0.5), persistent=False)

    def forward(self, x_BTC: Tensor, cache: Cache | None, last_only: bool) -> Tensor:
        """`last_only`: the last position's values only, [B, 1, C]; the cache takes all keys and values."""
        heads = self.attention(*self.ln_1(x_BTC), cache, last_only)
        y_BTC = self.attn_proj(*heads, RESIDUAL_BITS)
        x_BTC = y_BTC.add_(x_BTC[:, -1:] if last_only else x_BTC).clamp_(-LARGEST, LARGEST)
        h = self.c_fc(*self.ln_2(x_BTC), self.hidden_bits)
        h = h.clamp_min_(0) if self.is_relu else gelu(h)
        t = fit(largest(h))
        codes = rounded(h, t.reciprocal(), self.half_F).to(torch.int8)
        return self.mlp_proj(codes, t.mul_(2.0**-RESIDUAL_BITS), RESIDUAL_BITS).add_(x_BTC).clamp_(-LARGEST, LARGEST)


class IntegerGPT(nn.Module):
    """The integer model; it has buffers only, and those of its state are the integers of the file.

    Attributes:
        config: the architecture.
    """

    def __init__(self, model: IntegerModel) -> None:
        super().__init__()
        keep_freed_memory()
        self.config = model.model
        self.wte, self.wpe = Matrix(model, "transformer.wte"), Matrix(model, "transformer.wpe")
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
            return self.wte(*self.ln_f(x_BTC), RESIDUAL_BITS).mul_(2.0**-RESIDUAL_BITS)


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
