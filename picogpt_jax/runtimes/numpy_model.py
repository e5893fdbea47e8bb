"""The int8 model in NumPy alone: the format of the int8 folder (version 1) and its numerics, as a program.

It shares no code with the rest of the library, but for `numpy_reading`, which reads the folder; every other runtime is
compared with it. It refuses what it cannot compute, but `int8.folder` is the one that checks all.

Shapes: B batch, T time (query), S time (key), C width, H heads, D head size, V vocabulary; N rows (tokens), I input
features, O output features of a matmul.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt_jax.errors import UserError
from picogpt_jax.runtimes.numpy_reading import read_folder

Array = npt.NDArray[np.float32]

EXACT_FEATURES = 2**24 // 127**2  # 1040: as many products of two codes sum up exactly in float32


def quantize(x_NI: Array) -> tuple[Array, Array]:
    """One scale a token: absmax * float32(1 / 127); codes = round_half_to_even(clip(x * (1 / scale), -127, 127)).

    A token of zeros has scale 1 / 127.

    Returns:
        the codes [N, I], integers held as float32, and the scales [N, 1].
    """
    absmax_N1 = np.abs(x_NI).max(-1, keepdims=True)
    scale_N1 = np.where(absmax_N1 < 2.0**-119, np.float32(1), absmax_N1) * np.float32(1 / 127)
    return np.rint(np.clip(x_NI * (np.float32(1) / scale_N1), -127, 127)), scale_N1


class Int8Matrix:
    """Codes [O, I] with one scale a row, or one in all: a linear layer, an embedding table, or both (the tied head)."""

    def __init__(
        self, codes: npt.NDArray[np.int8], scale: Array, bias: Array | None, activation_bits: int | None
    ) -> None:
        # Codes are at most 127: up to `EXACT_FEATURES` products add up to an integer that float32 holds exactly,
        # beyond that float64 does. So a float product of the codes is the int8 product, whatever its order.
        self.codes_OI: npt.NDArray[Any] = codes.astype("f4" if codes.shape[1] <= EXACT_FEATURES else "f8")
        self.scale_O1, self.bias, self.activation_bits = scale, bias, activation_bits

    def lookup(self, ids: npt.NDArray[np.int64]) -> Array:
        """The rows `ids`, dequantized: codes * scale."""
        scale = self.scale_O1 if len(self.scale_O1) == 1 else self.scale_O1[ids]
        return self.codes_OI[ids].astype(np.float32) * scale

    def __call__(self, x: Array) -> Array:
        """float32 [..., I] -> float32 [..., O]."""
        x_NI = x.reshape(-1, x.shape[-1])
        if self.activation_bits is None:
            y_NO = (x_NI @ self.codes_OI.T).astype(np.float32) * self.scale_O1.T
        else:
            codes_NI, scale_N1 = quantize(x_NI)
            y_NO = (codes_NI @ self.codes_OI.T).astype(np.float32) * scale_N1 * self.scale_O1.T
        if self.bias is not None:
            y_NO = y_NO + self.bias
        return y_NO.reshape(*x.shape[:-1], -1)


class LayerNorm:
    """LayerNorm over the last dimension."""

    def __init__(self, weight: Array, bias: Array | None, epsilon: float) -> None:
        self.weight, self.bias, self.epsilon = weight, bias, epsilon

    def __call__(self, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        y = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + self.epsilon) * self.weight
        return y if self.bias is None else y + self.bias


# M. Abramowitz, I. Stegun, Handbook of Mathematical Functions, 7.1.26; highest power of t first.
ERF_T = np.array([1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0], np.float32)


def erf(x: Array) -> Array:
    """The error function, within 5e-7."""
    size = np.abs(x)
    rest = np.polyval(ERF_T, 1 / (1 + 0.3275911 * size)) * np.exp(-size * size)
    return np.copysign(1 - rest, x)


def gelu(x: Array) -> Array:
    """The exact form, x * Phi(x)."""
    return 0.5 * x * (1 + erf(x * math.sqrt(0.5)))


def gelu_tanh(x: Array) -> Array:
    """GPT-2's approximation of `gelu`."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def relu(x: Array) -> Array:
    """max(x, 0)."""
    return np.maximum(x, 0)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}


class KVCache:
    """Of each layer the keys and values [B, H, S, D] so far."""

    def __init__(self, n_layer: int) -> None:
        self.keys: list[Array | None] = [None] * n_layer
        self.values: list[Array | None] = [None] * n_layer
        self.length = 0

    def extend(self, layer: int, k_BHTD: Array, v_BHTD: Array) -> tuple[Array, Array]:
        """Adds one layer's next positions, returns all; the model moves `length` on after the last layer."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is not None and values is not None:
            k_BHTD, v_BHTD = np.concatenate([keys, k_BHTD], 2), np.concatenate([values, v_BHTD], 2)
        self.keys[layer], self.values[layer] = k_BHTD, v_BHTD
        return k_BHTD, v_BHTD


class NumpyGPT:
    """The model: GPT-2's pre-LayerNorm decoder with learned positions and a head tied to the token embedding.

    Args:
        config: what config.json holds.
        tensors: what model.safetensors holds; nothing may be missing or left over.

    Raises:
        UserError: a setting or a tensor is not what this file computes with.
    """

    windows_at_once = 1

    def __init__(self, config: dict[str, Any], tensors: dict[str, npt.NDArray[Any]]) -> None:
        if (config["format"], config["format_version"]) != ("picogpt-int8", 1):
            found = f"{config['format']!r} version {config['format_version']!r}"
            raise UserError(f"{found[:80]} is not picogpt-int8 version 1")
        quantization, model = config["quantization"], config["model"]
        self.activation_bits = quantization["activation_bits"]
        if self.activation_bits not in (8, None) or quantization["quantize_attention"] or not quantization["symmetric"]:
            raise UserError(f"the quantization {str(quantization)[:200]} is none that this runtime computes")
        sizes = [model[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "mlp_ratio")]
        is_computed = all(type(size) is int and 0 < size <= 1 << 20 for size in sizes) and sizes[2] % sizes[1] == 0
        if not is_computed or type(model["layer_norm_epsilon"]) is not float or not 0 < model["layer_norm_epsilon"] < 1:
            raise UserError(f"the model {str(model)[:200]} is none that this runtime computes; write it again")
        self.n_layer, self.n_head, self.n_embd = model["n_layer"], model["n_head"], model["n_embd"]
        self.block_size, self.vocab_size = model["block_size"], model["vocab_size"]
        self.has_bias, self.epsilon = model["bias"], model["layer_norm_epsilon"]
        self.per_channel = quantization["weight_granularity"] == "per_channel"
        self.activation = ACTIVATIONS[model["activation"]]

        self._unread, width, hidden = dict(tensors), self.n_embd, model["mlp_ratio"] * self.n_embd
        self.wte = self._matrix("transformer.wte", self.vocab_size, width, has_bias=False)
        self.wpe = self._matrix("transformer.wpe", self.block_size, width, has_bias=False)
        self.blocks: list[dict[str, Any]] = []
        for name in (f"transformer.h.{layer}" for layer in range(self.n_layer)):
            self.blocks.append(
                {
                    "ln_1": self._layer_norm(f"{name}.ln_1"),
                    "attn.c_attn": self._matrix(f"{name}.attn.c_attn", 3 * width, width, self.has_bias),
                    "attn.c_proj": self._matrix(f"{name}.attn.c_proj", width, width, self.has_bias),
                    "ln_2": self._layer_norm(f"{name}.ln_2"),
                    "mlp.c_fc": self._matrix(f"{name}.mlp.c_fc", hidden, width, self.has_bias),
                    "mlp.c_proj": self._matrix(f"{name}.mlp.c_proj", width, hidden, self.has_bias),
                }
            )
        self.ln_f = self._layer_norm("transformer.ln_f")
        if self._unread:
            raise UserError(f"unknown tensors: {sorted(self._unread)[:8]!s:.200}")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "NumpyGPT":
        """Reads an int8 folder.

        Raises:
            UserError: a file is missing or damaged, or holds what this file does not compute.
        """
        return read_folder(folder, cls)

    def _take(self, name: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        if name not in self._unread:
            raise UserError(f"the tensor {name} is missing")
        array = self._unread.pop(name)
        if (array.dtype, array.shape) != (np.dtype(dtype), shape):
            raise UserError(f"{name} is {array.dtype} {list(array.shape)}; expected {dtype} {list(shape)}")
        return array

    def _matrix(self, name: str, rows: int, cols: int, has_bias: bool) -> Int8Matrix:
        codes = self._take(f"{name}.weight", "int8", (rows, cols))
        scale = self._take(f"{name}.weight_scale", "float32", (rows if self.per_channel else 1, 1))
        bias = self._take(f"{name}.bias", "float32", (rows,)) if has_bias else None
        return Int8Matrix(codes, scale, bias, self.activation_bits)

    def _layer_norm(self, name: str) -> LayerNorm:
        weight = self._take(f"{name}.weight", "float32", (self.n_embd,))
        bias = self._take(f"{name}.bias", "float32", (self.n_embd,)) if self.has_bias else None
        return LayerNorm(weight, bias, self.epsilon)

    def new_cache(self, batch: int) -> KVCache:
        """A cache of no positions."""
        return KVCache(self.n_layer)

    def forward(
        self, tokens_BT: npt.NDArray[np.int64], cache: KVCache | None = None, last_only: bool = False
    ) -> npt.NDArray[np.float32]:
        """Logits of the next token at every position, float32 [B, T, V]; see `picogpt_jax.runtimes.loop.Runtime`.

        Raises:
            ValueError: the positions do not fit into `block_size`.
        """
        first = 0 if cache is None else cache.length
        end = first + tokens_BT.shape[1]
        if end > self.block_size:
            raise ValueError(f"{end} positions do not fit into block_size={self.block_size}")
        x_BTC = self.wte.lookup(tokens_BT) + self.wpe.lookup(np.arange(first, end))
        for layer, block in enumerate(self.blocks):
            x_BTC = x_BTC + self._attend(block, block["ln_1"](x_BTC), layer, cache)
            hidden = self.activation(block["mlp.c_fc"](block["ln_2"](x_BTC)))
            x_BTC = x_BTC + block["mlp.c_proj"](hidden)
        if cache is not None:
            cache.length = end
        return self.wte(self.ln_f(x_BTC[:, -1:] if last_only else x_BTC))

    def _attend(self, block: dict[str, Any], x_BTC: Array, layer: int, cache: KVCache | None) -> Array:
        """Causal self-attention; the queries are the last T of the S positions seen so far."""
        batch, queries, width = x_BTC.shape
        qkv_BT3HD = block["attn.c_attn"](x_BTC).reshape(batch, queries, 3, self.n_head, -1)
        q_BHTD, k_BHSD, v_BHSD = qkv_BT3HD.transpose(2, 0, 3, 1, 4)
        if cache is not None:
            k_BHSD, v_BHSD = cache.extend(layer, k_BHSD, v_BHSD)
        keys = k_BHSD.shape[2]
        scores_BHTS = (q_BHTD * q_BHTD.shape[-1] ** -0.5) @ k_BHSD.swapaxes(-1, -2)
        hidden_TS = np.triu(np.ones((queries, keys), bool), keys - queries + 1)
        scores_BHTS[..., hidden_TS] = -np.inf
        weights_BHTS = np.exp(scores_BHTS - scores_BHTS.max(-1, keepdims=True))
        weights_BHTS /= weights_BHTS.sum(-1, keepdims=True)
        y_BTHD = (weights_BHTS @ v_BHSD).transpose(0, 2, 1, 3)
        return block["attn.c_proj"](y_BTHD.reshape(batch, queries, width))
