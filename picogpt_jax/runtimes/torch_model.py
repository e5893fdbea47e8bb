"""The int8 model of mixed arithmetic in PyTorch (extra: torch).

Matrices stay int8 in memory and are multiplied as int8 (`runtimes.torch_linear`); the rest is float32, by PyTorch's own
functions.

Shapes: B batch, T time (query), S time (key), C width, H heads, D head size, V vocabulary, L layers.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("this needs PyTorch; install it with: pip install 'picogpt_jax[torch]'") from error

from picogpt_jax.config import ModelConfig
from picogpt_jax.devices.cpu import is_small_call
from picogpt_jax.int8.int8_model import Int8Model, Int8Tensor
from picogpt_jax.runtimes import loop
from picogpt_jax.runtimes.engine import BATCH_SIZE, Sampling
from picogpt_jax.runtimes.torch_linear import Int8Matrix, one_thread


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """In place: fresh memory takes longer than the function."""
    y: Tensor = torch.ops.aten.gelu_(x, approximate=approximate)
    return y


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(gelu, approximate="tanh"),
    "relu": F.relu_,
}


class LayerNorm(nn.Module):
    """The LayerNorm `name` of the model, over the last dimension."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, model: Int8Model, name: str) -> None:
        super().__init__()
        self.epsilon = model.model.layer_norm_epsilon
        weight, bias = model.vectors[f"{name}.weight"], model.vectors.get(f"{name}.bias")
        self.register_buffer("weight", torch.tensor(weight))
        self.register_buffer("bias", None if bias is None else torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class KVCache:
    """Keys and values [L, B, H, block_size, D] of the first `length` positions."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device) -> None:
        shape = (config.n_layer, batch, config.n_head, config.block_size, config.head_size)
        self.keys, self.values = torch.zeros(2, *shape, device=device)
        self.length = 0

    def extend(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's next positions, returns all so far; the model moves `length` on after the last layer."""
        end = self.length + k_BHTD.shape[2]
        self.keys[layer, :, :, self.length : end] = k_BHTD
        self.values[layer, :, :, self.length : end] = v_BHTD
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Block(nn.Module):
    """A pre-LayerNorm transformer block."""

    def __init__(self, model: Int8Model, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head = layer, model.model.n_head
        self.activation = ACTIVATIONS[model.model.activation]
        name = f"transformer.h.{layer}"
        self.ln_1, self.ln_2 = (LayerNorm(model, f"{name}.{norm}") for norm in ("ln_1", "ln_2"))
        queries, others = slice(model.model.n_embd), slice(model.model.n_embd, None)
        self.query, self.key_value = (matrix(model, f"{name}.attn.c_attn", rows) for rows in (queries, others))
        self.attn_proj = matrix(model, f"{name}.attn.c_proj")
        self.c_fc, self.mlp_proj = (matrix(model, f"{name}.mlp.{part}") for part in ("c_fc", "c_proj"))

    def forward(self, x_BTC: Tensor, cache: KVCache | None, last_only: bool = False) -> Tensor:
        """Overwrites `x_BTC`, as fresh memory costs as much as a sum.

        `last_only`: the last position's values only, [B, 1, C]; the cache takes all keys and values.
        """
        kept_BTC = x_BTC[:, -1:] if last_only else x_BTC
        x_BTC = self.attn_proj.multiply(self.attend(self.ln_1(x_BTC), cache, last_only), kept_BTC)
        return self.mlp_proj.multiply(self.activation(self.c_fc.multiply(self.ln_2(x_BTC))), x_BTC)

    def attend(self, x_BTC: Tensor, cache: KVCache | None, last_only: bool) -> Tensor:
        """The heads' values by causal self-attention; the queries are the last T of the S positions seen so far."""
        operand = self.query.operand(x_BTC)
        del x_BTC  # as in `Int8Matrix.multiply`
        q_BTC = self.query.product(tuple(part[:, -1:] for part in operand) if last_only else operand)
        kv_BSC2 = self.key_value.product(operand)
        q_BHTD, k_BHSD, v_BHSD = (
            heads.unflatten(2, (self.n_head, -1)).transpose(1, 2) for heads in (q_BTC, *kv_BSC2.chunk(2, dim=2))
        )
        if cache is not None:
            k_BHSD, v_BHSD = cache.extend(self.layer, k_BHSD, v_BHSD)
        queries = q_BHTD.shape[2]
        keys = k_BHSD.shape[2]
        visible_TS = None  # one query, the last position, sees everything; in a square, `is_causal` says it
        if 1 < queries < keys:
            visible_TS = torch.ones(queries, keys, dtype=torch.bool, device=q_BHTD.device).tril(keys - queries)
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=visible_TS, is_causal=queries == keys)
        return y_BHTD.transpose(1, 2).flatten(2)


def matrix(model: Int8Model, name: str, rows: slice = slice(None)) -> Int8Matrix:
    """The matrix `name` (without `.weight`) with its bias, if it has one, or `rows` of it."""
    whole, bias = model.matrices[name], model.vectors.get(f"{name}.bias")
    tensor = Int8Tensor(whole.codes[rows], whole.scale if len(whole.scale) == 1 else whole.scale[rows])
    return Int8Matrix(tensor, None if bias is None else bias[rows], model.quantization.activation_bits)


class Int8GPT(nn.Module):
    """The int8 model; it has buffers only, no parameters: nothing here is trained.

    Attributes:
        config: the architecture.
    """

    def __init__(self, model: Int8Model) -> None:
        super().__init__()
        self.config = model.model
        self.wte, self.wpe = (matrix(model, f"transformer.{name}") for name in ("wte", "wpe"))
        self.h = nn.ModuleList([Block(model, layer) for layer in range(self.config.n_layer)])
        self.ln_f = LayerNorm(model, "transformer.ln_f")
        self._bytes = sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens_BT: token ids, int64; at positions 0.., or following what the cache holds, which they then extend.
            cache: keys and values of earlier positions.
            last_only: compute the logits of the last position only.

        Returns:
            float32 logits [B, T, V], or [B, 1, V].

        Raises:
            ValueError: the positions do not fit into `block_size`.
        """
        is_small = tokens_BT.device.type == "cpu" and is_small_call(tokens_BT.numel(), self._bytes)
        with one_thread() if is_small else contextlib.nullcontext():
            return self._logits(tokens_BT, cache, last_only)

    def _logits(self, tokens_BT: Tensor, cache: KVCache | None, last_only: bool) -> Tensor:
        first = 0 if cache is None else cache.length
        end = first + tokens_BT.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} positions do not fit into block_size={self.config.block_size}")
        x_BTC = self.wte.lookup(tokens_BT).add_(self.wpe.lookup(torch.arange(first, end, device=tokens_BT.device)))
        for layer, block in enumerate(self.h):
            x_BTC = block(x_BTC, cache, last_only and layer == len(self.h) - 1)
        if cache is not None:
            cache.length = end
        return self.wte.multiply(self.ln_f(x_BTC))

    def generate(self, tokens_BT: Tensor, *settings: Any, **named: Any) -> Tensor:
        """Continues every row of `tokens_BT`, int64 [B, T], by the `settings` of `Sampling`: int64 [B, T + N]."""
        text = loop.pieces(TorchGPT(self), tokens_BT.cpu().numpy(), Sampling(*settings, **named))
        return torch.cat([tokens_BT, *(torch.from_numpy(piece_B1).to(tokens_BT.device) for piece_B1 in text)], dim=1)

    def evaluate(self, tokens: npt.ArrayLike, block_size: int, batch_size: int = BATCH_SIZE) -> float:
        """Mean loss in nats per token; see `picogpt_jax.runtimes.loop.evaluate`."""
        return loop.evaluate(TorchGPT(self), tokens, block_size, batch_size)


class TorchGPT:
    """An `Int8GPT`, on whichever device, as a `picogpt_jax.runtimes.loop.Runtime`: NumPy arrays in and out."""

    windows_at_once = 1

    def __init__(self, network: Int8GPT) -> None:
        self._network, self._device = network, network.wte.codes.device
        self.block_size, self.vocab_size = network.config.block_size, network.config.vocab_size

    def new_cache(self, batch: int) -> KVCache:
        """A cache of no positions."""
        return KVCache(self._network.config, batch, self._device)

    @torch.no_grad()
    def forward(
        self, tokens_BT: npt.NDArray[np.int64], cache: KVCache | None = None, last_only: bool = False
    ) -> npt.NDArray[np.float32]:
        """Logits of the next token at every position, float32 [B, T, V]; see `picogpt_jax.runtimes.loop.Runtime`."""
        logits_BTV: Tensor = self._network(torch.from_numpy(tokens_BT).to(self._device), cache, last_only)
        return logits_BTV.cpu().numpy()
