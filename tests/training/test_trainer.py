import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from tiny import BATCHES, TRAIN_BIN, VOCABULARY, same, tiny_config

from picogpt_jax.config import Config
from picogpt_jax.devices import setup
from picogpt_jax.devices.sharding import batch_sharding, replicated
from picogpt_jax.text.batches import Tokens
from picogpt_jax.training import trainer as trainer_module
from picogpt_jax.training.trainer import Batches, Trainer, TrainState, backward_dtype, cache_parts, compute_dtype

pytestmark = pytest.mark.usefixtures("compile_quickly_and_once")


@dataclasses.dataclass(frozen=True)
class Steps:
    """Four optimizer steps."""

    trainer: Trainer
    state: TrainState
    losses: np.ndarray
    grad_norms: np.ndarray

    @classmethod
    def take(cls, config: Config, n_devices: int = 1) -> Self:
        trainer = Trainer(config, jax.devices()[:n_devices])
        assert trainer.mesh.size == n_devices
        state, metrics = trainer.steps(trainer.init(), None, placed(trainer), "train")
        return cls(trainer, state, np.asarray(metrics.loss), np.asarray(metrics.grad_norm))


def placed(trainer: Trainer, steps: int = 4) -> jax.Array:
    return jax.device_put(BATCHES[:steps], batch_sharding(trainer.mesh, 1))


def initial(trainer: Trainer, **changes: int | float) -> TrainState:
    """The first state with some of its scalars changed."""
    state = trainer.init()
    scalars = {name: np.asarray(value, getattr(state, name).dtype) for name, value in changes.items()}
    return dataclasses.replace(state, **jax.device_put(scalars, replicated(trainer.mesh)))


@pytest.mark.parametrize(
    ("n_devices", "changes"),
    [
        (2, dict(mesh__data=2)),
        (4, dict(mesh__data=-1)),
        (4, dict(mesh__fsdp=2, mesh__tensor=2)),
        (1, dict(train__gradient_accumulation_steps=4)),
        (4, dict(mesh__data=4, train__gradient_accumulation_steps=2)),
    ],
)
def test_neither_devices_nor_accumulation_change_the_losses(
    n_devices: int, changes: dict[str, int], on_one_device: Steps
) -> None:
    """With dropout: the masks are those of the whole batch on one device."""
    config = tiny_config(**changes)
    assert config.model.dropout == 0.1
    steps = Steps.take(config, n_devices)
    np.testing.assert_allclose(steps.losses, on_one_device.losses, rtol=2e-4)
    np.testing.assert_allclose(steps.grad_norms, on_one_device.grad_norms, rtol=2e-3)


@pytest.fixture(scope="module")
def on_one_device() -> Steps:
    return Steps.take(tiny_config())


def test_every_step_has_masks_of_its_own(on_one_device: Steps) -> None:
    """What the test above compares is not without dropout by mistake."""
    trainer = on_one_device.trainer
    _, metrics = trainer.steps(initial(trainer, step=1), None, placed(trainer), "train")
    assert abs(float(metrics.loss[0]) - on_one_device.losses[0]) > 1e-4


@pytest.mark.parametrize("n_devices", [1, 4])
def test_int8_gradients_train(n_devices: int, on_one_device: Steps) -> None:
    """backward_bits=8, with losses close to those of float gradients, and other ones."""
    steps = Steps.take(tiny_config(quant__backward_bits=8, mesh__data=n_devices), n_devices)
    np.testing.assert_allclose(steps.losses, on_one_device.losses, rtol=0.02)
    assert np.any(steps.losses != on_one_device.losses)
    loss = steps.trainer.evaluator("train").loss(steps.state.params, TRAIN_BIN)
    assert np.isfinite(loss), "evaluation rounds no gradients"


REDUCTION = re.compile(r"= (\S.*) (?:all-reduce|reduce-scatter)(?:-start)?\(")


@pytest.mark.parametrize(("parts", "backward_bits"), [(2, None), (1, 8)])
def test_gradients_are_reduced_once_a_step(parts: int, backward_bits: int | None) -> None:
    """After the loop over the parts of the batch, as float32; and so is the loss. Nothing else is reduced."""
    changes: dict[str, Any] = dict(mesh__data=4, train__gradient_accumulation_steps=parts)
    trainer = Trainer(tiny_config(quant__backward_bits=backward_bits, **changes), jax.devices()[:4])
    assert trainer.parts == parts
    program = step_text(trainer, 1)
    after_the_loop = program[program.index("\nENTRY ") :]
    assert len(REDUCTION.findall(program)) == len(REDUCTION.findall(after_the_loop))
    reduced = re.findall(r"(\w+)\[([\d,]*)\]", " ".join(REDUCTION.findall(program)))
    assert {dtype for dtype, _ in reduced} == {"f32"}
    sizes = [leaf.size for leaf in jax.tree.leaves(trainer.abstract_state.params)]
    assert sorted(math.prod(map(int, filter(None, dims.split(",")))) for _, dims in reduced) == sorted([1, *sizes])


def test_bfloat16_trains_like_float32(on_one_device: Steps) -> None:
    steps = Steps.take(tiny_config(train__dtype="bfloat16"))
    np.testing.assert_allclose(steps.losses, on_one_device.losses, rtol=0.01)
    assert np.any(steps.losses != on_one_device.losses)
    assert {leaf.dtype for leaf in jax.tree.leaves(steps.state.params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("n_devices", "changes"),
    [
        (1, {}),
        (4, dict(mesh__fsdp=2, mesh__tensor=2)),
        (1, dict(train__scan_layers=True, train__remat="dots")),
    ],
)
def test_only_the_backward_pass_is_rounded(n_devices: int, changes: dict[str, Any], on_one_device: Steps) -> None:
    steps = Steps.take(tiny_config(train__backward_dtype="bfloat16", **changes), n_devices)
    np.testing.assert_allclose(steps.losses[0], on_one_device.losses[0], rtol=1e-6)
    np.testing.assert_allclose(steps.losses, on_one_device.losses, rtol=2e-3)
    np.testing.assert_allclose(steps.grad_norms, on_one_device.grad_norms, rtol=0.02)
    assert np.any(np.abs(steps.grad_norms / on_one_device.grad_norms - 1) > 1e-5)


@pytest.mark.parametrize(
    ("changes", "bfloat16", "int8", "float32"),
    [
        (dict(train__backward_dtype="bfloat16"), 14, 5, 2),  # 7 products, attention's two in float
        (dict(train__backward_dtype="bfloat16", quant__mode="none"), 14, 0, 7),
        ({}, 0, 5, 16),
    ],
)
def test_every_product_of_the_backward_pass_is_rounded(
    changes: dict[str, Any], bfloat16: int, int8: int, float32: int
) -> None:
    trainer = Trainer(tiny_config(**changes))
    mode = trainer.mode_at(0)
    gradients = jax.make_jaxpr(lambda state, tokens: trainer._gradients(state, tokens, mode))
    types = collections.Counter(operand_types(gradients(trainer.abstract_state, BATCHES[0].astype(np.int32)).jaxpr))
    assert types == collections.Counter(dict(bfloat16=bfloat16, int8=int8, float32=float32))


def operand_types(jaxpr: Any) -> Iterator[str]:
    """Of each matrix product in a program, and in those that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "int8_dot"):
            yield equation.invars[0].aval.dtype.name
        for inner in jaxprs_in_params(equation.params):
            yield from operand_types(inner)


def test_rows_that_pad_the_table_change_no_loss() -> None:
    """Whatever they hold, also where the table is split between devices; nothing trains them."""
    changes: dict[str, Any] = dict(quant__weight_granularity="per_tensor", optimizer__weight_decay=0.0)
    plain, size = Trainer(tiny_config(**changes), jax.devices()[:1]), VOCABULARY.size
    config = tiny_config(model__vocab_size=16, mesh__tensor=2, **changes)
    padded = Trainer(config, jax.devices()[:2], size)
    first = jax.device_get(plain.init().params)
    table = np.concatenate([first["wte"]["embedding"], np.full((4, 16), 3.0, np.float32)])
    params = {"plain": first, "padded": {**first, "wte": {"embedding": table}}}
    mode = plain.mode_at(0)

    def loss(trainer: Trainer, state: TrainState) -> float:
        return trainer.evaluator(mode).loss(state.params, TRAIN_BIN)

    first_loss = loss(plain, plain.init(params["plain"]))
    assert loss(padded, padded.init(params["padded"])) == pytest.approx(first_loss, rel=1e-6)
    untold = Trainer(config, jax.devices()[:2])
    assert loss(untold, untold.init(params["padded"])) > first_loss + 0.1, "the control"
    states, losses = {}, {}
    for name, trainer in (("plain", plain), ("padded", padded)):
        states[name], metrics = trainer.steps(trainer.init(params[name]), None, placed(trainer), mode)
        losses[name] = np.asarray(metrics.loss)
    np.testing.assert_allclose(losses["padded"], losses["plain"], rtol=1e-5)
    trained = {name: np.asarray(state.params["wte"]["embedding"]) for name, state in states.items()}
    np.testing.assert_allclose(trained["padded"][:size], trained["plain"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(trained["padded"][size:], table[size:])


def test_float16_scales_the_loss_and_skips_an_overflow(on_one_device: Steps) -> None:
    trainer = Trainer(tiny_config(train__dtype="float16"))
    before = trainer.init()
    assert float(before.loss_scale) == 2.0**15

    def step(**changes: int | float) -> tuple[TrainState, float]:
        state, metrics = trainer.steps(initial(trainer, **changes), None, placed(trainer, steps=1), "train")
        return state, float(metrics.loss[0])

    state, loss = step()
    assert loss == pytest.approx(on_one_device.losses[0], rel=0.01)
    assert (int(state.step), int(state.good_steps), float(state.loss_scale)) == (1, 1, 2.0**15)
    assert not same(state.params, before.params)

    state, _ = step(loss_scale=2.0**100, good_steps=7)
    assert (int(state.step), int(state.good_steps), float(state.loss_scale)) == (1, 0, 2.0**99)
    assert same(state.params, before.params)
    assert same(state.opt_state, before.opt_state)

    state, _ = step(good_steps=1999)
    assert (int(state.good_steps), float(state.loss_scale)) == (0, 2.0**16)


def test_the_compute_type_is_chosen_by_name() -> None:
    assert compute_dtype("bfloat16", "cpu") == jnp.bfloat16
    assert compute_dtype("auto", "cpu") == jnp.float32
    assert compute_dtype("auto", "tpu") == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "dtype", "platform", "has_bfloat16", "expected"),
    [
        ("auto", "float32", "cpu", True, "bfloat16"),
        ("auto", "float32", "cpu", False, None),
        ("auto", "float32", "gpu", True, None),
        ("auto", "bfloat16", "cpu", True, None),
        ("bfloat16", "float32", "cpu", False, "bfloat16"),
        ("bfloat16", "bfloat16", "tpu", True, None),
        ("bfloat16", "float16", "cpu", True, None),
        ("same", "float32", "cpu", True, None),
    ],
)
def test_the_type_of_the_backward_pass_is_chosen_by_name_and_processor(
    name: str, dtype: str, platform: str, has_bfloat16: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "has_bfloat16", lambda: has_bfloat16)
    found = backward_dtype(name, jnp.dtype(dtype), platform)
    assert found == (expected and jnp.dtype(expected))


@pytest.mark.parametrize(
    ("sequences", "block_size", "width", "parts"),
    [(16, 128, 192, 4), (16, 128, 768, 4), (16, 128, 1024, 1), (16, 2048, 192, 16), (16, 8, 16, 1), (6, 200, 192, 3)],
)
def test_a_cpu_device_computes_as_many_sequences_as_its_cache_holds(
    sequences: int, block_size: int, width: int, parts: int
) -> None:
    assert cache_parts(sequences, block_size, width) == parts


def test_a_batch_in_parts_for_the_cache_is_the_batch(on_one_device: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """With accumulation too, on two devices: what each one holds is split again."""
    monkeypatch.setattr(trainer_module, "PART_TOKENS", 8)  # one sequence
    steps = Steps.take(tiny_config(mesh__data=2, train__gradient_accumulation_steps=2), n_devices=2)
    assert steps.trainer.parts == 4
    np.testing.assert_allclose(steps.losses, on_one_device.losses, rtol=2e-4)
    np.testing.assert_allclose(steps.grad_norms, on_one_device.grad_norms, rtol=2e-3)


def test_long_sums_keep_their_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of a step are split in two where a parameter is long, so that its norm's terms are not lost."""
    assert "reduce-window" not in step_text(Trainer(tiny_config()))
    monkeypatch.setattr(setup, "SHORT_SUM", 100)
    assert "reduce-window" in step_text(Trainer(tiny_config()))


def step_text(trainer: Trainer, steps: int = 4) -> str:
    """The compiled program; a single step is no loop."""
    return trainer.steps.lower(trainer.abstract_state, None, placed(trainer, steps), "train").compile().as_text()


@pytest.mark.parametrize("arithmetic", ["mixed", "integer"])
def test_forms_of_attention_are_measured_as_they_are_computed(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In integer arithmetic a little more or less in the queries is rounded away."""
    measured = []

    def seconds(attend: Any, shape: tuple[int, ...], dtype: jnp.dtype) -> float:
        q, k, v = jax.random.normal(jax.random.key(0), (3, *shape), dtype)
        measured.append(jax.jit(attend)(q, k, v) == jax.jit(attend)(q * (1 + 2.0**-20), k, v))
        return 0.0

    def choose(*others: Any) -> str:
        others[-1]("plain")
        return "plain"

    monkeypatch.setattr(trainer_module.fused_attention, "seconds", seconds)
    monkeypatch.setattr(trainer_module.fused_attention, "choose", choose)
    Trainer(tiny_config(quant__arithmetic=arithmetic), jax.devices()[:1])
    assert (np.mean(measured[0]) > 0.9) == (arithmetic == "integer")


def test_quantization_starts_at_its_step() -> None:
    trainer = Trainer(tiny_config(quant__start_step=3))
    assert [trainer.mode_at(step) for step in (0, 2, 3, 4)] == ["float", "float", "train", "train"]
    trainer = Trainer(tiny_config(quant__mode="none"))
    assert [trainer.mode_at(step) for step in (0, 5)] == ["float", "float"]


def test_batches_are_the_same_on_the_device_and_from_disk(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(data_dir)
    tokens = Tokens.open(data_dir, "train", 8, VOCABULARY.size)
    mesh = Trainer(config).mesh
    resident = Batches(config, tokens, mesh)
    monkeypatch.setattr(trainer_module, "RESIDENT_BYTES", 0)
    mapped = Batches(config, tokens, mesh)
    assert resident.corpus is not None
    assert mapped.corpus is None
    starts = np.asarray(resident(3, 5))
    assert starts.shape == (2, 8)
    windows = np.asarray(resident.corpus)[starts[..., None] + np.arange(9)]
    np.testing.assert_array_equal(mapped(3, 5), windows)
