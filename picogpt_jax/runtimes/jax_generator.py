"""Draws text from a model in JAX, with a KV cache and compiled loops that draw many tokens in one dispatch.

Shapes: B streams, T time, V vocabulary, N tokens of a piece or of the random bits at hand.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, UInt32

from picogpt_jax.config import MeshConfig, ModelConfig
from picogpt_jax.devices import sharding
from picogpt_jax.devices.setup import compiler_options
from picogpt_jax.devices.sharding import batch_sharding, make_mesh, replicated
from picogpt_jax.errors import UserError
from picogpt_jax.int8.convert import FLOAT, serving_quant, serving_variables
from picogpt_jax.int8.int8_model import Int8Model
from picogpt_jax.int8.integer_model import IntegerModel
from picogpt_jax.model.gpt import GPT, KVCache
from picogpt_jax.model.numerics import Numerics
from picogpt_jax.runtimes.draws import Scale, random_bits
from picogpt_jax.runtimes.engine import Overflow, Sampling, checked_tokens
from picogpt_jax.runtimes.jax_draws import draw

# What has been drawn is streamed after each dispatch. Entering the compiled loop costs as much as many tokens, so the
# pieces grow for as long as one takes no longer than a reader would notice.
FIRST_PIECE, GROWTH, PIECE_SECONDS = 8, 4, 0.25
TOKENS_PER_DISPATCH = 512  # at most; for as many the random bits are computed together
# On CPU, where a device has more streams than its cache holds keys and values, they take turns, a piece each: on two
# devices 32 streams of the default model are 1.4 times as fast in two turns of 2 x 8. With few streams in a turn the
# weights, read again at every step, cost what is saved.
TURN_BYTES, TURN_STREAMS = 6 << 20, 4  # of a turn on a device: keys and values at most, streams at least


@struct.dataclass
class Context:
    """What the model has seen of each stream.

    Attributes:
        tokens: by position; what lies beyond `cache.length` is not read.
        cache: their keys and values. Where the window slides they are left behind, but for their number.
        logits: of the next token.
    """

    tokens: Int[Array, "B T"]
    cache: KVCache
    logits: Float[Array, "B V"]


class Generator:
    """Draws tokens from a model.

    Positions are absolute and the context holds `block_size` tokens. Past that, "slide" drops the oldest token at each
    step, which moves every position and so needs a full forward pass a token (nanoGPT's behaviour); "refill" keeps the
    last half of the window, computes its keys and values once, and goes on with the cache.

    Args:
        model: mode "serve" for int8 codes, "float" or "train" (QAT) for float parameters.
        variables: what `model.apply` takes.
        mesh: over which the variables are split already, and the KV cache will be; None: each device that has streams
            of its own holds a copy.
    """

    def __init__(self, model: GPT, variables: Any, mesh: Mesh | None = None) -> None:
        self.model, self.mesh = model, mesh
        if mesh is not None:
            sharding.check_divides("heads", "the attention heads (model.n_head)", model.config.n_head, mesh)
        self.block_size, self.variables = model.config.block_size, variables
        self._variables = {1: variables}  # number of devices -> a copy on each of them
        # A softmax and attention to a cache sum over the positions, a LayerNorm over the width.
        options = compiler_options(longest_sum=max(model.config.block_size, model.config.n_embd))
        self._prefill = jax.jit(self._prefill_impl, compiler_options=options)
        self._extend = jax.jit(
            self._extend_impl,
            static_argnames=("top_k", "overflow"),
            donate_argnums=1,
            compiler_options=options,
        )

    @classmethod
    def from_int8(cls, model: Int8Model | IntegerModel, mesh: Mesh | None = None) -> Self:
        """Serves int8 products from the codes; there is no float matrix in memory.

        Args:
            mesh: splits codes, scales and the KV cache, for models that one device does not hold.
        """
        return cls(GPT(model.model, Numerics(serving_quant(model), "serve")), serving_variables(model, mesh), mesh)

    @classmethod
    def from_params(cls, config: ModelConfig, params: Any) -> Self:
        """Float parameters, computed without any quantization."""
        return cls(GPT(config, Numerics(FLOAT, "float")), {"params": params})

    def generate(self, prompt_BT: npt.NDArray[np.integer], *settings: Any, **named: Any) -> npt.NDArray[np.int32]:
        """Continues each row of `prompt_BT`, [B, T], by the `settings` of `Sampling`: int32 [B, T + max_new_tokens]."""
        pieces = self.pieces(prompt_BT, Sampling(*settings, **named))
        return np.concatenate([prompt_BT, *pieces], axis=1, dtype=np.int32)

    def pieces(self, prompt_BT: npt.NDArray[np.integer], sampling: Sampling) -> Iterator[npt.NDArray[np.int32]]:
        """What follows each row of `prompt_BT`, int32 [B, N] at a time, as it is drawn.

        Args:
            prompt_BT: token ids [B, T], T >= 1; what exceeds block_size is cropped to its end, as in nanoGPT.

        Raises:
            UserError: at once, an empty prompt, an id outside the vocabulary, or streams that do not divide over the
                mesh.
        """
        prompt_BT = checked_tokens(prompt_BT, self.model.config.vocab_size, "the prompt")
        return self._pieces(prompt_BT.astype(np.int32), sampling, *self._split_streams(len(prompt_BT)))

    def _pieces(
        self, prompt_BT: npt.NDArray[np.int32], sampling: Sampling, variables: Any, mesh: Mesh
    ) -> Iterator[npt.NDArray[np.int32]]:
        """The new tokens; a piece is read while the next one is being computed."""
        streams, prompt_length = prompt_BT.shape
        vocab_size = self.model.config.vocab_size
        end = prompt_length + sampling.max_new_tokens
        top_k = sampling.top_k
        options: dict[str, Any] = dict(
            top_k=top_k if top_k and top_k < vocab_size else None,
            overflow=sampling.overflow if end > self.block_size else None,  # what is never needed is not compiled
        )
        scale = Scale.of(sampling.temperature) if sampling.temperature > 0 else None
        wanted, index, unread = FIRST_PIECE, 0, None
        turns = np.split(prompt_BT[:, -self.block_size :], self._turns(streams, mesh))
        contexts = [self._fill(variables, turn_BT, batch_sharding(mesh)) for turn_BT in turns]
        began = time.perf_counter()
        while index < sampling.max_new_tokens:
            used = index % TOKENS_PER_DISPATCH
            if used == 0:
                bits_NB = random_bits(sampling.seed, index, TOKENS_PER_DISPATCH, streams)
                parts = np.split(bits_NB, len(turns), axis=1)
                bits = [jax.device_put(part, batch_sharding(mesh, 1)) for part in parts]
            count = min(wanted, sampling.max_new_tokens - index, TOKENS_PER_DISPATCH - used)
            extended = [
                self._extend(variables, context, bits_NB, used, count, scale, **options)
                for context, bits_NB in zip(contexts, bits, strict=True)
            ]
            contexts = [context for _, context in extended]
            index += count
            if unread is not None:
                yield np.concatenate(unread[0])[:, : unread[1]]
                now = time.perf_counter()
                wanted *= GROWTH if GROWTH * (now - began) < PIECE_SECONDS else 1
                began = now
            unread = [new_BN for new_BN, _ in extended], count
        if unread is not None:
            yield np.concatenate(unread[0])[:, : unread[1]]

    def _turns(self, streams: int, mesh: Mesh) -> int:
        """The number of equal groups of streams that take turns; 1 where it would not pay."""
        if self.mesh is not None or mesh.devices.flat[0].platform != "cpu":
            return 1
        config, on_device = self.model.config, streams // mesh.size
        stream_bytes = 2 * config.n_layer * config.block_size * config.n_embd * self.model.numerics.dtype.itemsize
        for turns in range(1, on_device // TURN_STREAMS + 1):
            if on_device % turns == 0 and on_device // turns * stream_bytes <= TURN_BYTES:
                return turns
        return 1

    def _apply(self, variables: Any, tokens_BT: Int[Array, "B T"], **options: Any) -> Any:
        with sharding.on(self._mesh_of(len(tokens_BT))):
            return self.model.apply(variables, tokens_BT, **options)

    def _split_streams(self, streams: int) -> tuple[Any, Mesh]:
        """The variables on the devices that share the streams, and the mesh of those."""
        mesh = self._mesh_of(streams)
        if self.mesh is not None:
            parts = mesh.shape["data"] * mesh.shape["fsdp"]
            if streams % parts:
                raise UserError(f"{streams} streams do not divide over mesh.data * mesh.fsdp = {parts}; change one")
            return self._variables[1], mesh
        if mesh.size not in self._variables:
            self._variables[mesh.size] = jax.device_put(self._variables[1], replicated(mesh))
        return self._variables[mesh.size], mesh

    def _mesh_of(self, streams: int) -> Mesh:
        """The mesh given, or one of as many devices as divide the streams."""
        if self.mesh is not None:
            return self.mesh
        devices = jax.local_devices()
        count = max(number for number in range(1, len(devices) + 1) if streams % number == 0)
        return make_mesh(MeshConfig(data=count, fsdp=1, tensor=1), streams, devices[:count])

    def _fill(self, variables: Any, tokens_BT: npt.NDArray[np.int32], place: NamedSharding) -> Context:
        """A new context of these tokens."""
        padded_BT = jax.device_put(self.padded(tokens_BT), place)
        return self._prefill(variables, padded_BT, jnp.int32(tokens_BT.shape[1]))

    def padded(self, tokens_BT: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The tokens and what pads them to a power of two: windows of any length need few compilations."""
        length = tokens_BT.shape[1]
        wanted = min(self.block_size, max(8, 1 << (length - 1).bit_length()))
        return np.pad(tokens_BT, ((0, 0), (0, wanted - length)))

    def _prefill_impl(self, variables: Any, tokens_BT: Int[Array, "B T"], length: Int[Array, ""]) -> Context:
        logits_BTV, cache = self._apply(variables, tokens_BT, keep_cache=True)
        # Padding has written keys beyond `length`; the next tokens overwrite them before they can be seen.
        logits_B1V = lax.dynamic_slice_in_dim(logits_BTV, length - 1, 1, axis=1)
        return Context(self._padded(tokens_BT), dataclasses.replace(cache, length=length), logits_B1V[:, 0])

    def _padded(self, tokens_BT: Int[Array, "B T"]) -> Int[Array, "B S"]:
        return jnp.pad(tokens_BT, ((0, 0), (0, self.block_size - tokens_BT.shape[1])))

    def _extend_impl(
        self,
        variables: Any,
        context: Context,
        bits_NB: UInt32[Array, "N B"],
        used: Int[Array, ""],
        count: Int[Array, ""],
        scale: Scale | None,
        top_k: int | None,
        overflow: Overflow | None,
    ) -> tuple[Int[Array, "B N"], Context]:
        """Draws `count` tokens, each from the logits of the one before it, with the random bits from `used` on.

        Args:
            overflow: what happens in a full context; None: it never gets full.
        """
        block_size = self.block_size
        Carry = tuple[Array, Context]

        def drawn(step: Int[Array, ""], carry: Carry) -> tuple[Array, Array]:
            out_BN, context = carry
            token_B1 = draw(context.logits, bits_NB[used + step], scale, top_k)[:, None]
            return token_B1, lax.dynamic_update_slice_in_dim(out_BN, token_B1, step, axis=1)

        def append(step: Int[Array, ""], carry: Carry) -> Carry:
            token_B1, out_BN = drawn(step, carry)
            tokens_BT, cache = carry[1].tokens, carry[1].cache
            tokens_BT = lax.dynamic_update_slice_in_dim(tokens_BT, token_B1, cache.length, axis=1)
            logits_B1V, cache = self._apply(variables, token_B1, cache=cache)
            return out_BN, Context(tokens_BT, cache, logits_B1V[:, 0])

        def make_room(step: Int[Array, ""], carry: Carry) -> Carry:
            token_B1, out_BN = drawn(step, carry)
            keep = block_size if overflow == "slide" else max(block_size // 2, 1)
            window_BT = jnp.concatenate([carry[1].tokens[:, block_size - keep + 1 :], token_B1], axis=1)
            if overflow == "slide":
                logits_B1V, cache = self._apply(variables, window_BT, last_only=True), carry[1].cache
            else:
                logits_B1V, cache = self._apply(variables, window_BT, keep_cache=True, last_only=True)
            return out_BN, Context(self._padded(window_BT), cache, logits_B1V[:, 0])

        def go_on(state: tuple[Array, Carry]) -> tuple[Array, Carry]:
            step, carry = state
            full = jnp.minimum(count, step + block_size - carry[1].cache.length)
            carry = lax.fori_loop(step, full, append, carry)
            if overflow is None:
                return full, carry
            # A loop, though of one turn at most where there is room again, and no `cond`: what never changes is then
            # computed outside of all loops.
            past = count if overflow == "slide" else jnp.minimum(count, full + 1)
            return past, lax.fori_loop(full, past, make_room, carry)

        out_BN = jnp.zeros((len(context.logits), len(bits_NB)), jnp.int32)
        return lax.while_loop(lambda state: state[0] < count, go_on, (jnp.int32(0), (out_BN, context)))[1]
