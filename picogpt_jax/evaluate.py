"""The loss of a model on a text: consecutive windows, every target once."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from picogpt_jax.data import evaluation_windows, padded_windows
from picogpt_jax.devices import compiler_options
from picogpt_jax.sharding import batch_sharding, on, replicated

# weights (any tree), tokens [B, T] -> float32 logits [B, T, V]
Forward = Callable[[Any, Int[Array, "B T"]], Any]


def bits_per_char(nats: float) -> float:
    """Nats per character -> bits per character."""
    return nats / math.log(2.0)


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
        place = batch_sharding(self.mesh)
        for starts in batches:
            tokens_BT, targets_BT = padded_windows(ids, starts, self.block_size)
            sums = self._summed(weights, jax.device_put(tokens_BT, place), jax.device_put(targets_BT, place))
            total += float(np.asarray(sums, np.float64).sum())
            count += int((targets_BT >= 0).sum())
        return total / count
