import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from picogpt_jax.config import MeshConfig
from picogpt_jax.devices.sharding import make_mesh
from picogpt_jax.training.evaluate import Evaluator

VOCAB = 5
IDS = np.random.default_rng(0).integers(0, VOCAB, 30).astype(np.uint16)  # 29 targets: three windows of 8, and one of 5
TABLE = np.random.default_rng(1).normal(size=(VOCAB, VOCAB)).astype(np.float32)


def forward(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """A bigram model: the logits depend on the last token alone, so the windows do not matter."""
    return table[tokens]


def evaluator(n_devices: int = 1, batch_size: int = 4) -> Evaluator:
    mesh = make_mesh(MeshConfig(data=n_devices, fsdp=1, tensor=1), batch_size, jax.devices()[:n_devices])
    return Evaluator(forward, mesh, block_size=8, batch_size=batch_size)


def negative_log_likelihoods() -> np.ndarray:
    """Of the 29 targets, in float64."""
    logits = TABLE.astype(np.float64)[IDS[:-1]]
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_probabilities[np.arange(29), IDS[1:]]


@pytest.mark.parametrize(("n_devices", "batch_size"), [(1, 1), (1, 3), (1, 4), (4, 8)])
def test_the_loss_is_the_mean_over_every_target(n_devices: int, batch_size: int) -> None:
    loss = evaluator(n_devices, batch_size).loss(jnp.asarray(TABLE), IDS)
    assert loss == pytest.approx(negative_log_likelihoods().mean(), rel=1e-6)


def test_a_limited_evaluation_takes_windows_spread_over_the_text() -> None:
    losses = negative_log_likelihoods()
    chosen = np.concatenate([losses[:8], losses[24:]])  # the first and the last of four windows
    assert evaluator().loss(jnp.asarray(TABLE), IDS, max_windows=2) == pytest.approx(chosen.mean(), rel=1e-6)
    assert evaluator().loss(jnp.asarray(TABLE), IDS, max_windows=4) == pytest.approx(losses.mean(), rel=1e-6)


def test_equal_logits_cost_the_entropy_of_a_uniform_choice() -> None:
    loss = evaluator().loss(jnp.zeros((VOCAB, VOCAB)), IDS)
    assert loss == pytest.approx(math.log(VOCAB), rel=1e-6)
