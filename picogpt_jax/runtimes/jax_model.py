"""A model in JAX, whole: text by `Generator`, logits and losses of whole windows.

Shapes: B windows, T time, V vocabulary, N tokens of a text.
"""

import functools
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from picogpt_jax.devices.setup import compiler_options
from picogpt_jax.devices.sharding import on
from picogpt_jax.runtimes.engine import BATCH_SIZE, checked_data
from picogpt_jax.runtimes.jax_generator import Generator
from picogpt_jax.training.evaluate import Evaluator


class JaxGPT(Generator):
    """A `picogpt_jax.runtimes.engine.Engine`: windows are computed on one device, or on the mesh of the model."""

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
        def forward(variables: Any, tokens_BT: Any) -> Any:
            with on(self._mesh_of(1)):
                return self.model.apply(variables, tokens_BT)

        return jax.jit(forward, compiler_options=compiler_options())
