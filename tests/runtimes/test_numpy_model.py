"""The NumPy runtime against the JAX model that serves, its exact integers, its cache, and damaged folders."""

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT
from test_int8_model import random_model, rewrite_json, rewrite_tensors

from picogpt_jax.errors import UserError
from picogpt_jax.int8.convert import serving_quant, serving_variables
from picogpt_jax.int8.folder import load_int8_model, save_int8_model
from picogpt_jax.int8.int8_model import Int8Model, config_to_json
from picogpt_jax.model.gpt import GPT
from picogpt_jax.model.numerics import Numerics
from picogpt_jax.runtimes.numpy_model import EXACT_FEATURES, Int8Matrix, NumpyGPT, erf, gelu, gelu_tanh, quantize

VARIANTS: list[dict[str, Any]] = [
    {},
    {"granularity": "per_tensor"},
    {"activation_bits": None},
    {"bias": True},
    {"activation": "gelu_tanh", "layer_norm_epsilon": 0.1, "n_head": 1},
    {"activation": "relu", "mlp_ratio": 4, "granularity": "per_tensor", "bias": True, "activation_bits": None},
]


def numpy_model(model: Int8Model) -> NumpyGPT:
    return NumpyGPT(config_to_json(model), model.tensors())


def jax_logits(model: Int8Model, tokens_BT: np.ndarray) -> np.ndarray:
    """The serving pass of the model that was trained."""
    network = GPT(model.model, Numerics(serving_quant(model), "serve"))
    return np.asarray(jax.jit(network.apply)(serving_variables(model), tokens_BT.astype(np.int32)))


def random_tokens(batch: int, time: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 11, (batch, time))


def assert_same_logits(found: np.ndarray, expected: np.ndarray) -> None:
    """Up to the last bits of float sums, which here and there round a code the other way, with all that follows it."""
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert expected.std() > 1
    errors_BT = np.abs(found - expected).max(-1)
    assert np.median(errors_BT) < 1e-5
    assert errors_BT.max() < 0.5


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_logits_are_those_of_the_model_that_was_trained(tmp_path: Path, variant: dict[str, Any]) -> None:
    model, tokens_BT = random_model(**variant), random_tokens(16, 16)
    save_int8_model(model, tmp_path / "int8")
    assert_same_logits(NumpyGPT.load(tmp_path / "int8").forward(tokens_BT), jax_logits(model, tokens_BT))


def test_quantizing_the_activations_matters() -> None:
    """The control of the test above."""
    tokens_BT = random_tokens(16, 16)
    int8, weight_only = (numpy_model(random_model(activation_bits=bits)).forward(tokens_BT) for bits in (8, None))
    assert np.median(np.abs(int8 - weight_only).max(-1)) > 1e-2


def test_activations_are_rounded_half_to_even_on_the_grid_of_their_token() -> None:
    x = np.array([[127, 0.5, 1.5, -2.5], [0, 0, 0, 0], [-3, 1, 2, 3], [1e-44, 0, 0, 0]], np.float32)
    codes, scale = quantize(x)
    assert codes.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0], [-127, 42, 85, 127], [0, 0, 0, 0]]
    assert scale[:, 0].tolist() == [float(np.float32(absmax) * np.float32(1 / 127)) for absmax in (127, 1, 3, 1)]


@pytest.mark.parametrize("features", [EXACT_FEATURES, EXACT_FEATURES + 1, 4096])
def test_the_product_is_the_integer_one(features: int) -> None:
    """An odd sum above 2**24 has no float32: the sum must be exact before it is rounded, once."""
    codes, x = np.full((1, features), 127, np.int8), np.full((1, features), 127, np.float32)
    codes[0, 0] = 126
    y = Int8Matrix(codes, np.ones((1, 1), np.float32), None, 8)(x)
    assert y.item() == np.float32(features * 127 * 127 - 127)


def test_erf_and_gelu_are_accurate() -> None:
    x = np.concatenate([np.linspace(-8, 8, 4001), [0, 1e-30, 100, -100]]).astype(np.float32)
    assert np.abs(erf(x) - np.vectorize(math.erf)(x)).max() < 5e-7
    exact = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    np.testing.assert_allclose(gelu(x), exact, rtol=1e-6, atol=1e-6)
    assert gelu(x).dtype == gelu_tanh(x).dtype == np.float32


@pytest.mark.parametrize("pieces", [[16], [5, 1, 1, 4, 5], [1] * 16])
def test_a_cached_computation_is_the_whole_one(pieces: list[int]) -> None:
    """With float activations, where the last bit of a sum cannot become a whole step of the grid."""
    model, tokens_BT = numpy_model(random_model(activation_bits=None)), random_tokens(3, 16)
    cache, starts = model.new_cache(3), np.cumsum([0, *pieces])
    parts = [model.forward(tokens_BT[:, start:end], cache) for start, end in itertools.pairwise(starts)]
    assert cache.length == 16
    whole = model.forward(tokens_BT)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-4)
    np.testing.assert_allclose(model.forward(tokens_BT, last_only=True), whole[:, -1:], atol=1e-4)
    with pytest.raises(ValueError, match="17 positions do not fit into block_size=16"):
        model.forward(tokens_BT[:, :1], cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"\[Errno 2\] No such file or directory: .*config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"\[Errno 2\] .*model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("["), "is no int8 folder that can be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is no int8 folder that can be read"),
        (lambda folder: rewrite_json(folder / "config.json", lambda value: value.pop("model")), "KeyError.*model"),
        (lambda folder: rewrite_json(folder / "config.json", lambda value: value.update(format="x")), "'x' version 1"),
        (
            lambda folder: rewrite_json(folder / "config.json", lambda value: value.update(format_version=2)),
            "version 2",
        ),
        (
            lambda folder: rewrite_json(folder / "config.json", lambda value: value["model"].update(activation="silu")),
            "KeyError.*silu",
        ),
        (
            lambda folder: rewrite_json(
                folder / "config.json", lambda value: value["quantization"].update(quantize_attention=True)
            ),
            "is none that this runtime computes",
        ),
        (lambda folder: rewrite_tensors(folder, lambda tensors: tensors.update(more=np.ones(1))), "F64"),
        (
            lambda folder: rewrite_tensors(folder, lambda tensors: tensors.update(more=np.ones(1, np.float32))),
            r"unknown tensors: \['more'\]",
        ),
        (
            lambda folder: rewrite_tensors(folder, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.weight")),
            "the tensor transformer.h.1.mlp.c_fc.weight is missing",
        ),
        (
            lambda folder: rewrite_json(folder / "config.json", lambda value: value["model"].update(mlp_ratio=3)),
            r"transformer.h.0.mlp.c_fc.weight is int8 \[64, 32\]; expected int8 \[96, 32\]",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 16),
            "is no int8 folder that can be read",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:-100]
            ),
            "is no int8 folder that can be read",
        ),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    save_int8_model(random_model(), tmp_path / "int8")
    change(tmp_path / "int8")
    with pytest.raises(UserError, match=message):
        NumpyGPT.load(tmp_path / "int8")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("layer_norm_epsilon", value) for value in (10**400, -(10**400), float("inf"), -1.0, 0, None, "x", [], {})),
        *(("n_head", value) for value in (0, -1, 3, 10**30, 4.0, float("nan"), True, "4")),
        *((key, 10**400) for key in ("n_layer", "n_embd", "block_size", "vocab_size", "mlp_ratio", "activation")),
    ],
)
def test_a_number_that_no_model_has_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    """When it is loaded, in a line of bearable length: some would fail only in the forward pass."""
    save_int8_model(random_model(), tmp_path)
    rewrite_json(tmp_path / "config.json", lambda config: config["model"].update({key: value}))
    with pytest.raises(UserError, match=r"is none that this runtime computes|is no int8 folder") as refusal:
        NumpyGPT.load(tmp_path)
    assert len(str(refusal.value)) < 300 + len(str(tmp_path))
    with pytest.raises(UserError) as refusal:
        load_int8_model(tmp_path)
    assert len(str(refusal.value)) < 300 + len(str(tmp_path))


def test_it_needs_numpy_alone_and_shares_no_code(tmp_path: Path) -> None:
    save_int8_model(random_model(), tmp_path / "int8")
    code = (
        "import sys, json; from picogpt_jax.runtimes.numpy_model import NumpyGPT; NumpyGPT.load(sys.argv[1]); "
        "names = {name for name in sys.modules if name.startswith('picogpt_jax.')}; "
        "print(json.dumps([sorted(names), sorted({'jax', 'torch', 'safetensors', 'scipy'} & set(sys.modules))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "int8")], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert json.loads(done.stdout) == [
        [f"picogpt_jax.{name}" for name in ("errors", "runtimes", "runtimes.numpy_model", "runtimes.numpy_reading")],
        [],
    ]
