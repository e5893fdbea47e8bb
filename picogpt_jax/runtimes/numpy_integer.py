"""The integer model in NumPy alone: version 2 of the int8 folder, and its functions of integers, as a program.

It is "Version 2" of `picogpt_jax/int8/README.md` in code, with the names used there, and shares none with the other
runtimes; `numpy_reading` reads the folder. Every value is an integer; products of matrices are computed in float, which
holds these integers exactly.

Shapes: B batch, T time (query), S time (key), C width, H heads, D head size, V vocabulary; I inputs, O outputs.
"""

import math
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt_jax.errors import UserError
from picogpt_jax.runtimes.numpy_reading import Tensors, read_folder

Ints = npt.NDArray[np.int32]

LIMIT = 1 << 22  # of a fixed-point value
LARGEST = (1 << 23) - 1  # of the residual stream
RESIDUAL_BITS, HEAD_BITS, NORM_BITS, GELU_BITS = 10, 12, 12, 8
EXACT_FEATURES = 2**24 // 127**2  # 1040: as many products of two codes sum up exactly in float32
LOGIT = np.float32(2.0**-RESIDUAL_BITS)
# What config.json must say beside the granularity.
QUANTIZATION = {
    "weight_bits": 8,
    "activation_bits": 8,
    "activation_granularity": "per_token",
    "symmetric": True,
    "quantize_attention": True,
}


def bits(a: Ints) -> Ints:
    """The length of each number in bits."""
    return np.frexp(a.astype(np.float64))[1].astype(np.int32)


def shift(x: Ints, s: Ints | int) -> Ints:
    """round(x / 2^s), halves up; to the left it saturates."""
    s = np.clip(np.asarray(s, np.int32), -22, 31)
    right: Ints = np.maximum(s, 0)
    y = (x + np.where(s > 0, np.int32(1) << np.maximum(s - 1, 0), np.int32(0))) >> right
    if (s < 0).any():
        left = np.maximum(-s, 0)
        y = np.where(s < 0, np.clip(x, -(LIMIT >> left), LIMIT >> left) << left, y)
    return y


def fit(u: Ints) -> Ints:
    """The smallest shift that makes codes of the vectors u [..., I], [..., 1]."""
    a = np.abs(u).max(-1, keepdims=True)
    t = np.maximum(bits(a) - 7, 0)
    is_too_large: Ints = (shift(a, t) >> 7).astype(np.int32)  # it is 128
    return t + is_too_large


def quantize(u: Ints) -> tuple[Ints, Ints]:
    """Codes, and an exponent for each vector [..., 1]."""
    t = fit(u)
    return shift(u, t), t


def isqrt(n: Ints) -> Ints:
    """The integer square root of n <= 2^24, for which the float one is close enough."""
    return np.floor(np.sqrt(n.astype(np.float64))).astype(np.int32)


class Matrix:
    """Codes [O, I] and exponents: a linear layer, an embedding table, or both (the tied head)."""

    def __init__(self, codes: npt.NDArray[np.int8], exponent: npt.NDArray[np.int8], bias: Ints | None) -> None:
        self.codes_OI: npt.NDArray[Any] = codes.astype("f4" if codes.shape[1] <= EXACT_FEATURES else "f8")
        self.exponent_O, self.bias = np.broadcast_to(exponent[:, 0].astype(np.int32), len(codes)), bias

    def lookup(self, ids: npt.NDArray[np.int64]) -> Ints:
        """The rows `ids`, with the fraction bits of the residual stream."""
        return shift(self.codes_OI[ids].astype(np.int32), -(self.exponent_O[ids][..., None] + RESIDUAL_BITS))

    def __call__(self, codes: Ints, e: Ints, fraction_bits: int) -> Ints:
        """Of codes [..., I] with exponents [..., 1]: the outputs [..., O]."""
        acc = (codes.astype(self.codes_OI.dtype) @ self.codes_OI.T).astype(np.int32)
        y = np.clip(shift(acc, -(e + self.exponent_O + fraction_bits)), -LIMIT, LIMIT)
        return y if self.bias is None else y + self.bias


class Norm:
    """LayerNorm, quantized."""

    def __init__(self, m: npt.NDArray[np.int16], exponent: npt.NDArray[np.int8], bias: Ints | None) -> None:
        self.m, self.exponent, self.bias = m.astype(np.int32), int(exponent[0]), bias
        self.width = width = len(m)
        self.v = 5 if width <= 1024 else 6 if width <= 4096 else 7
        self.k = (40 - width.bit_length()) >> 1
        self.K = math.isqrt(width << (2 * self.k))

    def __call__(self, x: Ints) -> tuple[Ints, Ints]:
        """Codes [..., C] and their exponents [..., 1]."""
        n = bits(np.abs(x).max(-1, keepdims=True)) - 11
        x = shift(x, np.maximum(n, 0)) << np.maximum(-n, 0)
        total = x.sum(-1, keepdims=True, dtype=np.int32)
        d = x - np.sign(total) * ((np.abs(total) + (self.width >> 1)) // self.width)
        total = np.maximum(np.square(shift(d, self.v)).sum(-1, keepdims=True, dtype=np.int32), 1)
        j = (24 - bits(total)) >> 1
        q = isqrt(total << (2 * j))
        r = (self.K + (q >> 1)) // q
        u = shift(d * self.m, 12) * r
        e = j - self.k - self.v + 12 + self.exponent
        if self.bias is not None:
            u = np.clip(shift(u, -(e + NORM_BITS)), -LIMIT, LIMIT) + self.bias
            e = np.full_like(e, -NORM_BITS)
        codes, t = quantize(u)
        return codes, t + e


def gelu(u: Ints) -> Ints:
    """From 8 fraction bits to 10."""
    h = np.clip(u, -32767, 32767)
    a = np.minimum(np.abs(h), 1024)
    p = 4096 - ((a * (3276 + ((a * (4220 - ((a * 3908) >> 10))) >> 10))) >> 10)
    square = (p * p) >> 12
    return 4 * np.maximum(h, 0) - shift(a * ((square * square) >> 12), 11)


def attention(q: tuple[Ints, Ints], k: tuple[Ints, Ints], v: tuple[Ints, Ints], block_size: int) -> tuple[Ints, Ints]:
    """Causal attention of codes [B, H, T or S, D] and their exponents [B, H, T or S, 1].

    The queries are the last T of the S positions.

    Returns:
        codes [B, T, H, D], and an exponent for each position [B, T, 1].
    """
    (q_BHTD, tq), (k_BHSD, tk), (v_BHSD, tv) = q, k, v
    queries, keys, size = q_BHTD.shape[2], k_BHSD.shape[2], q_BHTD.shape[3]
    cap = (24 - (127 * 127 * size).bit_length()) >> 1
    e = np.minimum(tq - 8, cap) + np.minimum(tk - 8, cap).swapaxes(-1, -2)
    scores = (q_BHTD.astype(np.float32) @ k_BHSD.astype(np.float32).swapaxes(-1, -2)).astype(np.int32)
    z = shift(scores, np.maximum(-e, 0)) << np.maximum(e, 0)
    seen_TS = np.tril(np.ones((queries, keys), bool), keys - queries)
    z = np.where(seen_TS, z, -(1 << 25))
    d = np.minimum(z.max(-1, keepdims=True) - z, 15 * 256)
    f = d & 255
    p = np.where(seen_TS, (4096 - ((f * (2753 - ((705 * f) >> 8))) >> 8)) >> (d >> 8), 0)
    den = p.sum(-1, keepdims=True, dtype=np.int32)
    weight_bits = 8 - max((block_size - 1) // 512, 0).bit_length()
    tv = tv.swapaxes(-1, -2)
    top = np.where(p > 0, bits(p) + tv, -100).max(-1, keepdims=True) - weight_bits
    w = np.minimum(shift(p, top - tv), (1 << weight_bits) - 1)
    o = (w.astype(np.float32) @ v_BHSD.astype(np.float32)).astype(np.int32)
    n = np.maximum(bits(np.abs(o).max(-1, keepdims=True)) - 15, 0)
    dt = bits(den) - 8
    narrow = shift(den, dt)
    u = shift(o, n) * (((1 << 15) + (narrow >> 1)) // narrow)
    e = top - HEAD_BITS + n - 15 - dt
    is_zero = np.abs(u).max(-1, keepdims=True) == 0
    t = np.where(is_zero, -100, fit(u) + e).max(1, keepdims=True)
    codes = shift(u, t - e)
    return codes.transpose(0, 2, 1, 3), np.where(np.all(is_zero, axis=1), 0, t[:, 0])


class IntegerCache:
    """Of each layer the codes and exponents of keys and values so far: int8, [B, H, S, D] and [B, H, S, 1]."""

    def __init__(self, n_layer: int) -> None:
        self.layers: list[list[npt.NDArray[np.int8]]] = [[] for _ in range(n_layer)]
        self.length = 0

    def extend(self, layer: int, new: list[Ints]) -> list[Ints]:
        """Adds one layer's next positions, returns all; the model moves `length` on after the last layer."""
        arrays = [array.astype(np.int8) for array in new]
        if self.layers[layer]:
            arrays = [np.concatenate(pair, 2) for pair in zip(self.layers[layer], arrays, strict=True)]
        self.layers[layer] = arrays
        return [array.astype(np.int32) for array in arrays]


class NumpyIntegerGPT:
    """The model; a `picogpt_jax.runtimes.loop.Runtime`.

    Args:
        config: what config.json holds.
        tensors: what model.safetensors holds; nothing may be missing or left over.

    Raises:
        UserError: a setting or a tensor is not what this file computes with.
    """

    windows_at_once = 1

    def __init__(self, config: dict[str, Any], tensors: dict[str, npt.NDArray[Any]]) -> None:
        found = tuple(config.get(name) for name in ("format", "format_version", "arithmetic"))
        if found != ("picogpt-int8", 2, "integer"):
            raise UserError(f"{found!s:.100} is not picogpt-int8 version 2 with integer arithmetic")
        model = config["model"]
        self.n_layer, self.n_head, self.n_embd = model["n_layer"], model["n_head"], model["n_embd"]
        self.block_size, self.vocab_size, self.has_bias = model["block_size"], model["vocab_size"], model["bias"]
        is_known = type(self.has_bias) is bool and type(model["mlp_ratio"]) is type(self.n_embd) is int
        hidden = model["mlp_ratio"] * self.n_embd if is_known else 0
        sizes = (self.n_layer, self.n_head, self.n_embd, self.block_size, self.vocab_size, hidden)
        limits = (1 << 20, 1 << 20, 8192, 4096, 1 << 20, 1 << 15)
        if not all(type(size) is int and 0 < size <= limit for size, limit in zip(sizes, limits, strict=True)):
            raise UserError(f"the model {str(model)[:200]} is none that this runtime computes")
        if self.n_embd % self.n_head or self.n_embd // self.n_head > 1024:
            raise UserError(f"n_embd={self.n_embd} and n_head={self.n_head} are none that this runtime computes")
        self.is_relu = {"relu": True, "gelu": False, "gelu_tanh": False}[model["activation"]]
        self.per_channel = {"per_channel": True, "per_tensor": False}[config["quantization"]["weight_granularity"]]
        self._unread, width = dict(tensors), self.n_embd
        self.wte = self._matrix("transformer.wte", self.vocab_size, width, has_bias=False)
        self.wpe = self._matrix("transformer.wpe", self.block_size, width, has_bias=False)
        self.blocks: list[dict[str, Any]] = []
        for name in (f"transformer.h.{layer}" for layer in range(self.n_layer)):
            self.blocks.append(
                {
                    "ln_1": self._norm(f"{name}.ln_1"),
                    "attn.c_attn": self._matrix(f"{name}.attn.c_attn", 3 * width, width, self.has_bias),
                    "attn.c_proj": self._matrix(f"{name}.attn.c_proj", width, width, self.has_bias),
                    "ln_2": self._norm(f"{name}.ln_2"),
                    "mlp.c_fc": self._matrix(f"{name}.mlp.c_fc", hidden, width, self.has_bias),
                    "mlp.c_proj": self._matrix(f"{name}.mlp.c_proj", width, hidden, self.has_bias),
                }
            )
        self.ln_f = self._norm("transformer.ln_f")
        if self._unread:
            raise UserError(f"unknown tensors: {sorted(self._unread)[:8]!s:.200}")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "NumpyIntegerGPT":
        """Reads an int8 folder.

        Raises:
            UserError: a file is missing or damaged, or holds what this file does not compute.
        """
        return read_folder(folder, cls._checked)

    @classmethod
    def _checked(cls, config: dict[str, Any], tensors: Tensors) -> "NumpyIntegerGPT":
        model, quantization = cls(config, tensors), config["quantization"]
        if any(quantization[name] != value for name, value in QUANTIZATION.items()):
            raise UserError(f"the quantization {str(quantization)[:200]} is none that this runtime computes")
        return model

    def _take(self, name: str, dtype: str, shape: tuple[int, ...], low: int, high: int) -> npt.NDArray[Any]:
        if name not in self._unread:
            raise UserError(f"the tensor {name} is missing")
        array = self._unread.pop(name)
        if (array.dtype, array.shape) != (np.dtype(dtype), shape):
            raise UserError(f"{name} is {array.dtype} {list(array.shape)}; expected {dtype} {list(shape)}")
        if array.min() < low or array.max() > high:
            raise UserError(f"{name} holds {array.min()} to {array.max()}; expected {low} to {high}")
        return array

    def _bias(self, name: str, rows: int, has_bias: bool) -> Ints | None:
        return self._take(f"{name}.bias", "int32", (rows,), -LIMIT, LIMIT) if has_bias else None

    def _matrix(self, name: str, rows: int, cols: int, has_bias: bool) -> Matrix:
        codes = self._take(f"{name}.weight", "int8", (rows, cols), -127, 127)
        exponent = self._take(f"{name}.weight_exponent", "int8", (rows if self.per_channel else 1, 1), -24, 15)
        return Matrix(codes, exponent, self._bias(name, rows, has_bias))

    def _norm(self, name: str) -> Norm:
        mantissas = self._take(f"{name}.weight", "int16", (self.n_embd,), -4096, 4096)
        if np.abs(mantissas).max() <= 2048:
            raise UserError(f"{name}.weight: the largest mantissa is {np.abs(mantissas).max()}; expected 2049 to 4096")
        exponent = self._take(f"{name}.weight_exponent", "int8", (1,), -24, 15)
        return Norm(mantissas, exponent, self._bias(name, self.n_embd, self.has_bias))

    def new_cache(self, batch: int) -> IntegerCache:
        """A cache of no positions."""
        return IntegerCache(self.n_layer)

    def forward(
        self, tokens_BT: npt.NDArray[np.int64], cache: IntegerCache | None = None, last_only: bool = False
    ) -> npt.NDArray[np.float32]:
        """Logits of the next token at every position, float32 [B, T, V], each the integer times 2^-10 exactly.

        Raises:
            ValueError: the positions do not fit into `block_size`.
        """
        first = 0 if cache is None else cache.length
        end = first + tokens_BT.shape[1]
        if end > self.block_size:
            raise ValueError(f"{end} positions do not fit into block_size={self.block_size}")
        x_BTC = self.wte.lookup(tokens_BT) + self.wpe.lookup(np.arange(first, end))
        for layer, block in enumerate(self.blocks):
            qkv = block["attn.c_attn"](*block["ln_1"](x_BTC), HEAD_BITS)
            y_BTC = block["attn.c_proj"](*self._attend(qkv, layer, cache), RESIDUAL_BITS)
            x_BTC = np.clip(x_BTC + y_BTC, -LARGEST, LARGEST)
            h_BTF = block["mlp.c_fc"](*block["ln_2"](x_BTC), RESIDUAL_BITS if self.is_relu else GELU_BITS)
            codes, t = quantize(np.maximum(h_BTF, 0) if self.is_relu else gelu(h_BTF))
            x_BTC = np.clip(x_BTC + block["mlp.c_proj"](codes, t - RESIDUAL_BITS, RESIDUAL_BITS), -LARGEST, LARGEST)
        if cache is not None:
            cache.length = end
        logits = self.wte(*self.ln_f(x_BTC[:, -1:] if last_only else x_BTC), RESIDUAL_BITS)
        return logits.astype(np.float32) * LOGIT

    def _attend(self, qkv_BTC: Ints, layer: int, cache: IntegerCache | None) -> tuple[Ints, Ints]:
        batch, queries, _ = qkv_BTC.shape
        heads = qkv_BTC.reshape(batch, queries, 3, self.n_head, -1).transpose(2, 0, 3, 1, 4)
        q, (k, tk), (v, tv) = (quantize(part) for part in heads)
        if cache is not None:
            k, tk, v, tv = cache.extend(layer, [k, tk, v, tv])
        codes, t = attention(q, (k, tk), (v, tv), self.block_size)
        return codes.reshape(batch, queries, -1), t
