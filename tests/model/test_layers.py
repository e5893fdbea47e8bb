import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sources import write_run
from tiny import BATCHES, same, tiny_config

from picogpt_jax.formats.sources import load_float
from picogpt_jax.int8 import convert
from picogpt_jax.model.dropout import DropoutKey
from picogpt_jax.model.layers import stack, unstack
from picogpt_jax.training.checkpoint import Checkpoints
from picogpt_jax.training.resume import begin
from picogpt_jax.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("compile_quickly_and_once")

SCANNED = dict(train__scan_layers=True)


def trainer(**changes: Any) -> Trainer:
    changes = dict(model__n_layer=2, model__bias=True, optimizer__learning_rate=3e-3) | changes
    return Trainer(tiny_config(**changes), jax.devices()[:1])


def losses(trainer: Trainer) -> np.ndarray:
    return np.asarray(trainer.steps(trainer.init(), None, jnp.asarray(BATCHES), trainer.mode_at(0))[1].loss)


def test_a_scanned_model_starts_with_the_parameters_of_the_unrolled_one() -> None:
    one, other = trainer().init().params, trainer(**SCANNED).init().params
    assert other["h"]["attn"]["c_attn"]["kernel"].shape == (2, 16, 48)
    assert same(unstack(other), one)
    assert same(stack(one), other)
    assert unstack(one) is one
    assert stack(other) is other


@pytest.mark.parametrize(
    ("mode", "variants"),
    [
        ("int8", [dict(train__scan_layers=True), dict(train__scan_layers=True, train__remat="block")]),
        ("none", [dict(train__scan_layers=True, train__remat="dots")]),
    ],
)
def test_neither_scanning_nor_rematerialisation_changes_the_losses(mode: str, variants: list[dict[str, Any]]) -> None:
    """With dropout, whose masks are those of the layer at hand. The first loss is the same but for its last bits."""
    expected = losses(trainer(quant__mode=mode))
    for changes in variants:
        actual = losses(trainer(quant__mode=mode, **changes))
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
        np.testing.assert_allclose(actual, expected, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, dict(quant__arithmetic="integer"), dict(train__dtype="bfloat16")], ids=str)
def test_int8_products_that_are_computed_again_have_the_same_bits(changes: dict[str, Any]) -> None:
    kept = losses(trainer(**SCANNED, **changes))
    np.testing.assert_array_equal(losses(trainer(**SCANNED, **changes, train__remat="dots")), kept)


def test_the_layers_of_a_scan_have_masks_of_their_own() -> None:
    """What the test above compares is not one mask for all layers, by the same mistake twice."""
    key = DropoutKey(seed=jnp.uint32(0), row=jnp.uint32(0))
    numbers = [dataclasses.replace(key, layer=jnp.int32(layer), n_layer=3).number("h/mlp/residual") for layer in (0, 2)]
    assert list(map(int, numbers)) == [key.number("h_0/mlp/residual"), key.number("h_2/mlp/residual")]


def test_int8_gradients_accumulation_and_half_precision_scan() -> None:
    changes = dict(quant__backward_bits=8, train__dtype="bfloat16", train__gradient_accumulation_steps=2)
    np.testing.assert_allclose(losses(trainer(**changes, **SCANNED)), losses(trainer(**SCANNED)), rtol=0.02)


def test_the_int8_model_of_a_scanned_run_is_that_of_the_unrolled_one(tmp_path: Path) -> None:
    models = []
    for name, scan in (("unrolled", False), ("scanned", True)):
        write_run(tmp_path / name, {4: 1.5}, model__n_layer=2, train__scan_layers=scan)
        source = load_float(tmp_path / name)
        models.append(convert.int8_model(source.config, source.quant, source.params, source.vocabulary, {}))
    one, other = models
    assert one.matrices.keys() == other.matrices.keys()
    for name, tensor in one.matrices.items():
        np.testing.assert_array_equal(tensor.codes, other.matrices[name].codes)
        np.testing.assert_array_equal(tensor.scale, other.matrices[name].scale)
    for name, vector in one.vectors.items():
        np.testing.assert_array_equal(vector, other.vectors[name])


@pytest.mark.parametrize("scanned", [False, True])
def test_a_run_goes_on_scanned_or_not(tmp_path: Path, scanned: bool) -> None:
    """Parameters and both moments of the optimizer, from a checkpoint that was written the other way."""
    before = trainer(train__scan_layers=not scanned)
    state, _ = before.steps(before.init(), None, jnp.asarray(BATCHES), "train")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        meta = {"config": before.config.to_dict(), "best_val_loss": 1.0}
        checkpoints.save(4, state, meta, None)
        checkpoints.wait()
        after = trainer(train__scan_layers=scanned)
        resumed, step, _, _ = begin(after, checkpoints, tmp_path)
    assert step == 4
    assert jax.tree.structure(resumed) == jax.tree.structure(after.abstract_state)
    assert same(unstack(resumed.params), unstack(state.params))
    for name in ("mu", "nu"):
        assert same(*(unstack(getattr(each.opt_state[1][0], name)) for each in (resumed, state)))
