"""A model in JAX, whole: text by `Generator`, logits and losses of whole windows.

Shapes: B windows, T time, V vocabulary, N tokens of a text.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from picogpt_jax.devices.setup import compiler_options
from picogpt_jax.devices.sharding import on
from picogpt_jax.model.gpt import KVCache
from picogpt_jax.runtimes.engine import BATCH_SIZE, checked_data
from picogpt_jax.runtimes.jax_generator import Generator
from picogpt_jax.training.evaluate import Evaluator


class JaxCache:
    """What the model has seen, `length` positions; as of `picogpt_jax.runtimes.loop.Runtime`."""

    def __init__(self) -> None:
        self.kept: KVCache | None = None
        self.length = 0


class JaxGPT(Generator):
    """A `picogpt_jax.runtimes.engine.Engine`: windows are computed on one device, or on the mesh of the model.

    It is a `picogpt_jax.runtimes.loop.Runtime` as well, for what goes on token by token outside of JAX.
    """

    windows_at_once = 1

    @property
    def vocab_size(self) -> int:
        """Token ids that there are."""
        return self.model.config.vocab_size

    def new_cache(self, batch: int) -> JaxCache:
        """A cache of no positions."""
        return JaxCache()

    def forward(
        self, tokens_BT: npt.NDArray[np.integer], cache: JaxCache | None = None, last_only: bool = False
    ) -> npt.NDArray[np.float32]:
        """Logits of the next token at every position, float32 [B, T, V]; see `picogpt_jax.runtimes.loop.Runtime`."""
        if cache is None:
            logits_BTV = self.logits(tokens_BT)
        else:
            ids_BT, length = tokens_BT.astype(np.int32), tokens_BT.shape[1]
            if cache.kept is None:
                padded, kept = self._begin(self.variables, self.padded(ids_BT))
            else:
                padded, kept = self._forward(self.variables, ids_BT, cache.kept)
            cache.length += length
            # What padding has written lies beyond the length, and is overwritten before it is seen.
            cache.kept = dataclasses.replace(kept, length=jnp.int32(cache.length))
            logits_BTV = np.asarray(padded)[:, :length]
        return logits_BTV[:, -1:] if last_only else logits_BTV

    def logits(self, tokens_BT: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Logits of the next token at every position, float32 [B, T, V]."""
        length = tokens_BT.shape[1]
        padded_BT = self.padded(tokens_BT.astype(np.int32))  # no position sees what follows it
        return np.asarray(self._forward(self.variables, padded_BT))[:, :length]

    def loss(self, ids: npt.NDArray[np.integer]) -> float:
        """Mean loss in nats per token: one pass over ids [N] in windows of `block_size`, every target once."""
        data = checked_data(ids, self.block_size, self.block_size).astype(np.uint16, copy=False)
        return self._evaluator.loss(self.variables, data)

    @functools.cached_property
    def _evaluator(self) -> Evaluator:
        return Evaluator(self.model.apply, self._mesh_of(1), self.block_size, BATCH_SIZE)

    @functools.cached_property
    def _forward(self) -> Any:
        return self._compiled()

    @functools.cached_property
    def _begin(self) -> Any:
        return self._compiled(keep_cache=True)

    def _compiled(self, **options: Any) -> Any:
        def forward(variables: Any, tokens_BT: Any, cache: KVCache | None = None) -> Any:
            with on(self._mesh_of(1)):
                return self.model.apply(variables, tokens_BT, cache=cache, **options)

        return jax.jit(forward, compiler_options=compiler_options())
