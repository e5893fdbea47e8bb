"""The loss of a model on a text: consecutive windows, every target once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from picogpt_jax.devices.setup import compiler_options
from picogpt_jax.devices.sharding import batch_sharding, on, replicated
from picogpt_jax.text.batches import evaluation_windows, padded_windows, target_count

# weights (any tree), tokens [B, T] -> float32 logits [B, T, V]
Forward = Callable[[Any, Int[Array, "B T"]], Any]


class Evaluator:
    """Computes mean losses; compiled once, used as often as you like.

    Args:
        forward: the model.
        mesh: the batch is split over its batch axes.
        block_size: tokens of a window.
        batch_size: windows computed at once.
    """

    def __init__(self, forward: Forward, mesh: Mesh, block_size: int, batch_size: int) -> None:
        self.mesh, self.block_size, self.batch_size = mesh, block_size, batch_size

        def summed(weights: Any, tokens_BT: Int[Array, "B T"], targets_BT: Int[Array, "B T"]) -> Float[Array, " B"]:
            with on(mesh):
                logits_BTV = forward(weights, tokens_BT)
            losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, jnp.maximum(targets_BT, 0))
            return jnp.where(targets_BT >= 0, losses_BT, 0.0).sum(-1)

        self._summed = jax.jit(summed, out_shardings=replicated(mesh), compiler_options=compiler_options())

    def loss(self, weights: Any, ids: npt.NDArray[np.uint16], max_windows: int | None = None) -> float:
        """Mean negative log-likelihood in nats per token.

        Args:
            ids: uint16 [N]; all N - 1 targets count, or those of `max_windows` windows spread evenly.
        """
        batches = evaluation_windows(len(ids), self.block_size, self.batch_size, max_windows)
        total, count = 0.0, 0
        for starts in batches:
            sums = self._summed(weights, *(self._placed(ids, starts, part) for part in (0, 1)))
            total += float(np.asarray(sums, np.float64).sum())
            count += target_count(len(ids), starts, self.block_size)
        return total / count

    def _placed(self, ids: npt.NDArray[np.uint16], starts: npt.NDArray[np.int64], part: int) -> Int[Array, "B T"]:
        """The inputs (part 0) or targets (1) of the windows; every process reads those of its own devices alone."""
        rows = lambda index: padded_windows(ids, starts[index[0]], self.block_size)[part]  # noqa: E731
        shape = (len(starts), self.block_size)
        return jax.make_array_from_callback(shape, batch_sharding(self.mesh), rows)
