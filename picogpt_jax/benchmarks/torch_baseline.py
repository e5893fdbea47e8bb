"""The baseline of the benchmarks: picoGPT's way of training and sampling, in eager PyTorch (extra: torch).

`Training` takes AdamW steps of a nanoGPT-style `GPT`, in float or with PyTorch's fake quantization (`prepare_qat`).
`Decoding` is the int8 sampler: weights become floats in every call, and every token takes a whole window. Where there
is a choice it is what is fast in PyTorch.

Shapes: B batch, T time, C width, H heads, D head size, V vocabulary; K steps.
"""

import functools
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("this needs PyTorch; install it with: pip install 'picogpt_jax[torch]'") from error

from picogpt_jax.config import Config, ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.int8.int8_model import Int8Model, Int8Tensor, requantize_per_tensor
from picogpt_jax.text.batches import Tokens, batch_starts

INIT_STDDEV = 0.02
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def device_like(jax_backend: str) -> str:
    """PyTorch's name of the kind of device that JAX calls "cpu" or "gpu".

    Raises:
        UserError: PyTorch cannot use one.
    """
    if jax_backend == "cpu":
        return "cpu"
    if jax_backend == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise UserError(f"JAX runs on a {jax_backend}, which this PyTorch cannot use; leave PyTorch out: --notorch")


class Attention(nn.Module):
    """Multi-head causal self-attention, q, k and v from one matmul."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        batch, time, width = x_BTC.shape
        qkv_BT3HD = self.c_attn(x_BTC).view(batch, time, 3, self.n_head, -1)
        q_BHTD, k_BHTD, v_BHTD = qkv_BT3HD.permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, dropout_p=rate, is_causal=True)
        return self.resid_dropout(self.c_proj(y_BHTD.transpose(1, 2).reshape(batch, time, width)))

    def at_the_last(self, x_BTC: Tensor) -> Tensor:
        """`forward` in evaluation for the last position only, [B, 1, C]: the others' queries are not needed."""
        width, bias = x_BTC.shape[2], self.c_attn.bias
        q_B1C = F.linear(x_BTC[:, -1:], self.c_attn.weight[:width], None if bias is None else bias[:width])
        kv_BTE = F.linear(x_BTC, self.c_attn.weight[width:], None if bias is None else bias[width:])
        heads = (part.unflatten(2, (self.n_head, -1)).transpose(1, 2) for part in (q_B1C, *kv_BTE.chunk(2, dim=2)))
        return self.c_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers around the activation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.c_fc = nn.Linear(config.n_embd, config.n_hidden, bias=config.bias)
        self.c_proj = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.activation(self.c_fc(x_BTC))))


class Block(nn.Module):
    """A pre-LayerNorm transformer block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1, self.attn = layer_norm(config), Attention(config)
        self.ln_2, self.mlp = layer_norm(config), MLP(config)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC))
        return x_BTC + self.mlp(self.ln_2(x_BTC))

    def at_the_last(self, x_BTC: Tensor) -> Tensor:
        """As in `Attention`."""
        x_B1C = x_BTC[:, -1:] + self.attn.at_the_last(self.ln_1(x_BTC))
        return x_B1C + self.mlp(self.ln_2(x_B1C))


def layer_norm(config: ModelConfig) -> nn.LayerNorm:
    """PyTorch's LayerNorm over the width."""
    return nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias)


class GPT(nn.Module):
    """The architecture of `picogpt_jax.model.gpt.GPT`; the names of its tensors are nanoGPT's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.Sequential(*[Block(config) for _ in range(config.n_layer)]),
                ln_f=layer_norm(config),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=INIT_STDDEV)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """The mean loss in nats per token where there are targets, else the last position's logits, [B, V]."""
        x_BTC = self.transformer["ln_f"](self.transformer["h"](self.embed(tokens_BT)))
        if targets_BT is None:
            return self.lm_head(x_BTC[:, -1])  # nanoGPT's way
        return F.cross_entropy(self.lm_head(x_BTC).flatten(0, 1), targets_BT.flatten())

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """What enters the first block, [B, T, C]."""
        positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        return self.transformer["drop"](self.transformer["wte"](tokens_BT) + self.transformer["wpe"](positions))

    def last_logits(self, tokens_BT: Tensor) -> Tensor:
        """Those of the last position, [B, V], without what the last block would compute for the others."""
        *blocks, last = self.transformer["h"].children()
        assert isinstance(last, Block)
        x_BTC = self.embed(tokens_BT)
        for block in blocks:
            x_BTC = block(x_BTC)
        return self.lm_head(self.transformer["ln_f"](last.at_the_last(x_BTC))[:, 0])


def prepare_qat(model: GPT) -> GPT:
    """Gives every linear layer the fake quantization of PyTorch's QAT, in place; the embeddings stay float."""
    from torch.ao import quantization  # deprecated in favour of torchao, and still what picoGPT trains with

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"torch\.ao\.quantization is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "Please use quant_min and quant_max", UserWarning)
        settings = quantization.get_default_qat_qconfig("fbgemm")
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.qconfig = settings
        quantization.prepare_qat(model.train(), inplace=True)
    return model


class Training:
    """AdamW steps of a new model, at a constant learning rate.

    Args:
        config: of the model, the optimizer and the batches.
        quantized: with PyTorch's fake quantization.
        tokens: what the batches are drawn from.
        dtype: of the matmuls, by autocast; float32 where `quantized`: the fused fake quantization knows no other.
        device: where to train.
    """

    def __init__(self, config: Config, quantized: bool, tokens: Tokens, dtype: str, device: str) -> None:
        self.config, self.tokens, self.device = config, tokens, device
        torch.manual_seed(config.train.seed)
        model = prepare_qat(GPT(config.model)) if quantized else GPT(config.model)
        self.model = model.to(device).train()
        self.autocast = torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32" and not quantized)
        matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.optimizer.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.optimizer.learning_rate,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            fused=device == "cuda",
        )

    def __call__(self) -> float:
        """Takes `train.log_interval` steps; returns the last loss, in nats per token, when all are done."""
        train, length = self.config.train, self.config.model.block_size
        for step in range(train.log_interval):
            starts_B = batch_starts(train.seed, step, len(self.tokens), train.batch_size, length)
            loss = self.step(self.tokens.windows(starts_B, length + 1))
        return loss.item()

    def step(self, tokens_BT1: npt.NDArray[np.uint16]) -> Tensor:
        """One optimizer step; returns the loss."""
        ids_BT1 = torch.from_numpy(tokens_BT1.astype(np.int64)).to(self.device)
        with self.autocast:
            loss: Tensor = self.model(ids_BT1[:, :-1], ids_BT1[:, 1:])
        loss.backward()
        if self.config.optimizer.grad_clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


class Int8Linear(nn.Module):
    """A linear layer that stores int8 and multiplies in float32: its weights are dequantized in every call."""

    weight_int8: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Int8Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight_int8", torch.tensor(weight.codes))
        self.register_buffer("weight_scale", torch.tensor(weight.scale.item()))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_int8.float() * self.weight_scale, self.bias)


def dequantized(model: Int8Model) -> GPT:
    """The int8 model in float: its weights are codes * scale."""
    gpt = GPT(model.model)
    matrices = model.matrices | {"lm_head": model.matrices["transformer.wte"]}
    tensors = {f"{name}.weight": matrix.dequantize() for name, matrix in matrices.items()} | model.vectors
    gpt.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
    return gpt.eval()


def dequantizing(model: Int8Model) -> GPT:
    """The model of picoGPT's int8 sampler: `Int8Linear` layers with one scale each, and float embeddings."""
    model = requantize_per_tensor(model)
    gpt = dequantized(model)
    matrices = model.matrices | {"lm_head": model.matrices["transformer.wte"]}
    linear = {name: module for name, module in gpt.named_modules() if isinstance(module, nn.Linear)}
    for name, module in linear.items():
        bias = None if module.bias is None else module.bias.detach()
        gpt.set_submodule(name, Int8Linear(matrices[name], bias))
    return gpt


class Decoding:
    """Draws tokens after a prompt of one token, recomputing the window of the last `block_size` tokens for each."""

    def __init__(self, model: Int8Model, new_tokens: int, temperature: float, device: str, threads: int) -> None:
        self.model = dequantizing(model).to(device)
        self.new_tokens, self.temperature, self.device, self.threads = new_tokens, temperature, device, threads

    @torch.no_grad()
    def __call__(self) -> list[int]:
        """Returns the prompt and the new tokens; leaves PyTorch with this number of threads."""
        torch.set_num_threads(self.threads)
        ids_1T = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        for _ in range(self.new_tokens):
            logits_1V = self.model(ids_1T[:, -self.model.config.block_size :])
            next_11 = torch.multinomial((logits_1V / self.temperature).softmax(-1), 1)
            ids_1T = torch.cat((ids_1T, next_11), dim=1)
        return ids_1T[0].tolist()


def matmuls(rows: int, features: int, outputs: int, count: int) -> Callable[[], None]:
    """Work for the CPU: `count` times the float32 product [rows, features] x [features, outputs]."""
    x, w = torch.ones(rows, features), torch.ones(features, outputs)

    def work() -> None:
        for _ in range(count):
            torch.mm(x, w)

    return work
