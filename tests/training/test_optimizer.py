import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_config

from picogpt_jax.config import OptimizerConfig
from picogpt_jax.model.gpt import GPT
from picogpt_jax.model.numerics import Numerics
from picogpt_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer

BASE = dict(
    learning_rate=0.1, min_lr=0.01, warmup_iters=1, lr_decay_iters=5,
    weight_decay=0.3, beta1=0.8, beta2=0.95, grad_clip=1.0,
)  # fmt: skip
DECAYED = "kernel"


def adamw(params: dict, gradients: list[dict], config: OptimizerConfig, learning_rates: list[float]) -> dict:
    """AdamW from its paper (arXiv 1711.05101, algorithm 2), with clipping, in float64 NumPy."""
    values = {name: value.astype(np.float64) for name, value in params.items()}
    first = {name: np.zeros_like(value) for name, value in values.items()}
    second = {name: np.zeros_like(value) for name, value in values.items()}
    for step, (raw, rate) in enumerate(zip(gradients, learning_rates, strict=True), start=1):
        norm = math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in raw.values()))
        shrink = min(1.0, config.grad_clip / norm) if config.grad_clip else 1.0
        for name, value in values.items():
            gradient = raw[name].astype(np.float64) * shrink
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * gradient
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * gradient**2
            corrected = first[name] / (1 - config.beta1**step)
            scale = np.sqrt(second[name] / (1 - config.beta2**step)) + 1e-8
            decay = config.weight_decay * value if name == DECAYED else 0.0
            values[name] = value - rate * (corrected / scale + decay)
    return values


@pytest.mark.parametrize("grad_clip", [1.0, 0.0], ids=["clipped", "not clipped"])
def test_three_steps_follow_the_closed_form(grad_clip: float) -> None:
    config = OptimizerConfig(**{**BASE, "grad_clip": grad_clip})
    generator = np.random.default_rng(0)
    shapes = {DECAYED: (3, 4), "bias": (4,), "scale": (3,)}
    params = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    gradients = [  # norms of about 4, 0.4 and 40: clipping changes the first and the last alone
        {name: (size * generator.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
        for size in (1.0, 0.1, 10.0)
    ]
    optimizer = make_optimizer(config)
    actual: Any = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(actual)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, actual)
        actual = optax.apply_updates(actual, updates)
    cosine = 0.5 * (1 + math.cos(math.pi / 4))
    expected = adamw(params, gradients, config, [0.05, 0.1, 0.01 + 0.09 * cosine])
    for name in shapes:
        np.testing.assert_allclose(actual[name], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_the_decayed_parameters_are_the_matrices_by_name() -> None:
    config = tiny_config(model__bias=True)
    model = GPT(config.model, Numerics(config.quant, "float"))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(params))
    names = {
        decayed: ["/".join(key.key for key in path if hasattr(key, "key")) for path, value in mask if value is decayed]
        for decayed in (True, False)
    }
    assert sorted(names[True]) == [
        "h_0/attn/c_attn/kernel",
        "h_0/attn/c_proj/kernel",
        "h_0/mlp/c_fc/kernel",
        "h_0/mlp/c_proj/kernel",
        "wpe/embedding",
        "wte/embedding",
    ]
    linear = ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
    norms = [f"{norm}/{which}" for norm in ("h_0/ln_1", "h_0/ln_2", "ln_f") for which in ("bias", "scale")]
    assert sorted(names[False]) == sorted([f"h_0/{name}/bias" for name in linear] + norms)


def test_the_learning_rate_rises_then_falls_along_a_cosine() -> None:
    config = OptimizerConfig(**{**BASE, "learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 4, "lr_decay_iters": 12})
    schedule = learning_rate_schedule(config)
    table = {
        0: 0.2,
        1: 0.4,
        2: 0.6,
        3: 0.8,
        4: 1.0,
        6: 0.1 + 0.45 * (1 + 0.5**0.5),
        8: 0.55,
        12: 0.1,
        13: 0.1,
        10**6: 0.1,
    }
    assert {step: float(schedule(step)) for step in table} == pytest.approx(table, rel=1e-6)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    schedule = learning_rate_schedule(OptimizerConfig(**{**BASE, "warmup_iters": 0}))
    assert float(schedule(0)) == pytest.approx(0.1)
    assert float(schedule(5)) == pytest.approx(0.01)


def test_a_learning_rate_of_zero_changes_nothing() -> None:
    optimizer = make_optimizer(OptimizerConfig(**{**BASE, "learning_rate": 0.0, "min_lr": 0.0}))
    params = {DECAYED: jnp.ones((2, 2))}
    updates, _ = optimizer.update({DECAYED: jnp.ones((2, 2))}, optimizer.init(params), params)
    assert not np.any(updates[DECAYED])
