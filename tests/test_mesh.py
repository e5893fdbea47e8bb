"""Whole trainings on eight devices, in every shape of the mesh, against one device."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from tiny import VOCABULARY, quick_compilation, same, tiny_config

from picogpt_jax.sharding import AXES, batch_sharding
from picogpt_jax.trainer import Trainer

STEPS = 20
TIME = 9  # no other dimension is as long: what holds it in a compiled program is an activation
# Everything divides over eight devices, heads and vocabulary included.
MODEL = dict(n_layer=2, n_head=8, n_embd=32, block_size=TIME, vocab_size=16, bias=True)
BATCHES = VOCABULARY.encode("abcdefghij" * 30)[np.arange(8 * STEPS).reshape(STEPS, 8, 1) + np.arange(TIME + 1)]
SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 2, 1), (1, 2, 4)]


@pytest.fixture(autouse=True, scope="module")
def compile_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


def trainer(shape: tuple[int, int, int] = (1, 1, 1), **changes: Any) -> Trainer:
    changes = {f"model__{key}": value for key, value in MODEL.items()} | changes
    changes |= {f"mesh__{axis}": size for axis, size in zip(AXES, shape, strict=True)}
    changes = dict(train__scan_layers=True, optimizer__learning_rate=1e-3, optimizer__min_lr=1e-4) | changes
    return Trainer(tiny_config(**changes), jax.devices()[: math.prod(shape)])


@functools.cache
def losses(shape: tuple[int, int, int], mode: str, **changes: Any) -> np.ndarray:
    run = trainer(shape, quant__mode=mode, **changes)
    batches = jax.device_put(BATCHES, batch_sharding(run.mesh, 1))
    return np.asarray(run.steps(run.init(), None, batches, run.mode_at(0))[1].loss)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_mesh_follows_the_run_on_one_device(shape: tuple[int, int, int]) -> None:
    """With dropout. The float losses differ by the order of sums; in QAT that now and then moves a code."""
    same(trainer(shape).init().params, trainer().init().params)
    remat = "block" if shape == (2, 2, 2) else "none"
    for mode, tolerance in (("none", 2e-4), ("int8", 2e-3)):
        expected, actual = losses((1, 1, 1), mode), losses(shape, mode, train__remat=remat)
        assert expected[0] - expected[-1] > 0.1, "they have learnt something"
        np.testing.assert_allclose(actual[0], expected[0], rtol=2e-6)
        print(shape, mode, np.abs(actual / expected - 1).max())
        np.testing.assert_allclose(actual, expected, rtol=tolerance)
