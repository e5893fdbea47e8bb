"""The GPT: a GPT-2/nanoGPT pre-LayerNorm decoder in Flax linen, in float, in QAT and in int8, with one code path.

Shapes: B batch, T time (query), S time (key), C width, H heads, D head size, F hidden width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from picogpt_jax.config import ModelConfig, Remat
from picogpt_jax.devices.sharding import constrain
from picogpt_jax.kernels.fused_attention import fused as fused_attention
from picogpt_jax.model import attention, integer
from picogpt_jax.model.dropout import DropoutKey, dropout
from picogpt_jax.model.linear import Dense, Embedding, Table, as_row, init_stddev
from picogpt_jax.model.numerics import Numerics
from picogpt_jax.model.quantization import ROUNDING


def remat_policy(remat: Remat, numerics: Numerics) -> Callable[..., Any]:
    """What the backward pass finds in memory of a block, besides its input; the rest is computed again.

    "block" keeps nothing, for a third more work and the least memory. "dots" keeps the outputs of the linear layers, in
    the compute type: most of that work. Of int8 layers it does not keep the wide ones: to multiply int8 codes again
    takes less memory traffic than to write the output, to stack it and to read it. Of the integer attention kernel it
    keeps the result: to compute that again takes the codes of queries, keys and values as well.
    """
    if remat == "block":
        return jax.checkpoint_policies.nothing_saveable
    is_int8 = numerics.mode != "float" and numerics.quant.activation_bits is not None
    wide = () if is_int8 else ("c_attn", "c_fc")
    return jax.checkpoint_policies.save_only_these_names("c_proj", "attention", *wide)


@struct.dataclass
class KVCache:
    """Keys and values of the positions seen so far.

    Attributes:
        layers: for each layer what is kept (`attention.Kept`), of S positions; what lies beyond `length` is not read.
        length: int32 scalar, positions filled.
    """

    layers: tuple[attention.Kept, ...]
    length: Int[Array, ""]


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension, in float32 at least; the result in the compute type."""

    config: ModelConfig
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        vectors: list[Any] = [self.param("scale", init, (x.shape[-1],), jnp.float32)]
        if self.config.bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
            vectors.append(self.param("bias", init, (x.shape[-1],), jnp.float32))
        scale, *bias = (as_row(vector, x.ndim) for vector in vectors)
        x_float = x.astype(jnp.float32)
        if self.numerics.mode != "float" and not self.numerics.is_integer and not self.has_rng(ROUNDING):
            # Float weights and codes make `x` by other code. Compiled into the sums, it would change their order, and
            # the last bit of what is served. A training step, which draws, is left as fast as it is.
            x_float = lax.optimization_barrier(x_float)
        centred = x_float - x_float.mean(-1, keepdims=True)
        inverse = lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.config.layer_norm_epsilon)
        y = centred * inverse * scale
        y = (y + bias[0] if bias else y).astype(self.numerics.dtype)
        if self.numerics.is_integer:
            return integer.carry(integer.norm(x, vectors[0], vectors[1] if self.config.bias else None), y)
        return y


def split_heads(qkv: Float[Array, "B T *qkv"], n_head: int, numerics: Numerics) -> tuple[Float[Array, "B H T D"], ...]:
    """q, k and v of each head, from [B, T, 3 C]; or from [B, T, 3, C], whose heads are split over devices."""
    batch, time = qkv.shape[:2]

    def at_once(qkv: Float[Array, "B T *qkv"]) -> tuple[Array, ...]:
        qkv_3BHTD = qkv.reshape(batch, time, 3, n_head, -1).transpose(2, 0, 3, 1, 4)
        return qkv_3BHTD[0], qkv_3BHTD[1], qkv_3BHTD[2]

    def apart(qkv: Float[Array, "B T qkv"]) -> tuple[Array, ...]:
        parts = jnp.split(qkv, 3, -1)
        return tuple(part.reshape(batch, time, n_head, -1).transpose(0, 2, 1, 3) for part in parts)

    if qkv.ndim > 3 or numerics.dtype != jnp.bfloat16:
        return at_once(qkv)
    # The TPU compiler moves each part once then, and all three together three times; the one for GPUs is better so.
    return tuple(lax.platform_dependent(qkv, tpu=apart, default=at_once))


def written_as_matrix(y: Float[Array, "B T *O"], numerics: Numerics) -> Float[Array, "B T *O"]:
    """`y`, which a TPU in QAT writes as it is: else its compiler keeps int8 products in float32 and copies those."""
    if numerics.mode != "train" or y.dtype != jnp.bfloat16:
        return y
    written = lambda y: lax.optimization_barrier(y.reshape(-1, *y.shape[2:])).reshape(y.shape)  # noqa: E731
    return lax.platform_dependent(y, tpu=written, default=lambda y: y)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x * Phi(x), with the error function."""
    return 0.5 * x * (1.0 + lax.erf(x * 0.5**0.5))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),  # GPT-2's approximation of it
    "relu": integer.relu,
}


class Attention(nn.Module):
    """Multi-head causal self-attention, q, k and v from one matmul."""

    config: ModelConfig
    numerics: Numerics

    @nn.compact
    def __call__(
        self,
        x_BTC: Float[Array, "B T C"],
        key: DropoutKey | None,
        cache: attention.LayerCache | None,
        last_only: bool,
    ) -> tuple[Float[Array, "B t C"], attention.Kept]:
        config, numerics = self.config, self.numerics
        batch, time, width = x_BTC.shape
        factor, bits = attention.query_factor(config.head_size), integer.HEAD_BITS
        c_attn = functools.partial(Dense, parts=3, output_bits=bits, first_factor=factor, name="c_attn")
        qkv = written_as_matrix(c_attn(3 * width, ("embed", "qkv"), numerics, config.bias)(x_BTC), numerics)
        heads = split_heads(qkv, config.n_head, numerics)
        q_BHTD, k_BHTD, v_BHTD = (constrain(part_BHTD, "batch", "heads", None, None) for part_BHTD in heads)
        if last_only:
            q_BHTD, time = q_BHTD[:, :, -1:], 1
        site = "/".join(self.path)
        drop = functools.partial(dropout, rate=config.dropout, key=key, site=f"{site}/weights")
        updated: attention.Kept
        if numerics.is_integer:
            dropping = None if key is None or config.dropout == 0.0 else drop
            y_BHTD, updated = attention.integer_attend(numerics, config, q_BHTD, k_BHTD, v_BHTD, cache, dropping)
        elif numerics.attention == "plain" or cache is not None or last_only:
            y_BHTD = attention.attend(numerics, q_BHTD, k_BHTD, v_BHTD, cache, drop)
        else:
            y_BHTD = fused_attention(numerics.attention, q_BHTD, k_BHTD, v_BHTD)
        if not numerics.is_integer:
            updated = (k_BHTD, v_BHTD)
        if cache is not None and not numerics.is_integer:
            (keys_BHSD, values_BHSD), length = cache
            # What is written is made to depend on the result (which is never NaN): the compiler then knows that the old
            # cache has been read, and writes in place. Without it every cache was copied twice for every token.
            broken = jnp.isnan(y_BHTD[:, :, -1:])
            updated = (
                lax.dynamic_update_slice_in_dim(keys_BHSD, jnp.where(broken, 0.0, k_BHTD), length, 2),
                lax.dynamic_update_slice_in_dim(values_BHSD, jnp.where(broken, 0.0, v_BHTD), length, 2),
            )
        y_BTC = y_BHTD.transpose(0, 2, 1, 3).reshape(batch, time, width)
        stddev = init_stddev("c_proj", config.n_layer)
        y_BTC = Dense(width, ("heads", "embed"), numerics, config.bias, stddev, name="c_proj")(y_BTC)
        return dropout(y_BTC, config.dropout, key, f"{site}/residual"), updated


class MLP(nn.Module):
    config: ModelConfig
    numerics: Numerics

    @nn.compact
    def __call__(self, x_BTC: Float[Array, "B T C"], key: DropoutKey | None) -> Float[Array, "B T C"]:
        config, numerics = self.config, self.numerics
        bits = integer.HIDDEN_BITS[config.activation]
        h_BTF = Dense(config.n_hidden, ("embed", "mlp"), numerics, config.bias, output_bits=bits, name="c_fc")(x_BTC)
        h_BTF = constrain(written_as_matrix(h_BTF, numerics), "batch", None, "mlp")
        y_BTF = ACTIVATIONS[config.activation](h_BTF)
        if numerics.is_integer:
            y_BTF = integer.carry(integer.ACTIVATIONS[config.activation](h_BTF), y_BTF)
        stddev, bits = init_stddev("c_proj", config.n_layer), integer.RESIDUAL_BITS
        y_BTC = Dense(config.n_embd, ("mlp", "embed"), numerics, config.bias, stddev, input_bits=bits, name="c_proj")(
            y_BTF
        )
        return dropout(y_BTC, config.dropout, key, f"{'/'.join(self.path)}/residual")


def added(numerics: Numerics, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """x + y, on the residual stream."""
    return integer.carry(integer.add(x, y), x + y) if numerics.is_integer else x + y


class Block(nn.Module):
    config: ModelConfig
    numerics: Numerics

    @nn.compact
    def __call__(
        self,
        x_BTC: Float[Array, "B T C"],
        key: DropoutKey | None,
        cache: attention.LayerCache | None,
        last_only: bool,
    ) -> tuple[Float[Array, "B t C"], attention.Kept]:
        config, numerics = self.config, self.numerics
        normed_BTC = LayerNorm(config, numerics, name="ln_1")(x_BTC)
        y_BTC, updated = Attention(config, numerics, name="attn")(normed_BTC, key, cache, last_only)
        x_BTC = added(numerics, x_BTC[:, -1:] if last_only else x_BTC, y_BTC)
        x_BTC = constrain(x_BTC, "batch", None, None)
        y_BTC = MLP(config, numerics, name="mlp")(LayerNorm(config, numerics, name="ln_2")(x_BTC), key)
        x_BTC = added(numerics, x_BTC, y_BTC)
        x_BTC = constrain(x_BTC, "batch", None, None)
        return x_BTC, updated


class GPT(nn.Module):
    """The language model.

    Attributes:
        scan: compile one block and run it `n_layer` times, its parameters stacked (`picogpt_jax.model.layers`).
        remat: what the backward pass computes again instead of keeping it. Both are for training: modes "float" and
            "train", without a cache.
        vocabulary_size: token ids that there are, where `config.vocab_size` is padded beyond them (`Embedding.used`).
    """

    config: ModelConfig
    numerics: Numerics
    scan: bool = False
    remat: Remat = "none"
    vocabulary_size: int | None = None

    def setup(self) -> None:
        config, numerics = self.config, self.numerics
        self.wte = Embedding(config.vocab_size, config.n_embd, ("vocab", "embed"), numerics, self.vocabulary_size)
        self.wpe = Embedding(config.block_size, config.n_embd, ("position", "embed"), numerics)
        self.h: Any
        if self.scan:
            self.h = Block(config, numerics)
        else:
            self.h = [Block(config, numerics) for _ in range(config.n_layer)]
        self.ln_f = LayerNorm(config, numerics)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        key: DropoutKey | None = None,
        cache: KVCache | None = None,
        keep_cache: bool = False,
        last_only: bool = False,
        headless: bool = False,
    ) -> Float[Array, "B t V"] | Float[Array, "B T C"] | tuple[Float[Array, "B t V"], KVCache]:
        """Logits of the next token at every position.

        Args:
            tokens_BT: token ids; without a cache they are at positions 0.., with one they follow what it holds.
            keep_cache: without a cache, start one with these tokens.
            key: dropout's key; None in evaluation.
            cache: keys and values of earlier positions.
            last_only: compute the logits of the last position only, [B, 1, V].
            headless: without a cache, return what `head` makes logits of.

        Returns:
            float32 logits; with a cache also the cache after these tokens. Positions must stay below `block_size`:
            the caller keeps the count, because `cache.length` is a traced value.
        """
        config = self.config
        time = tokens_BT.shape[1]
        if time > config.block_size:
            raise ValueError(f"{time} tokens do not fit into block_size={config.block_size}")
        first = 0 if cache is None else cache.length
        # Positions for every row: the gradient is then a scatter like the tokens', not a slow sum over the batch.
        positions_BT = jnp.broadcast_to(first + jnp.arange(time), tokens_BT.shape)
        # From tables split along their width, rows come in parts; then each goes whole to its device.
        x_BTC = added(self.numerics, self.wte(tokens_BT), self.wpe(positions_BT))
        x_BTC = constrain(x_BTC, "batch", None, None)
        x_BTC = dropout(x_BTC, config.dropout, key, "embeddings")
        updates: list[Any] = []
        if self.scan or self.remat != "none":
            if cache is not None or keep_cache or last_only:
                raise ValueError(
                    "a model with scan or remat keeps no cache; serve it without, its parameters unstacked"
                )
            x_BTC = self._blocks(x_BTC, key)
        else:
            for layer, block in enumerate(self.h):
                past = None if cache is None else (cache.layers[layer], cache.length)
                # Of the last layer, only the keys and values of the other positions matter to the last one.
                x_BTC, updated = block(x_BTC, key, past, last_only and layer == config.n_layer - 1)
                updates.append(updated)
        x_BTC = self.ln_f(x_BTC)
        if headless:
            return x_BTC
        logits_BTV = self.head(x_BTC)
        if cache is None and not keep_cache:
            return logits_BTV
        if cache is None:
            room = ((0, 0), (0, 0), (0, config.block_size - time), (0, 0))
            updates = [tuple(jnp.pad(array, room) for array in kept) for kept in updates]
        place = functools.partial(jax.tree.map, lambda array: constrain(array, "batch", "heads", None, None))
        return logits_BTV, KVCache(tuple(map(place, updates)), first + jnp.int32(time))

    def head(self, x_BTC: Float[Array, "B T C"], table: Table | None = None) -> Float[Array, "B T V"]:
        """float32 logits, of `wte` alone among the parameters; those of a `head_table` have no gradient at it."""
        return constrain(self.wte.attend(x_BTC, table).astype(jnp.float32), "batch", None, "vocab")

    def head_table(self) -> Table:
        """What `head` multiplies by, made once for many parts of a batch."""
        return self.wte.multiplied()

    def _blocks(self, x_BTC: Float[Array, "B T C"], key: DropoutKey | None) -> Float[Array, "B T C"]:
        """All blocks, scanned or rematerialised."""
        n_layer = self.config.n_layer

        def body(block: Block, x_BTC: Float[Array, "B T C"], layer: Array | None) -> tuple[Array, None]:
            here = key if key is None or layer is None else dataclasses.replace(key, layer=layer, n_layer=n_layer)
            return block(x_BTC, here, None, False)[0], None

        if self.remat != "none":
            body = nn.remat(body, prevent_cse=not self.scan, policy=remat_policy(self.remat, self.numerics))
        if not self.scan:
            for block in self.h:
                x_BTC, _ = body(block, x_BTC, None)
            return x_BTC
        scanned = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, ROUNDING: True},
            length=n_layer,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(self.h, x_BTC, jnp.arange(n_layer))[0]
