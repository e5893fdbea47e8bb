import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core import jaxprs_in_params
from tiny import VOCABULARY, quick_compilation, tiny_config

from configs.base import get_config
from picogpt_jax.config import Config, ModelConfig, Remat
from picogpt_jax.devices.setup import compiler_options
from picogpt_jax.int8.convert import int8_model, serving_variables
from picogpt_jax.model import gpt as model_module
from picogpt_jax.model.dropout import DropoutKey, fold
from picogpt_jax.model.gpt import GPT
from picogpt_jax.model.numerics import Mode, Numerics
from picogpt_jax.model.quantization import INT8_COLLECTION

BATCH, TIME = 4, 8
REMATS: tuple[Remat, ...] = ("dots", "block")
TOKENS = jax.random.randint(jax.random.key(0), (BATCH, TIME), 0, VOCABULARY.size)


@functools.cache
def random_params(config: Config) -> Any:
    """Parameters as after some training: no bias is zero, no LayerNorm weight one."""
    leaves, tree = jax.tree.flatten(abstract_params(config))
    generator = np.random.default_rng(0)
    drawn = [generator.normal(float(leaf.ndim == 1), 0.15, leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.device_put(jax.tree.unflatten(tree, drawn))


def abstract_params(config: Config) -> Any:
    init = GPT(config.model, Numerics(config.quant, "float")).init
    return nn.unbox(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]


@functools.cache
def served(config: Config) -> Any:
    """Serving variables of the random parameters."""
    return serving_variables(int8_model(config.model, config.quant, random_params(config), VOCABULARY, {}))


def jit(function: Callable[..., Any], **options: Any) -> Any:
    return jax.jit(function, compiler_options=compiler_options(), **options)


def compiled(config: Config, mode: Mode, dtype: str = "float32", quick: bool = True) -> Any:
    """`apply`, compiled; not `quick`: as training and serving compile it."""
    model = GPT(config.model, Numerics(config.quant, mode, jnp.dtype(dtype)))
    with quick_compilation() if quick else contextlib.nullcontext():
        return jit(model.apply, static_argnames=("mutable", "last_only", "keep_cache"))


def quick_jit(function: Callable[..., Any]) -> Any:
    with quick_compilation():
        return jit(function)


@functools.cache
def logits(config: Config, mode: Mode, dtype: str = "float32", quick: bool = True) -> np.ndarray:
    variables = served(config) if mode == "serve" else {"params": random_params(config)}
    return np.asarray(compiled(config, mode, dtype, quick)(variables, TOKENS))


def names(tree: Any) -> dict[str, Any]:
    return {"/".join(path): leaf for path, leaf in flax.traverse_util.flatten_dict(tree).items()}


# ---------------------------------------------------------------------------------------------------- the architecture


def test_the_default_model_has_923136_parameters() -> None:
    sections = get_config().to_dict()
    sections["model"]["vocab_size"] = 65
    config = Config.from_dict(sections)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config))) == 923_136


def test_the_configuration_counts_the_parameters_of_the_model() -> None:
    config = tiny_config(model__bias=True, model__n_layer=2, model__mlp_ratio=3)
    assert config.model.n_parameters == sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


@pytest.mark.parametrize(
    ("bias", "activation", "mlp_ratio"), [(True, "gelu", 2), (False, "gelu_tanh", 4), (True, "relu", 1)]
)
def test_float_mode_is_the_model_of_plain_flax_layers(bias: bool, activation: str, mlp_ratio: int) -> None:
    config = tiny_config(model__bias=bias, model__activation=activation, model__mlp_ratio=mlp_ratio)
    expected = plain_logits(config.model, random_params(config), TOKENS)
    actual = logits(config, "float")
    assert np.abs(actual).max() > 1, "logits worth comparing"
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def plain_logits(config: ModelConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """The same model composed by hand of linen's own layers, from the same parameter tree."""
    norm = nn.LayerNorm(epsilon=config.layer_norm_epsilon, use_bias=config.bias)
    activation = {
        "gelu": lambda x: nn.gelu(x, approximate=False),
        "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
        "relu": nn.relu,
    }[config.activation]

    def apply(layer: nn.Module, parameters: Any, x: jax.Array) -> jax.Array:
        return layer.apply({"params": parameters}, x)

    def dense(parameters: Any, x: jax.Array) -> jax.Array:
        return apply(nn.Dense(parameters["kernel"].shape[1], use_bias=config.bias), parameters, x)

    def heads(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], config.n_head, -1)

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        wte = nn.Embed(config.vocab_size, config.n_embd)
        positions = nn.Embed(config.block_size, config.n_embd)
        x = apply(wte, params["wte"], tokens) + apply(positions, params["wpe"], jnp.arange(tokens.shape[1]))
        for layer in range(config.n_layer):
            block = params[f"h_{layer}"]
            q, k, v = map(heads, jnp.split(dense(block["attn"]["c_attn"], apply(norm, block["ln_1"], x)), 3, axis=-1))
            y = nn.dot_product_attention(q, k, v, mask=nn.make_causal_mask(tokens)).reshape(x.shape)
            x = x + dense(block["attn"]["c_proj"], y)
            y = activation(dense(block["mlp"]["c_fc"], apply(norm, block["ln_2"], x)))
            x = x + dense(block["mlp"]["c_proj"], y)
        return wte.apply({"params": params["wte"]}, apply(norm, params["ln_f"], x), method="attend")

    with jax.numpy_rank_promotion("allow"):  # linen's layers add a bias [C] to [B, T, C]
        return np.asarray(quick_jit(forward)(params, tokens))


def test_the_initial_parameters_are_those_of_gpt2() -> None:
    n_layer = 2
    config = tiny_config(model__n_layer=n_layer, model__n_embd=64, model__block_size=32, model__bias=True)
    init = quick_jit(GPT(config.model, Numerics(config.quant, "float")).init)
    params = names(nn.unbox(init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"])
    for name, value in params.items():
        if name.endswith("scale"):
            np.testing.assert_array_equal(value, 1.0)
        elif name.endswith("bias"):
            np.testing.assert_array_equal(value, 0.0)
        else:
            expected = 0.02 / (2 * n_layer) ** 0.5 if name.endswith("c_proj/kernel") else 0.02
            assert value.std() == pytest.approx(expected, rel=4 / (2 * value.size) ** 0.5), name
            assert abs(value.mean()) < 4 * expected / value.size**0.5, name
    matrices = [value.tobytes() for value in map(np.asarray, params.values()) if value.ndim == 2]
    assert len(matrices) == 2 + 4 * n_layer
    assert len(set(matrices)) == len(matrices), "every matrix is drawn on its own"


@pytest.mark.parametrize("mode", ["float", "train"])
def test_a_position_depends_on_those_before_it_and_no_other(mode: Mode) -> None:
    """By gradients: a row of wpe enters at its own position only. The tied head would let wte leak."""
    config = tiny_config(model__n_layer=2)
    params = random_params(config)
    model = GPT(config.model, Numerics(config.quant, mode))

    def projected(wpe: jax.Array, params: Any) -> jax.Array:
        out = model.apply({"params": {**params, "wpe": {"embedding": wpe}}}, TOKENS[:1])
        return out[0] @ jnp.linspace(-1, 1, VOCABULARY.size)

    jacobian = np.asarray(quick_jit(jax.jacrev(projected))(params["wpe"]["embedding"], params))
    assert jacobian.shape == (TIME, TIME, 16)
    strength = np.abs(jacobian).max(-1)
    later = np.triu(np.ones((TIME, TIME), bool), 1)
    assert not np.any(strength[later])
    assert np.all(strength[~later] > 1e-6)


def test_no_two_places_share_a_dropout_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = []

    def dropout(x: jax.Array, rate: float, key: DropoutKey, site: str) -> jax.Array:
        assert rate == config.model.dropout
        assert key is given
        sites.append(site)
        return x

    given = DropoutKey(seed=fold(0, 0), row=jnp.uint32(0))
    config = tiny_config(model__n_layer=2)
    params = abstract_params(config)
    model = GPT(config.model, Numerics(config.quant, "float"))
    monkeypatch.setattr(model_module, "dropout", dropout)
    jax.eval_shape(lambda params: model.apply({"params": params}, TOKENS, given), params)
    per_layer = ["attn/weights", "attn/residual", "mlp/residual"]
    assert sites == ["embeddings", *[f"h_{layer}/{name}" for layer in range(2) for name in per_layer]]


def test_too_long_a_text_is_refused() -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match=r"9 tokens do not fit into block_size=8"):
        GPT(config.model, Numerics(config.quant, "float")).init(jax.random.key(0), jnp.zeros((1, 9), jnp.int32))


# ------------------------------------------------------------------------------------- training, converting and serving


@pytest.mark.parametrize(
    ("width", "granularity", "dtype", "bias"),
    [
        (32, "per_channel", "float32", False),
        (16, "per_channel", "float32", True),
        (16, "per_tensor", "float32", True),
        (16, "per_channel", "bfloat16", True),
    ],
)
def test_what_is_trained_is_what_is_served(width: int, granularity: str, dtype: str, bias: bool) -> None:
    config = tiny_config(model__n_embd=width, model__bias=bias, quant__weight_granularity=granularity)
    trained = logits(config, "train", dtype, quick=False)
    assert trained.dtype == np.float32
    np.testing.assert_array_equal(logits(config, "serve", dtype, quick=False), trained)


def test_conversion_computes_what_training_computed() -> None:
    config = tiny_config(model__bias=True, quant__weight_granularity="per_tensor")
    convert = compiled(config, "convert", quick=False)
    at_conversion, _ = convert({"params": random_params(config)}, TOKENS, mutable=("aqt",))
    np.testing.assert_array_equal(at_conversion, logits(config, "train", "float32", quick=False))


def test_int8_is_close_to_float_and_is_not_float() -> None:
    config = tiny_config(model__bias=True)
    quantized, unquantized = logits(config, "serve"), logits(config, "float")
    distance = np.abs(quantized - unquantized).max() / np.abs(unquantized).max()
    assert 1e-3 < distance < 0.2


def test_one_changed_code_changes_the_logits() -> None:
    config = tiny_config(model__bias=True)
    apply = compiled(config, "serve")
    variables = served(config)
    before = np.asarray(apply(variables, TOKENS))
    changed = []
    for name, tensor in names(variables[INT8_COLLECTION]).items():
        other = dataclasses.replace(tensor, codes=tensor.codes.at[3, 2].set(-127 if tensor.codes[3, 2] > 0 else 127))
        path = tuple(name.split("/"))
        flat = flax.traverse_util.flatten_dict(variables[INT8_COLLECTION]) | {path: other}
        tree = flax.traverse_util.unflatten_dict(flat)
        if np.any(apply({**variables, INT8_COLLECTION: tree}, TOKENS) != before):
            changed.append(name)
    matrices = ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
    assert sorted(changed) == sorted(["wte/embedding", "wpe/embedding", *(f"h_0/{name}/kernel" for name in matrices)])


def dot_types(jaxpr: Any) -> list[tuple[str, str, str]]:
    """(lhs, rhs, result) of every product, also inside calls and loops."""
    types = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "int8_dot"):
            types.append(tuple(str(var.aval.dtype) for var in (*equation.invars, *equation.outvars)))
        for inner in jaxprs_in_params(equation.params):
            types += dot_types(inner)
    return types


def test_every_product_with_a_weight_is_int8_with_int32_sums() -> None:
    """In what is asked of the compiler, when serving and in the forward pass of training."""
    n_layer = 2
    config = tiny_config(model__n_layer=n_layer)
    expected = {("int8", "int8", "int32"): 4 * n_layer + 1, ("float32",) * 3: 2 * n_layer}
    for mode, variables in (("serve", served(config)), ("train", {"params": random_params(config)})):
        model = GPT(config.model, Numerics(config.quant, mode))
        traced = jax.jit(lambda variables, model=model: model.apply(variables, TOKENS)).trace(variables)
        assert collections.Counter(dot_types(traced.jaxpr.jaxpr)) == expected, "two float products: attention's"


def test_serving_holds_no_float_matrix() -> None:
    config = tiny_config(model__bias=True)
    variables = served(config)
    assert {leaf.ndim for leaf in jax.tree.leaves(variables["params"])} == {1}
    model = GPT(config.model, Numerics(config.quant, "serve"))
    incomplete = {name: value for name, value in variables[INT8_COLLECTION].items() if name != "wte"}
    with pytest.raises(ValueError, match=r"wte/embedding is missing from the collection 'int8'"):
        jax.eval_shape(model.apply, {**variables, INT8_COLLECTION: incomplete}, TOKENS)


def test_a_later_token_does_not_change_an_earlier_logit_in_int8() -> None:
    """Scales are taken per token: one over the whole batch would leak the future."""
    config = tiny_config(model__bias=True)
    variables = served(config)
    changed = TOKENS.at[:, 5:].set((TOKENS[:, 5:] + 1) % VOCABULARY.size)
    apply = compiled(config, "serve")
    before, after = apply(variables, TOKENS), apply(variables, changed)
    np.testing.assert_array_equal(after[:, :5], before[:, :5])
    assert np.all(np.any(after[:, 5:] != before[:, 5:], axis=-1))


@pytest.mark.parametrize(("mode", "ends"), [("float", [3, 4, 7, 8]), ("serve", [3, 4, 5, 6, 7, 8])])
def test_the_cache_gives_the_logits_of_the_whole_text(mode: Mode, ends: list[int]) -> None:
    config = tiny_config(model__bias=True)
    variables = served(config) if mode == "serve" else {"params": random_params(config)}
    apply = compiled(config, mode)
    piece, cache = apply(variables, TOKENS[:, : ends[0]], keep_cache=True)
    pieces = [piece]
    for start, stop in itertools.pairwise(ends):
        assert int(cache.length) == start
        piece, cache = apply(variables, TOKENS[:, start:stop], cache=cache)
        pieces.append(piece)
    # In int8, a value on the edge between two codes may fall to either side.
    tolerance = dict(rtol=1e-5, atol=1e-5 if mode == "float" else 0.05)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), logits(config, mode), **tolerance)


def test_the_last_position_can_be_computed_alone() -> None:
    config = tiny_config(model__bias=True)
    last = compiled(config, "float")({"params": random_params(config)}, TOKENS, last_only=True)
    np.testing.assert_allclose(last, logits(config, "float")[:, -1:], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ gradients


def gradients(config: Config, mode: Mode, params: Any) -> dict[str, np.ndarray]:
    model = GPT(config.model, Numerics(config.quant, mode))

    def loss(params: Any) -> jax.Array:
        log_probabilities = jax.nn.log_softmax(model.apply({"params": params}, TOKENS[:, :-1]))
        return -jnp.take_along_axis(log_probabilities, TOKENS[:, 1:, None], axis=-1).mean()

    return {name: np.asarray(value) for name, value in names(quick_jit(jax.grad(loss))(params)).items()}


def test_quantized_training_follows_the_float_gradients() -> None:
    config = tiny_config(model__bias=True)
    exact, straight_through = (gradients(config, mode, random_params(config)) for mode in ("float", "train"))
    for name, expected in exact.items():
        if name.endswith("c_attn/bias"):  # the keys' part has gradient zero: softmax does not see a shift
            continue
        ours = straight_through[name]
        similarity = (ours * expected).sum() / np.linalg.norm(ours) / np.linalg.norm(expected)
        assert similarity > 0.99, name
        assert np.linalg.norm(ours) == pytest.approx(np.linalg.norm(expected), rel=0.1), name
        assert np.any(ours != expected), name


@pytest.mark.parametrize(
    ("quant", "dots", "block"),
    [
        (dict(), 2, 3),
        (dict(quant__arithmetic="integer"), 2, 3),
        (dict(quant__activation_bits=None), 0, 3),
        (dict(quant__mode="none"), 0, 3),
    ],
    ids=["int8", "integer", "weights", "float"],
)
def test_what_is_multiplied_again_in_the_backward_pass(
    quant: dict[str, Any], dots: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `dots` are kept, of int8 products the wide ones, `c_attn` and `c_fc`; of others none."""
    monkeypatch.setattr("picogpt_jax.kernels.int8_product.wants_unsigned_int8", lambda: False)
    config = tiny_config(**quant)
    numerics = Numerics(config.quant, "train" if config.quant.mode == "int8" else "float")
    found = []
    for remat in REMATS:
        model = GPT(config.model, numerics, remat=remat)
        loss = lambda params: model.apply({"params": params}, TOKENS).sum()  # noqa: B023, E731
        program = jax.make_jaxpr(jax.grad(loss))(abstract_params(config))
        found.append(sum(1 for _ in weight_products(program.jaxpr)))
    once = 3 * 5 + numerics.is_integer  # forward, and two gradients; the head's float twin, which is compiled away
    assert found == [once + dots, once + block]


@pytest.mark.parametrize(
    ("mode", "platform", "is_written"), [("train", "tpu", True), ("train", "cuda", False), ("float", "tpu", False)]
)
def test_wide_outputs_are_written_as_matrices_where_that_is_faster(mode: Mode, platform: str, is_written: bool) -> None:
    config = tiny_config()
    model = GPT(config.model, Numerics(config.quant, mode, jnp.dtype("bfloat16")))
    traced = jax.jit(lambda params: model.apply({"params": params}, TOKENS)).trace(abstract_params(config))
    on_cpu, there = (
        str(traced.lower(lowering_platforms=(name,)).as_text()).count("optimization_barrier")
        for name in ("cpu", platform)
    )
    assert there - on_cpu == 2 * is_written * config.model.n_layer  # c_attn and c_fc


def weight_products(jaxpr: Any) -> Iterator[Any]:
    """The products without a batch dimension, those of the backward pass too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and not equation.params["dimension_numbers"][1][0]:
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from weight_products(inner)
