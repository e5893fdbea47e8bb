"""The integer model in PyTorch: every bit of NumPy's logits."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from picogpt_jax.config import ModelConfig
from picogpt_jax.int8.integer_model import IntegerModel, integer_model
from picogpt_jax.runtimes import loop
from picogpt_jax.runtimes.numpy_integer import NumpyIntegerGPT
from picogpt_jax.runtimes.torch_integer import TorchIntegerGPT
from picogpt_jax.text.vocabulary import Vocabulary

SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=11, mlp_ratio=2, bias=False, activation="gelu")
SMALL |= dict(layer_norm_epsilon=1e-5, dropout=0.0)


def random_arrays(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    arrays = {}
    for name, (rows, cols) in config.matrix_shapes().items():
        size = 2 / np.sqrt(cols) if ".h." in name else 1.0
        arrays[f"{name}.weight"] = generator.normal(0, size, (rows, cols)).astype(np.float32)
    for name, shape in config.vector_shapes().items():
        arrays[name] = generator.normal(float(name.endswith(".weight")), 0.1, shape).astype(np.float32)
    return arrays


def random_model(granularity: Any = "per_channel", seed: int = 0, **changes: Any) -> IntegerModel:
    config = ModelConfig(**(SMALL | changes))
    vocabulary = Vocabulary(itos=tuple("\nabcdefghijklmnopqrstuvwxyz"[: config.vocab_size]))
    return integer_model(config, granularity, random_arrays(config, seed), vocabulary, {})


def numpy_integer(model: IntegerModel) -> NumpyIntegerGPT:
    config = {"format": "picogpt-int8", "format_version": 2, "arithmetic": "integer"}
    sizes = {"model": dataclasses.asdict(model.model), "quantization": {"weight_granularity": model.weight_granularity}}
    return NumpyIntegerGPT(config | sizes, model.tensors)


def random_tokens(model: IntegerModel, batch: int, time: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.model.vocab_size, (batch, time))


def check(model: IntegerModel, batch: int = 3) -> None:
    """Whole windows, the last position alone, and chunks with a cache."""
    network, size = TorchIntegerGPT(model), model.model.block_size
    tokens_BT = random_tokens(model, batch, size)
    expected = numpy_integer(model).forward(tokens_BT)
    assert len(np.unique(expected)) > 3, "else nothing is compared"
    found = network.forward(tokens_BT)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(network.forward(tokens_BT, last_only=True), expected[:, -1:])
    ends = sorted({0, size // 3, min(size // 3 + 1, size), min(size // 3 + 2, size), size})
    for last_only in (False, True):
        cache = network.new_cache(batch)
        for start, end in itertools.pairwise(ends):
            logits = network.forward(tokens_BT[:, start:end], cache, last_only)
            np.testing.assert_array_equal(logits, expected[:, end - 1 : end] if last_only else expected[:, start:end])


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_numpys_in_every_bit(bias: bool, activation: str, granularity: str) -> None:
    check(random_model(granularity, bias=bias, activation=activation))


@pytest.mark.parametrize("seed", range(4))
def test_other_models(seed: int) -> None:
    check(random_model(seed=seed + 1, bias=seed % 2 == 1), batch=1 + seed)


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_embd=192, n_layer=1, block_size=128),
        dict(n_embd=768, n_head=12, n_layer=1),
        dict(n_embd=300, n_head=3, mlp_ratio=4, n_layer=1),  # more than 1,040 inputs, an odd head size of 100
        dict(n_embd=1100, n_head=2, n_layer=1, mlp_ratio=1, block_size=4),  # heads beyond 520, another v of LayerNorm
        dict(n_embd=9, n_head=9),  # heads of one feature
        dict(n_embd=16, n_head=1, n_layer=1, block_size=600),  # weights of 7 bits
        dict(block_size=1),
    ],
    ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items()),
)
def test_other_sizes(changes: dict[str, int]) -> None:
    check(random_model(**changes), batch=2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 21, 192, 1030])
def test_layer_norms_of_many_tokens(width: int, bias: bool) -> None:
    model = random_model(n_embd=width, n_head=1 + (width > 1024), bias=bias, n_layer=1, block_size=1)
    generator = np.random.default_rng(0)
    x_BTC = generator.normal(size=(1, (1 << 20) // (width + 31), width)) * generator.choice([1, 30, 3e3, 1e6], (width,))
    x_BTC = np.clip(np.rint(x_BTC), -(2**23 - 1), 2**23 - 1).astype(np.int32)
    expected, exponent = numpy_integer(model).ln_f(x_BTC)
    codes, scale = TorchIntegerGPT(model).network.ln_f(torch.from_numpy(x_BTC).float())
    np.testing.assert_array_equal(codes.numpy(), expected[0])
    np.testing.assert_array_equal(scale.numpy(), 2.0 ** exponent[0])


def extreme(model: IntegerModel, kind: str, seed: int = 0) -> IntegerModel:
    generator = np.random.default_rng(seed)
    tensors = {name: array.copy() for name, array in model.tensors.items()}
    for name, array in tensors.items():
        if name.endswith("_exponent") and kind in ("saturated", "exponents"):
            scales = generator.integers(-24, 16, array.shape) if kind == "exponents" else np.full(array.shape, 15)
            array[:] = scales if array.ndim == 2 else array
        elif array.dtype == np.int8 and not name.endswith("_exponent"):
            if kind == "zeros":
                array[:] = 0 if "wte" not in name else array
            elif kind == "ones":
                array[:] = 127
            elif kind == "outliers":
                array[:, 0] = 127
                tensors[f"{name}_exponent"][:1] += 6
            else:
                array[:] = generator.choice([-127, 127], array.shape)
        elif array.dtype == np.int32:
            array[:] = generator.choice([-(1 << 22), 1 << 22], array.shape)
        elif array.dtype == np.int16 and kind != "zeros":
            array[:] = generator.choice([-4096, 4096], array.shape)
    return dataclasses.replace(model, tensors=tensors)


@pytest.mark.parametrize("kind", ["signs", "ones", "zeros", "outliers", "saturated", "exponents"])
@pytest.mark.parametrize("changes", [dict(bias=False), dict(bias=True, activation="relu")], ids=["gelu", "bias-relu"])
def test_extreme_weights(kind: str, changes: dict[str, Any]) -> None:
    model = extreme(random_model(**changes), kind)
    network, tokens_BT = TorchIntegerGPT(model), random_tokens(model, 3, 16)
    np.testing.assert_array_equal(network.forward(tokens_BT), numpy_integer(model).forward(tokens_BT))


def test_extreme_scores_of_the_largest_heads() -> None:
    model = extreme(random_model(n_embd=1024, n_head=1, n_layer=1, mlp_ratio=1, block_size=8), "signs")
    network, tokens_BT = TorchIntegerGPT(model), random_tokens(model, 2, 8)
    np.testing.assert_array_equal(network.forward(tokens_BT), numpy_integer(model).forward(tokens_BT))


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_and_threads_change_nothing(threads: int) -> None:
    model = random_model(n_embd=96, block_size=64)
    tokens_BT = random_tokens(model, 24, 64)
    expected = numpy_integer(model).forward(tokens_BT)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        np.testing.assert_array_equal(TorchIntegerGPT(model).forward(tokens_BT), expected)
    finally:
        torch.set_num_threads(before)


def test_texts_are_numpys() -> None:
    model, prompt = random_model(), np.array([[1, 2], [3, 4]])
    for overflow in ("slide", "refill"):
        texts = [
            loop.generate(runtime, prompt, 24, temperature=0.8, seed=3, overflow=overflow)
            for runtime in (TorchIntegerGPT(model), numpy_integer(model))
        ]
        np.testing.assert_array_equal(*texts)


def test_the_state_is_the_files_integers() -> None:
    model = random_model(bias=True)
    state = TorchIntegerGPT(model).network.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.int8, torch.int16, torch.int32}
    assert sum(tensor.nbytes for tensor in state.values()) == model.n_bytes
    cache = TorchIntegerGPT(model).new_cache(2)
    assert cache.codes.dtype == cache.exponents.dtype == torch.int8


def test_more_positions_than_the_window_are_an_error() -> None:
    network = TorchIntegerGPT(random_model())
    cache = network.new_cache(1)
    network.forward(np.zeros((1, 16), np.int64), cache)
    with pytest.raises(ValueError, match="17 positions do not fit into block_size=16"):
        network.forward(np.zeros((1, 1), np.int64), cache)
