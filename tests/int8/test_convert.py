import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny import VOCABULARY, tiny_config

from picogpt_jax.config import Config, Granularity
from picogpt_jax.devices.setup import compiler_options
from picogpt_jax.errors import UserError
from picogpt_jax.int8 import convert
from picogpt_jax.int8.folder import load_int8_model, save_int8_model
from picogpt_jax.int8.int8_model import Int8Model
from picogpt_jax.int8.integer_model import IntegerModel, integer_model
from picogpt_jax.model.gpt import GPT
from picogpt_jax.model.numerics import Numerics
from picogpt_jax.model.quantization import INT8_COLLECTION, QuantizedTensor, quantize

TRAINING = {"step": 8, "val_loss": 1.5}
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY.size, (4, 16)).astype(np.int32)


def small_config(**changes: Any) -> Config:
    """The default model, smaller."""
    small = dict(model__n_layer=2, model__n_head=4, model__n_embd=32, model__block_size=16)
    return tiny_config(**{**small, **changes})


DEFAULT = small_config()
OTHER = small_config(model__bias=True, quant__weight_granularity="per_tensor", quant__activation_bits=None)
both = pytest.mark.parametrize("config", [DEFAULT, OTHER], ids=["default", "other"])


@functools.cache
def params_of(config: Config) -> Any:
    """Parameters as after some training: rows and columns of many sizes, no zero bias, no LayerNorm weight of one."""
    init = GPT(config.model, Numerics(config.quant, "float")).init
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    generator = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.ndim == 1:
            return generator.normal(1.0, 0.1, leaf.shape).astype(np.float32)
        sizes = generator.uniform(0.05, 0.3, (leaf.shape[0], 1)) * generator.uniform(0.5, 2.0, leaf.shape[1])
        return (sizes * generator.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree.map(draw, shapes)


@functools.cache
def model_of(config: Config) -> Int8Model:
    return convert.int8_model(config.model, config.quant, params_of(config), VOCABULARY, TRAINING)


def weights_of(config: Config) -> dict[str, np.ndarray]:
    """nanoGPT's names -> the float matrices [out, in], straight from the parameter tree."""
    params = params_of(config)
    weights = {f"transformer.{name}": params[name]["embedding"] for name in ("wte", "wpe")}
    for layer in range(config.model.n_layer):
        block = params[f"h_{layer}"]
        for part, name in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            weights[f"transformer.h.{layer}.{part}.{name}"] = block[part][name]["kernel"].T
    return weights


# ------------------------------------------------------------------------------------- parameters to the int8 model


@both
def test_the_codes_are_those_of_the_definition(config: Config) -> None:
    model = model_of(config)
    weights = weights_of(config)
    axis = {"per_channel": 1, "per_tensor": None}[config.quant.weight_granularity]
    assert set(model.matrices) == set(weights)
    for name, weight in weights.items():
        tensor = model.matrices[name]
        absmax = np.abs(weight).max(axis=axis, keepdims=True)
        # XLA multiplies by 1 / 127 where this divides.
        np.testing.assert_allclose(tensor.scale, absmax / np.float32(127), rtol=2e-7, atol=0, err_msg=name)
        codes = np.rint(np.clip(weight * (np.float32(1) / tensor.scale), -127, 127))
        np.testing.assert_array_equal(tensor.codes, codes, err_msg=name)
        assert np.abs(tensor.codes).max() == 127, name


def test_the_head_and_the_embedding_share_their_codes() -> None:
    """Conversion takes the codes from the head's product; the look-up quantizes the same table by rows."""
    looked_up = quantize(jnp.asarray(params_of(DEFAULT)["wte"]["embedding"]))
    stored = model_of(DEFAULT).matrices["transformer.wte"]
    np.testing.assert_array_equal(stored.codes, looked_up.codes)
    np.testing.assert_array_equal(stored.scale, looked_up.scale)


@both
def test_the_model_says_how_it_was_made(config: Config) -> None:
    model = model_of(config)
    assert model.model == config.model
    assert model.quantization.weight_granularity == config.quant.weight_granularity
    assert model.quantization.activation_bits == config.quant.activation_bits
    assert model.training == TRAINING
    assert model.vocabulary == VOCABULARY


def test_the_vectors_are_the_float_ones() -> None:
    params, vectors = params_of(OTHER), model_of(OTHER).vectors
    np.testing.assert_array_equal(vectors["transformer.h.1.ln_2.weight"], params["h_1"]["ln_2"]["scale"])
    np.testing.assert_array_equal(vectors["transformer.ln_f.bias"], params["ln_f"]["bias"])
    bias = params["h_0"]["attn"]["c_attn"]["bias"]
    np.testing.assert_array_equal(vectors["transformer.h.0.attn.c_attn.bias"], bias)


@pytest.mark.parametrize(
    "changes", [dict(quant__mode="none", quant__backward_bits=8), dict(quant__arithmetic="integer")]
)
def test_how_a_model_was_trained_does_not_change_its_codes(changes: dict[str, Any]) -> None:
    """Neither a training in float nor one in integers, nor int8 gradients: the codes follow from the parameters."""
    quant = small_config(**changes).quant
    other = convert.int8_model(DEFAULT.model, quant, params_of(DEFAULT), VOCABULARY, TRAINING).tensors()
    for name, tensor in model_of(DEFAULT).tensors().items():
        np.testing.assert_array_equal(other[name], tensor, err_msg=name)


# --------------------------------------------------------------------------------------- the int8 model to variables


@both
def test_the_stored_model_gives_the_logits_of_training(tmp_path: Path, config: Config) -> None:
    save_int8_model(model_of(config), tmp_path / "int8")
    model = load_int8_model(tmp_path / "int8")
    tokens = np.random.default_rng(0).integers(0, VOCABULARY.size, (4, 16)).astype(np.int32)

    def logits(network: GPT, variables: Any) -> np.ndarray:
        return np.asarray(jax.jit(network.apply, compiler_options=compiler_options())(variables, tokens))

    trained = logits(GPT(config.model, Numerics(config.quant, "train")), {"params": params_of(config)})
    served = logits(GPT(model.model, Numerics(convert.serving_quant(model), "serve")), convert.serving_variables(model))
    if config.quant.activation_bits == 8:
        np.testing.assert_array_equal(served, trained)  # integers have one sum, in whatever order
    else:
        np.testing.assert_allclose(served, trained, rtol=0, atol=1e-5)
    in_float = logits(GPT(config.model, Numerics(convert.FLOAT, "float")), {"params": params_of(config)})
    assert np.abs(in_float - trained).max() > 1e-2, "a control: without quantization the logits differ"


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_rows_beyond_the_vocabulary_are_of_training_alone(granularity: Granularity) -> None:
    """Here they hold the largest values: a scale of the whole table must not be theirs."""
    config = small_config(quant__weight_granularity=granularity)
    padded, params = dataclasses.replace(config.model, vocab_size=16), params_of(config)
    table = np.concatenate([params["wte"]["embedding"], np.full((4, 32), 9.0, np.float32)])
    params = params | {"wte": {"embedding": table}}
    model = convert.int8_model(padded, config.quant, params, VOCABULARY, TRAINING)
    expected = model_of(config)
    assert model.model == config.model
    for name, tensor in expected.tensors().items():
        np.testing.assert_array_equal(model.tensors()[name], tensor, err_msg=name, strict=True)

    tokens = np.random.default_rng(0).integers(0, VOCABULARY.size, (4, 16)).astype(np.int32)

    def logits(network: GPT, variables: Any) -> np.ndarray:
        return np.asarray(jax.jit(network.apply, compiler_options=compiler_options())(variables, tokens))

    trained = logits(GPT(padded, Numerics(config.quant, "train"), vocabulary_size=VOCABULARY.size), {"params": params})
    served = logits(GPT(model.model, Numerics(convert.serving_quant(model), "serve")), convert.serving_variables(model))
    np.testing.assert_array_equal(trained[..., : VOCABULARY.size], served)
    assert (trained[..., VOCABULARY.size :] < -1e38).all()
    unmasked = logits(GPT(padded, Numerics(config.quant, "train")), {"params": params})[..., : VOCABULARY.size]
    assert (np.abs(unmasked - served).max() > 1e-2) == (granularity == "per_tensor"), "the control"


@both
def test_what_serves_is_the_file_and_nothing_else(config: Config) -> None:
    """Every matrix is int8, and the arrays have the bytes of the stored tensors: there is no float copy."""
    model = model_of(config)
    variables = convert.serving_variables(model)
    assert {leaf.ndim for leaf in jax.tree.leaves(variables["params"])} == {1}
    is_tensor = lambda leaf: isinstance(leaf, QuantizedTensor)  # noqa: E731
    tensors = jax.tree.leaves(variables[INT8_COLLECTION], is_leaf=is_tensor)
    assert sorted(tensor.codes.shape for tensor in tensors) == sorted(config.model.matrix_shapes().values())
    for tensor in tensors:
        assert tensor.codes.dtype == jnp.int8
        rows = len(tensor.codes) if config.quant.weight_granularity == "per_channel" else 1
        assert tensor.scale.shape == (rows, 1)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(variables)) == model.n_bytes


# ------------------------------------------------------------------------------------------- parameters by other names


@both
def test_parameters_survive_nanogpts_names(config: Config) -> None:
    params = params_of(config)
    arrays = convert.float_arrays(config.model, params)
    matrices = {f"{name}.weight": shape for name, shape in config.model.matrix_shapes().items()}
    assert {name: array.shape for name, array in arrays.items()} == matrices | config.model.vector_shapes()
    for name, weight in weights_of(config).items():
        np.testing.assert_array_equal(arrays[f"{name}.weight"], weight, err_msg=name)

    back = convert.params_from_arrays(config.model, arrays)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    again = convert.float_arrays(config.model, back)
    assert list(again) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


# ----------------------------------------------------------------------------------------------------------- the report


def test_the_report_measures_what_rounding_cost() -> None:
    model, weights = model_of(DEFAULT), weights_of(DEFAULT)
    rows = {row.name: row for row in convert.report(params_of(DEFAULT), model, TOKENS)}
    assert list(rows) == list(model.matrices)
    for name, row in rows.items():
        codes, scale = model.matrices[name].codes, model.matrices[name].scale
        weight = weights[name].astype(np.float64)
        error = weight - codes.astype(np.float64) * scale.astype(np.float64)
        assert row.sqnr_db == pytest.approx(20 * math.log10(np.linalg.norm(weight) / np.linalg.norm(error)), rel=1e-5)
        assert 35 < row.sqnr_db < 55, "8 bits"
        assert row.codes_used == len(set(codes.ravel().tolist()))
        assert row.shape == codes.shape
        assert row.scale_range == (scale.min(), scale.max())
        assert row.n_bytes == codes.size + 4 * len(scale)
    table = convert.report_table(list(rows.values())).splitlines()
    assert len(table) == 2 + len(rows)
    name = "transformer.h.1.mlp.c_fc"
    (line,) = [line for line in table if line.startswith(f"{name} ")]
    numbers = line.removeprefix(name).split()
    assert numbers[:3] == ["64", "x", "32"]
    expected = [str(rows[name].codes_used), f"{rows[name].sqnr_db:.2f}", f"{rows[name].product_db:.2f}", "2,304"]
    assert numbers[5:] == expected


def test_a_matrix_of_zeros_has_no_noise() -> None:
    config = tiny_config()
    params = jax.tree.map(np.copy, params_of(config))
    params["h_0"]["mlp"]["c_fc"]["kernel"][:] = 0.0
    model = convert.int8_model(config.model, config.quant, params, VOCABULARY, TRAINING)
    row = next(row for row in convert.report(params, model, TOKENS[:, :8]) if row.name == "transformer.h.0.mlp.c_fc")
    assert (row.codes_used, row.sqnr_db) == (1, math.inf)
    assert "inf" in convert.report_table([row])


# --------------------------------------------------------------------------------------------------- outlying channels


def with_outlier(config: Config) -> Any:
    """The same function, one channel of every LayerNorm 300 times as large and what reads it as much smaller."""
    params = jax.tree.map(np.copy, params_of(config))
    for layer in range(config.model.n_layer):
        block = params[f"h_{layer}"]
        for norm, linear in ((block["ln_1"], block["attn"]["c_attn"]), (block["ln_2"], block["mlp"]["c_fc"])):
            norm["scale"][5] *= 300
            linear["kernel"][5] /= 300
            if config.model.bias:
                norm["bias"][:] = 0.1
                norm["bias"][5] *= 300
    return params


def float_logits(config: Config, params: Any) -> np.ndarray:
    return np.asarray(jax.jit(GPT(config.model, Numerics(convert.FLOAT, "float")).apply)({"params": params}, TOKENS))


@both
def test_folded_layer_norms_are_the_same_function(config: Config) -> None:
    params = with_outlier(config)
    folded = convert.fold_layer_norms(config.model, params)
    expected = float_logits(config, params)
    assert expected.std() > 0.01
    np.testing.assert_allclose(float_logits(config, folded), expected, atol=1e-4)
    for name in (f"transformer.h.{layer}.ln_{which}" for layer in range(2) for which in (1, 2)):
        assert set(convert.float_array(folded, f"{name}.weight").tolist()) == {1.0}
        assert not config.model.bias or not convert.float_array(folded, f"{name}.bias").any()


@pytest.mark.parametrize("qat", [False, True])
def test_an_outlying_channel_costs_nothing(qat: bool) -> None:
    params, parts = with_outlier(DEFAULT), (VOCABULARY, TRAINING)
    plain = convert.report(params, convert.int8_model(DEFAULT.model, DEFAULT.quant, params, *parts), TOKENS)
    assert "warning: int8 activations are coarse in 4 of 10 layers" in convert.report_table(plain)
    model, rows = convert.quantized(DEFAULT.model, DEFAULT.quant, params, *parts, qat, TOKENS)
    assert min(row.product_db for row in rows if row.product_db is not None) > 30
    assert "warning" not in convert.report_table(rows)
    assert model.training.items() >= (TRAINING | {"quantization_aware": False}).items(), (
        "its codes are none that it was trained with"
    )


def test_what_was_trained_with_quantization_keeps_its_codes() -> None:
    """Folding would give others."""
    config, params = DEFAULT, jax.tree.map(np.copy, params_of(DEFAULT))
    params["h_0"]["ln_1"]["scale"][:] = np.linspace(0.5, 1.5, 32)
    parts = (config.model, config.quant, params, VOCABULARY, TRAINING)
    expected = convert.int8_model(*parts).tensors()
    models = [convert.quantized(*parts, qat, TOKENS)[0] for qat in (True, False)]
    assert [model.training["quantization_aware"] for model in models] == [True, False]
    kept, folded = (
        {name: np.array_equal(array, expected[name]) for name, array in model.tensors().items()} for model in models
    )
    assert all(kept.values())
    assert not folded["transformer.h.0.attn.c_attn.weight"]


@pytest.mark.parametrize("qat", [False, True])
def test_integers_are_written_of_what_was_trained(qat: bool) -> None:
    """Of a float training with LayerNorms folded, else as trained; the table is of the codes that are served."""
    params = jax.tree.map(np.copy, params_of(DEFAULT))
    params["h_0"]["ln_1"]["scale"][:] = np.linspace(0.5, 1.5, 32)
    parts = (DEFAULT.model, DEFAULT.quant, params, VOCABULARY, TRAINING)
    model, rows = convert.quantized(*parts, qat, TOKENS, "integer")
    assert isinstance(model, IntegerModel)
    errors = {row.name: pytest.approx(10 ** (-row.sqnr_db / 20), rel=1e-2) for row in rows}
    assert model.training == TRAINING | {"quantization_aware": qat, "weight_errors": errors}
    source = params if qat else convert.fold_layer_norms(DEFAULT.model, params)
    arrays = convert.float_arrays(DEFAULT.model, source)
    expected = integer_model(DEFAULT.model, "per_channel", arrays, VOCABULARY, {})
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(model.tensors[name], array, err_msg=name, strict=True)
    assert {row.name: row.n_bytes for row in rows} == {
        name: expected.tensors[f"{name}.weight"].nbytes + expected.tensors[f"{name}.weight_exponent"].nbytes
        for name in DEFAULT.model.matrix_shapes()
    }
    assert all(35 < row.sqnr_db < 60 for row in rows)


def test_integers_refuse_float_activations() -> None:
    quant = dataclasses.replace(DEFAULT.quant, activation_bits=None)
    with pytest.raises(UserError, match="activation_bits=none keeps floats; integer arithmetic has none: give 8"):
        convert.quantized(DEFAULT.model, quant, params_of(DEFAULT), VOCABULARY, TRAINING, True, TOKENS, "integer")
