"""Integer arithmetic in JAX: the bits of the specification's own program, on any devices, in any batch and form."""

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny import BATCHES, tiny_config

from configs import gpt2_xl
from picogpt_jax.config import MeshConfig, ModelConfig
from picogpt_jax.devices.sharding import batch_sharding, make_mesh, on
from picogpt_jax.int8.convert import FLOAT, float_arrays, serving_quant, serving_variables
from picogpt_jax.int8.integer_model import IntegerModel, integer_model
from picogpt_jax.model import attention, integer
from picogpt_jax.model.gpt import GPT
from picogpt_jax.model.layers import stack
from picogpt_jax.model.numerics import Numerics
from picogpt_jax.runtimes import numpy_integer as oracle
from picogpt_jax.runtimes.numpy_integer import NumpyIntegerGPT
from picogpt_jax.text.vocabulary import Vocabulary
from picogpt_jax.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("compile_quickly_and_once")

INTEGER = dataclasses.replace(FLOAT, mode="int8", arithmetic="integer")
LETTERS = Vocabulary(itos=tuple("\nabcdefghij"))
PLAIN: dict[str, Any] = dict(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=11, mlp_ratio=2)
VARIANTS: list[tuple[Any, dict[str, Any]]] = [
    ("per_tensor", dict(bias=False, activation="relu", n_layer=2)),
    ("per_channel", dict(bias=False, activation="gelu")),
    ("per_channel", dict(bias=True, activation="gelu_tanh", mlp_ratio=4, n_head=4, n_embd=64)),  # like GPT-2
]


def config_of(**changes: Any) -> ModelConfig:
    return ModelConfig(**(PLAIN | dict(bias=False, activation="gelu", layer_norm_epsilon=1e-5, dropout=0.0) | changes))


def random_params(config: ModelConfig, seed: int = 0, stddev: float = 0.2) -> Any:
    """Parameters of about the size of trained ones, biases and LayerNorms included."""
    model = GPT(config, Numerics(FLOAT, "float"))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    generator = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        around = float(path[-1].key == "scale")
        return jnp.asarray(generator.normal(around, stddev, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes))


def made(config: ModelConfig, params: Any, granularity: Any = "per_channel") -> IntegerModel:
    return integer_model(config, granularity, float_arrays(config, params), LETTERS, {})


def in_numpy(model: IntegerModel) -> NumpyIntegerGPT:
    config = {
        "format": "picogpt-int8",
        "format_version": 2,
        "arithmetic": "integer",
        "model": dataclasses.asdict(model.model),
        "quantization": {"weight_granularity": model.weight_granularity},
    }
    return NumpyIntegerGPT(config, model.tensors)


def trained_logits(config: ModelConfig, params: Any, tokens_BT: Any, **numerics: Any) -> np.ndarray:
    model = GPT(config, Numerics(dataclasses.replace(INTEGER, **numerics), "train"))
    return np.asarray(jax.jit(lambda params: model.apply({"params": params}, jnp.asarray(tokens_BT)))(params))


TOKENS = np.random.default_rng(1).integers(0, 11, (3, 16))


@pytest.mark.parametrize(("granularity", "changes"), VARIANTS)
def test_training_serving_and_numpy_give_the_same_bits(granularity: Any, changes: dict[str, Any]) -> None:
    config = config_of(**changes)
    params = random_params(config)
    model = made(config, params, granularity)
    expected = in_numpy(model).forward(TOKENS)
    trained = trained_logits(config, params, TOKENS, weight_granularity=granularity)
    np.testing.assert_array_equal(trained, expected)
    serving = GPT(config, Numerics(serving_quant(model), "serve"))
    served = jax.jit(serving.apply)(serving_variables(model), jnp.asarray(TOKENS))
    np.testing.assert_array_equal(np.asarray(served), expected)
    # The control: float functions between the same products are another model.
    mixed = trained_logits(config, params, TOKENS, weight_granularity=granularity, arithmetic="mixed")
    assert np.abs(mixed - expected).max() > 1e-4


@pytest.mark.parametrize("kind", ["all codes 127", "an outlier", "zeros", "tiny"])
def test_extremes_stay_within_the_bounds(kind: str) -> None:
    config = config_of(n_embd=64, n_head=1, mlp_ratio=4, bias=True)
    params = random_params(config)
    if kind == "all codes 127":
        params = jax.tree.map(lambda leaf: jnp.where(leaf > 0, 30.0, -30.0), params)
    elif kind == "an outlier":
        params["wte"]["embedding"] = params["wte"]["embedding"].at[:, 3].set(200.0)
    elif kind == "zeros":
        params["wte"]["embedding"], params["wpe"]["embedding"] = jnp.zeros((11, 64)), jnp.zeros((16, 64))
    else:
        params = jax.tree_util.tree_map_with_path(lambda p, x: x if p[-1].key == "scale" else x * 1e-4, params)
    tokens = np.full((1, 16), 5)
    expected = in_numpy(made(config, params)).forward(tokens)
    np.testing.assert_array_equal(trained_logits(config, params, tokens), expected)


def test_the_widest_model_stays_within_the_bounds_over_a_full_context() -> None:
    """A block of configs/gpt2_xl.py with every weight at its largest code, and values that are all alike."""
    widest = gpt2_xl.get_config().model
    sizes = {name: widest[name] for name in ("n_head", "n_embd", "block_size", "mlp_ratio", "bias", "activation")}
    config = config_of(**sizes)
    params = jax.tree.map(lambda leaf: jnp.where(leaf > -0.1, 30.0, -30.0), random_params(config))
    tokens = np.full((1, config.block_size), 5)
    expected = in_numpy(made(config, params)).forward(tokens)
    np.testing.assert_array_equal(trained_logits(config, params, tokens), expected)


def test_logits_do_not_depend_on_the_batch_or_on_what_follows() -> None:
    config = config_of()
    params = random_params(config)
    whole = trained_logits(config, params, TOKENS)
    alone = trained_logits(config, params, TOKENS[1:2, :9])
    np.testing.assert_array_equal(alone, whole[1:2, :9])


@pytest.mark.parametrize("sizes", [(2, 1, 1), (2, 2, 2)])
def test_logits_are_the_same_over_any_mesh(sizes: tuple[int, int, int]) -> None:
    config = config_of(n_embd=64, n_head=4, vocab_size=11)
    params = random_params(config)
    tokens = np.random.default_rng(2).integers(0, 11, (8, 16))
    expected = trained_logits(config, params, tokens)
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), int(np.prod(sizes)))
    model = GPT(config, Numerics(INTEGER, "train"))

    @jax.jit
    def forward(params: Any, tokens: Any) -> Any:
        with on(mesh):
            return model.apply({"params": params}, tokens)

    np.testing.assert_array_equal(np.asarray(forward(params, jnp.asarray(tokens))), expected)


def test_a_kernel_gives_the_bits_of_numpy_and_the_gradient_of_the_float_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Pallas' interpreter; the plain form stands for the float kernel."""
    config = config_of(block_size=128, bias=True)
    params = random_params(config, stddev=0.1)
    tokens = np.random.default_rng(3).integers(0, 11, (1, 128))
    monkeypatch.setattr(attention, "fused", lambda form, q, k, v: attention.causal(q, k, v))
    in_kernel = partial(attention.integer_attention.attention, interpret=True)
    monkeypatch.setattr(attention.integer_attention, "attention", in_kernel)

    def outputs(form: Any) -> tuple[np.ndarray, np.ndarray]:
        model = GPT(config, Numerics(INTEGER, "train", attention=form))

        def loss(params: Any) -> Any:
            logits = model.apply({"params": params}, jnp.asarray(tokens))
            return jnp.square(logits).mean(), logits

        gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
        return np.asarray(logits), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)])

    (plain_logits, plain), (logits, found) = outputs("plain"), outputs("splash")
    np.testing.assert_array_equal(logits, in_numpy(made(config, params)).forward(tokens))
    np.testing.assert_array_equal(logits, plain_logits)
    assert plain @ found / np.linalg.norm(plain) / np.linalg.norm(found) > 0.999
    assert np.any(plain != found), "they are two forms"


def test_a_scan_and_remat_change_nothing() -> None:
    config = config_of(n_layer=2)
    params = random_params(config)
    expected = trained_logits(config, params, TOKENS)
    for scan, remat in ((True, "block"), (False, "dots")):
        model = GPT(config, Numerics(INTEGER, "train"), scan=scan, remat=remat)  # type: ignore[arg-type]
        found = jax.jit(model.apply)({"params": stack(params) if scan else params}, jnp.asarray(TOKENS))
        np.testing.assert_array_equal(np.asarray(found), expected)


def heads() -> Any:
    """Codes and exponents of q, k and v, as `quantize` could give them."""
    draw = np.random.default_rng(0)
    parts = draw.integers(-127, 128, (3, 2, 3, 40, 24)), draw.integers(-12, -6, (3, 2, 3, 40, 1))
    return tuple(zip(*(jnp.asarray(part, jnp.int8) for part in parts), strict=True))


def quantized(y_BHTD: Any) -> np.ndarray:
    """The values [B, T, C] that the next layer computes with."""
    codes, t = integer.quantize(jnp.asarray(y_BHTD).transpose(0, 2, 1, 3).reshape(*y_BHTD.shape[::2], -1))
    return np.asarray(codes * integer.power(t))


def numpy_attention(q: Any, k: Any, v: Any, block_size: int) -> np.ndarray:
    """`quantized` of what the specification's program returns, whose integers have 12 fraction bits."""
    operands = ((np.asarray(codes, np.int32), np.asarray(e, np.int32) + 12) for codes, e in (q, k, v))
    codes, t = oracle.attention(*operands, block_size)
    return codes.reshape(*codes.shape[:2], -1) * np.exp2(t, dtype=np.float32)


@pytest.mark.parametrize("block_size", [256, 1024])
def test_int8_products_give_the_bits_of_float_ones(block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads()
    expected, _ = integer.attention(q, k, v, 0, block_size)
    monkeypatch.setattr(integer, "_products", integer.int8_products)
    found, _ = integer.attention(q, k, v, 0, block_size)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(quantized(found), numpy_attention(q, k, v, block_size))


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
def test_products_of_attention_are_int8_where_that_is_fast(platform: str) -> None:
    q, k, v = heads()
    traced = jax.jit(lambda q, k, v: integer.attention(q, k, v, 0, 256)).trace(q, k, v)
    products = re.findall(r"dot_general.*: \((.*)\) ->", traced.lower(lowering_platforms=(platform,)).as_text())
    assert len(products) == 2
    narrow = [product.count("xi8>") for product in products]
    assert narrow == ([0, 0] if platform == "cpu" else [2, 2])


def test_gradients_are_close_to_those_of_mixed_arithmetic() -> None:
    config = config_of(bias=True)
    params = random_params(config, stddev=0.1)

    def gradient(arithmetic: Any) -> np.ndarray:
        model = GPT(config, Numerics(dataclasses.replace(INTEGER, arithmetic=arithmetic), "train"))

        def loss(params: Any) -> Any:
            logits = model.apply({"params": params}, jnp.asarray(TOKENS[:, :-1]))
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(TOKENS[:, 1:, None]), -1).mean()

        leaves = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
        return np.concatenate([np.asarray(leaf).ravel() for leaf in leaves])

    mixed, found = gradient("mixed"), gradient("integer")
    cosine = mixed @ found / np.linalg.norm(mixed) / np.linalg.norm(found)
    assert cosine > 0.99
    assert 0.95 < np.linalg.norm(found) / np.linalg.norm(mixed) < 1.05


@pytest.mark.parametrize(
    "changes",
    [
        dict(model__dropout=0.2, train__gradient_accumulation_steps=2),
        dict(train__dtype="bfloat16", train__scan_layers=True, train__remat="dots", mesh__data=4),
        dict(train__dtype="float16", train__backward_dtype="same", mesh__tensor=2),
        dict(train__backward_dtype="bfloat16", quant__start_step=2, mesh__fsdp=2),
        dict(quant__backward_bits=8),
    ],
)
def test_it_trains_in_every_setting(changes: dict[str, Any]) -> None:
    """16 characters that follow each other: after 24 steps the loss is far below that of guessing."""
    config = tiny_config(quant__arithmetic="integer", **changes)
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    trainer = Trainer(config, jax.devices()[: int(np.prod(sizes))])
    batches = jax.device_put(np.tile(BATCHES, (6, 1, 1)), batch_sharding(trainer.mesh, 1))
    state, metrics = trainer.steps(trainer.init(), None, batches, "train")
    assert float(metrics.loss[-1]) < 0.7 * float(metrics.loss[0])
    assert state.step == 24


def test_a_training_with_the_kernel_has_the_losses_of_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Pallas' interpreter, each device with its own sequences and heads; gradients differ in their last bits."""
    monkeypatch.setattr(attention, "fused", lambda form, q, k, v: attention.causal(q, k, v))
    in_kernel, forms = partial(attention.integer_attention.attention, interpret=True), []
    noted = lambda form, *operands: forms.append(form) or in_kernel(form, *operands)  # noqa: E731
    monkeypatch.setattr(attention.integer_attention, "attention", noted)
    small = dict(model__dropout=0.0, train__scan_layers=True, train__remat="dots", mesh__data=2, mesh__tensor=2)
    config = tiny_config(quant__arithmetic="integer", **small)
    losses = []
    for form in ("plain", "cudnn"):
        trainer = Trainer(config, jax.devices()[:4])
        trainer.attention = form
        batches = jax.device_put(BATCHES, batch_sharding(trainer.mesh, 1))
        _, metrics = trainer.steps(trainer.init(), None, batches, "train")
        losses.append(np.asarray(metrics.loss))
    assert set(forms) == {"cudnn"}
    assert losses[0][0] == losses[1][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    assert losses[1][-1] < losses[1][0]


def test_the_integer_square_root_is_exact() -> None:
    n = np.concatenate([np.arange(5000), np.arange(4096) ** 2, np.arange(1, 4097) ** 2 - 1]).astype(np.int32)
    q = np.asarray(integer.isqrt(jnp.asarray(n)), np.int64)
    assert ((q * q <= n) & ((q + 1) ** 2 > n)).all()


def test_a_shift_rounds_halves_up() -> None:
    assert integer.shift(jnp.asarray([-6, -5, -3, -2, -1, 1, 2, 3, 5]), 2).tolist() == [-1, -1, -1, 0, 0, 0, 1, 1, 1]
    assert integer.shift(jnp.asarray([-3, 3]), -2).tolist() == [-12, 12]
    assert integer.shift(jnp.asarray([-1, 0, 1 << 24]), 31).tolist() == [0, 0, 0]
