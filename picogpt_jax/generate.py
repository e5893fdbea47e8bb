"""Text from a model: a KV cache and compiled loops that draw many tokens in one dispatch.

Shapes: B streams, T time, V vocabulary.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from picogpt_jax import sharding
from picogpt_jax.config import MeshConfig, ModelConfig
from picogpt_jax.convert import FLOAT, serving_quant, serving_variables
from picogpt_jax.devices import compiler_options
from picogpt_jax.errors import UserError
from picogpt_jax.int8_model import Int8Model
from picogpt_jax.model import GPT, KVCache
from picogpt_jax.sharding import batch_sharding, make_mesh, replicated

Overflow = Literal["slide", "refill"]
TOKENS_PER_DISPATCH = 64  # at most; what has been drawn is streamed after each dispatch


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
        self.block_size = model.config.block_size
        self._variables = {1: variables}  # number of devices -> a copy on each of them
        self._prefill = jax.jit(self._prefill_impl, compiler_options=compiler_options())
        self._noise = jax.jit(gumbel_noise, static_argnums=(2, 3))
        options: dict[str, Any] = dict(static_argnames="top_k", compiler_options=compiler_options())
        self._decode = jax.jit(self._decode_impl, donate_argnums=1, **options)
        self._slide = jax.jit(self._slide_impl, **options)
        self._draw = jax.jit(draw, **options)

    @classmethod
    def from_int8(cls, model: Int8Model, mesh: Mesh | None = None) -> "Generator":
        """Serves int8 products from the codes; there is no float matrix in memory.

        Args:
            mesh: splits codes, scales and the KV cache, for models that one device does not hold.
        """
        return cls(GPT(model.model, serving_quant(model), "serve"), serving_variables(model, mesh), mesh)

    @classmethod
    def from_params(cls, config: ModelConfig, params: Any) -> "Generator":
        """Float parameters, computed without any quantization."""
        return cls(GPT(config, FLOAT, "float"), {"params": params})

    def generate(
        self,
        prompt_BT: npt.NDArray[np.integer],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        overflow: Overflow = "slide",
        stream: Callable[[npt.NDArray[np.int32]], None] | None = None,
    ) -> npt.NDArray[np.int32]:
        """Continues each row of `prompt_BT`.

        Args:
            prompt_BT: token ids [B, T], T >= 1; what exceeds block_size is cropped to its end, as in nanoGPT.
            temperature: 0 takes the likeliest token.
            top_k: draw among the k likeliest; None or 0: among all.
            stream: called with each new piece, int32 [B, n].

        Returns:
            int32 [B, T + max_new_tokens]: the prompt and what follows.

        Raises:
            UserError: an empty prompt, a temperature that is negative or not finite, or streams that do not divide
                over the mesh.
        """
        if prompt_BT.ndim != 2 or prompt_BT.shape[1] < 1:
            raise UserError(
                f"the prompt has shape {prompt_BT.shape}; expected [streams, tokens] with at least one token"
            )
        if not (math.isfinite(temperature) and temperature >= 0):
            raise UserError(f"temperature={temperature} is not a finite number >= 0")
        top_k = top_k if top_k and top_k < self.model.config.vocab_size else None
        key, heat = jax.random.key(seed), jnp.float32(temperature)
        text_BT = np.asarray(prompt_BT, np.int32)
        end = text_BT.shape[1] + max_new_tokens
        variables, mesh = self._split_streams(len(text_BT))
        place = batch_sharding(mesh)
        logits_BV, cache, filled = self._fill(variables, text_BT[:, -self.block_size :], place)
        noise_from = -TOKENS_PER_DISPATCH  # the index of the token that the noise at hand begins with
        while text_BT.shape[1] < end:
            if text_BT.shape[1] - noise_from >= TOKENS_PER_DISPATCH:
                noise_from = text_BT.shape[1]
                noise_NBV = self._noise(key, jnp.int32(noise_from), len(text_BT), self.model.config.vocab_size)
                noise_NBV = jax.device_put(noise_NBV, batch_sharding(mesh, 1))
            used = text_BT.shape[1] - noise_from
            count = min(end - text_BT.shape[1], TOKENS_PER_DISPATCH - used)
            if filled < self.block_size:
                count = min(count, self.block_size - filled)
                new_BN, logits_BV, cache = self._decode(
                    variables, cache, logits_BV, noise_NBV, used, count, heat, top_k=top_k
                )
                filled += count
            elif overflow == "slide":
                window_BT = jax.device_put(text_BT[:, -self.block_size :], place)
                new_BN = self._slide(variables, window_BT, noise_NBV, used, count, heat, top_k=top_k)
            else:
                count, keep = 1, max(self.block_size // 2, 1)
                new_BN = self._draw(logits_BV, noise_NBV[used], heat, top_k=top_k)[:, None]
                window_BT = np.concatenate([text_BT, np.asarray(new_BN)], axis=1)[:, -keep:]
                logits_BV, cache, filled = self._fill(variables, window_BT, place)
            piece_BN = np.asarray(new_BN)[:, :count]
            text_BT = np.concatenate([text_BT, piece_BN], axis=1)
            if stream is not None:
                stream(piece_BN)
        return text_BT

    def _apply(self, variables: Any, tokens_BT: Int[Array, "B T"], **options: Any) -> Any:
        with contextlib.nullcontext() if self.mesh is None else sharding.on(self.mesh):
            return self.model.apply(variables, tokens_BT, **options)

    def _split_streams(self, streams: int) -> tuple[Any, Mesh]:
        """The variables on as many devices as divide the streams, and the mesh of those; or on the mesh given."""
        if self.mesh is not None:
            parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
            if streams % parts:
                raise UserError(f"{streams} streams do not divide over mesh.data * mesh.fsdp = {parts}; change one")
            return self._variables[1], self.mesh
        devices = jax.local_devices()
        count = max(number for number in range(1, len(devices) + 1) if streams % number == 0)
        mesh = make_mesh(MeshConfig(data=count, fsdp=1, tensor=1), streams, devices[:count])
        if count not in self._variables:
            self._variables[count] = jax.device_put(self._variables[1], replicated(mesh))
        return self._variables[count], mesh

    def _fill(
        self, variables: Any, tokens_BT: npt.NDArray[np.int32], place: NamedSharding
    ) -> tuple[Float[Array, "B V"], KVCache, int]:
        """A new cache with these tokens: (logits of the next one, the cache, tokens in it).

        The tokens are padded to a power of two, so that prompts of any length need few compilations.
        """
        length = tokens_BT.shape[1]
        padded = min(self.block_size, max(8, 1 << (length - 1).bit_length()))
        padded_BT = jax.device_put(np.pad(tokens_BT, ((0, 0), (0, padded - length))), place)
        logits_BV, cache = self._prefill(variables, padded_BT, jnp.int32(length))
        return logits_BV, cache, length

    def _prefill_impl(
        self, variables: Any, tokens_BT: Int[Array, "B T"], length: Int[Array, ""]
    ) -> tuple[Float[Array, "B V"], KVCache]:
        logits_BTV, cache = self._apply(variables, tokens_BT, keep_cache=True)
        # Padding has written keys beyond `length`; the next tokens overwrite them before they can be seen.
        logits_B1V = lax.dynamic_slice_in_dim(logits_BTV, length - 1, 1, axis=1)
        return logits_B1V[:, 0], dataclasses.replace(cache, length=length)

    def _decode_impl(
        self,
        variables: Any,
        cache: KVCache,
        logits_BV: Float[Array, "B V"],
        noise_NBV: Float[Array, "N B V"],
        used: Int[Array, ""],
        count: Int[Array, ""],
        temperature: Float[Array, ""],
        top_k: int | None,
    ) -> tuple[Int[Array, "B N"], Float[Array, "B V"], KVCache]:
        """Draws `count` tokens, each from the logits of the one before it, with the noise from `used` on."""
        out_BN = jnp.zeros((logits_BV.shape[0], TOKENS_PER_DISPATCH), jnp.int32)

        def body(step: Int[Array, ""], carry: tuple[Array, Array, KVCache]) -> tuple[Array, Array, KVCache]:
            out_BN, logits_BV, cache = carry
            token_B = draw(logits_BV, noise_NBV[used + step], temperature, top_k)
            out_BN = lax.dynamic_update_slice_in_dim(out_BN, token_B[:, None], step, axis=1)
            logits_B1V, cache = self._apply(variables, token_B[:, None], cache=cache)
            return out_BN, logits_B1V[:, 0], cache

        return lax.fori_loop(0, count, body, (out_BN, logits_BV, cache))

    def _slide_impl(
        self,
        variables: Any,
        window_BT: Int[Array, "B T"],
        noise_NBV: Float[Array, "N B V"],
        used: Int[Array, ""],
        count: Int[Array, ""],
        temperature: Float[Array, ""],
        top_k: int | None,
    ) -> Int[Array, "B N"]:
        """Draws `count` tokens, each by a full forward pass over the last block_size tokens."""
        out_BN = jnp.zeros((window_BT.shape[0], TOKENS_PER_DISPATCH), jnp.int32)

        def body(step: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
            out_BN, window_BT = carry
            logits_B1V = self._apply(variables, window_BT, last_only=True)
            token_B = draw(logits_B1V[:, 0], noise_NBV[used + step], temperature, top_k)
            out_BN = lax.dynamic_update_slice_in_dim(out_BN, token_B[:, None], step, axis=1)
            return out_BN, jnp.concatenate([window_BT[:, 1:], token_B[:, None]], axis=1)

        return lax.fori_loop(0, count, body, (out_BN, window_BT))[0]


def gumbel_noise(key: Array, index: Int[Array, ""], streams: int, vocab_size: int) -> Float[Array, "N B V"]:
    """Gumbel noise for the tokens at index, index + 1, ...: that of index i depends on `fold_in(key, i)` alone."""
    keys_N = jax.vmap(lambda step: jax.random.fold_in(key, index + step))(jnp.arange(TOKENS_PER_DISPATCH))
    return jax.vmap(lambda key: jax.random.gumbel(key, (streams, vocab_size)))(keys_N)


def draw(
    logits_BV: Float[Array, "B V"], noise_BV: Float[Array, "B V"], temperature: Float[Array, ""], top_k: int | None
) -> Int[Array, " B"]:
    """One token for each stream, from softmax(logits / temperature); the likeliest where the temperature is 0."""
    if top_k is not None:
        lowest_B1 = lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)
    # The largest of logits + temperature * Gumbel noise is distributed like that; at 0 no noise is left.
    return jnp.argmax(logits_BV + temperature * noise_BV, axis=-1).astype(jnp.int32)
