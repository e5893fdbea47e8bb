from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny import BATCHES, VOCABULARY, tiny_config

from picogpt_jax.devices import sharding
from picogpt_jax.training import loss as loss_module
from picogpt_jax.training import trainer as trainer_module
from picogpt_jax.training.loss import log_sum_exp_at_once, mean_loss, time_parts
from picogpt_jax.training.trainer import Trainer, TrainState

pytestmark = pytest.mark.usefixtures("compile_quickly_and_once")

B, T, C, V = 2, 6, 4, 10
WEIGHTS_VC = jax.random.normal(jax.random.key(0), (V, C))
X_BTC = jax.random.normal(jax.random.key(1), (B, T, C))
TARGETS_BT = jax.random.randint(jax.random.key(2), (B, T), 0, V)


def head(weights_VC: jax.Array, x_BTC: jax.Array) -> jax.Array:
    return jnp.einsum("btc,vc->btv", x_BTC, weights_VC)


def plain(weights_VC: jax.Array, x_BTC: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(head(weights_VC, x_BTC), TARGETS_BT).mean()


def in_parts(parts: int, dtype: Any = jnp.float32, scale: float = 1.0) -> Any:
    dtype, scale = jnp.dtype(dtype), jnp.float32(scale)
    return lambda weights_VC, x_BTC: mean_loss(head, weights_VC, weights_VC, x_BTC, TARGETS_BT, scale, parts, dtype)


@pytest.mark.parametrize("parts", [1, 3, 6])
def test_loss_and_gradients_are_those_of_the_plain_loss(parts: int) -> None:
    """Also where the loss is not the last of what is differentiated."""
    doubled = lambda *operands: 2.0 * in_parts(parts)(*operands)  # noqa: E731
    expected, expected_gradients = jax.value_and_grad(plain, (0, 1))(WEIGHTS_VC, X_BTC)
    actual, gradients = jax.jit(jax.value_and_grad(doubled, (0, 1)))(WEIGHTS_VC, X_BTC)
    np.testing.assert_allclose(actual, 2.0 * expected, rtol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, 2.0 * expected_gradient, atol=1e-6)


def test_the_gradient_is_scaled_before_it_is_rounded() -> None:
    """A probability of 2^-26 is nothing in float16, and is kept by the loss scale."""
    logits_BTV = jnp.zeros((1, 1, 2)).at[..., 0].set(26 * np.log(2))
    for scale, expected in ((1.0, 0.0), (2.0**15, 2.0**-11)):
        operands = jnp.zeros((1, 1), jnp.int32), jnp.float32(scale), 1, jnp.dtype("float16")
        gradient = jax.grad(lambda x: mean_loss(lambda _, x: x, (), (), x, *operands))(logits_BTV)  # noqa: B023
        np.testing.assert_allclose(gradient[0, 0, 1], expected, rtol=1e-3)


def test_the_normalizer_at_once_is_the_one_in_two_passes() -> None:
    """Over a split vocabulary too, with logits whose exponentials are infinite."""
    logits_BTV = jnp.linspace(-200.0, 200.0, 2 * 3 * 8).reshape(2, 3, 8)
    split = jax.device_put(logits_BTV, NamedSharding(Mesh(jax.devices()[:2], "x"), PartitionSpec(None, None, "x")))
    expected = jax.nn.logsumexp(logits_BTV, -1)
    np.testing.assert_allclose(jax.jit(log_sum_exp_at_once)(split), expected, rtol=1e-6)


def test_a_part_has_as_many_logits_as_fit() -> None:
    assert time_parts(sequences=16, time=1024, vocabulary=50304) == 4
    assert time_parts(sequences=1, time=1024, vocabulary=50304) == 1
    assert time_parts(sequences=1 << 20, time=8, vocabulary=50304) == 8


def test_only_a_part_of_the_logits_is_float32() -> None:
    program = jax.make_jaxpr(jax.grad(in_parts(3, "bfloat16")))(WEIGHTS_VC, X_BTC)
    (loop,) = [equation for equation in program.eqns if equation.primitive.name == "scan"]
    made = [result.aval for equation in loop.params["jaxpr"].eqns for result in equation.outvars]
    wide = [(array.size, array.dtype.name) for array in made if array.shape[-1:] == (V,)]
    assert {dtype for size, dtype in wide if size == B * T * V} == {"bfloat16"}
    assert max(size for size, dtype in wide if dtype == "float32") == B * T * V // 3


def gradients(monkeypatch: pytest.MonkeyPatch, is_small: bool, n_devices: int, **changes: Any) -> Any:
    """Loss and gradients of a batch, with the vocabulary taken to be small or large."""
    monkeypatch.setattr(trainer_module, "SMALL_VOCABULARY", VOCABULARY.size if is_small else 0)
    monkeypatch.setattr(loss_module, "PART_LOGITS", 4 * VOCABULARY.size)  # in two to eight parts
    trainer = Trainer(tiny_config(**changes), jax.devices()[:n_devices])

    def compute(state: TrainState, tokens_BT1: jax.Array) -> Any:
        with sharding.on(trainer.mesh):
            return trainer._gradients(state, tokens_BT1, trainer.mode_at(0))

    operands = trainer.init(), jax.device_put(BATCHES[0].astype(np.int32), sharding.batch_sharding(trainer.mesh))
    return jax.device_get(jax.jit(compute, compiler_options=trainer.compiler_options)(*operands))


@pytest.mark.parametrize(
    ("n_devices", "tolerance", "changes"),
    [
        (
            4,
            1e-5,
            dict(quant__arithmetic="integer", mesh__fsdp=2, mesh__tensor=2, train__gradient_accumulation_steps=2),
        ),
        (
            2,
            2e-2,
            dict(quant__mode="none", train__dtype="bfloat16", mesh__data=2, train__gradient_accumulation_steps=2),
        ),
        (2, 2e-2, dict(quant__mode="none", train__dtype="bfloat16", mesh__data=2)),
        (1, 5e-2, dict(quant__backward_bits=8, train__dtype="float16")),
    ],
)
def test_a_large_vocabulary_trains_like_a_small_one(
    n_devices: int, tolerance: float, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, plain = gradients(monkeypatch, True, n_devices, **changes)
    actual, ours = gradients(monkeypatch, False, n_devices, **changes)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert np.linalg.norm(one - other) < tolerance * np.linalg.norm(other)
