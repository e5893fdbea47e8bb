import functools
import itertools
import types
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_int8_model import random_model
from tiny import quick_compilation

from picogpt_jax.config import MeshConfig
from picogpt_jax.devices.setup import compiler_options
from picogpt_jax.devices.sharding import batch_sharding, make_mesh
from picogpt_jax.errors import UserError
from picogpt_jax.int8.convert import FLOAT, params_from_arrays, serving_quant, serving_variables
from picogpt_jax.model.gpt import GPT, KVCache
from picogpt_jax.model.numerics import Numerics
from picogpt_jax.runtimes import jax_generator as generate_module
from picogpt_jax.runtimes import loop
from picogpt_jax.runtimes.engine import Overflow, Sampling
from picogpt_jax.runtimes.jax_generator import TOKENS_PER_DISPATCH, Generator
from picogpt_jax.runtimes.torch_model import Int8GPT

BLOCK = 16
VOCAB_SIZE = 11
STREAMS = 4
GREEDY_SEED = 19  # a prompt whose greedy text no nearly equal logits decide
Kind = Literal["float", "int8"]

# How far a cached computation may be from a whole one. In int8, a value on the edge between two codes may fall to
# either side; the likeliest token leads the second by about 1.
TOLERANCE = {"float": 1e-4, "int8": 0.1}

kinds = pytest.mark.parametrize("kind", ["float", "int8"])
overflows = pytest.mark.parametrize("overflow", ["slide", "refill"])


MODEL = random_model(n_layer=2, block_size=BLOCK, vocab_size=VOCAB_SIZE)


@functools.cache
def float_params() -> Any:
    """The same weights, in float."""
    arrays = {f"{name}.weight": tensor.dequantize() for name, tensor in MODEL.matrices.items()}
    return params_from_arrays(MODEL.model, arrays | MODEL.vectors)


@functools.cache
def generator(kind: Kind) -> Generator:
    return Generator.from_int8(MODEL) if kind == "int8" else Generator.from_params(MODEL.model, float_params())


def prompts(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, (rows, length))


@functools.cache
def whole_pass(kind: Kind) -> Any:
    """tokens int32 [1, BLOCK] -> logits [1, BLOCK, V], without a cache."""
    if kind == "int8":
        network, variables = GPT(MODEL.model, Numerics(serving_quant(MODEL), "serve")), serving_variables(MODEL)
    else:
        network, variables = GPT(MODEL.model, Numerics(FLOAT, "float")), {"params": float_params()}
    return jax.jit(functools.partial(network.apply, variables), compiler_options=compiler_options())


def logits_of(kind: Kind, window: np.ndarray) -> np.ndarray:
    """Logits of the token that follows `window`, int [T], T <= BLOCK."""
    padded = np.pad(window, (0, BLOCK - len(window)))[None].astype(np.int32)  # what comes later changes nothing
    return np.asarray(whole_pass(kind)(padded))[0, len(window) - 1]


def windows(text: np.ndarray, prompt_length: int, overflow: Overflow) -> list[np.ndarray]:
    """What the model sees when it draws each token after the prompt; the definition of both ways to go on."""
    seen = []
    start = max(prompt_length - BLOCK, 0)
    for at in range(prompt_length, len(text)):
        if at - start > BLOCK:
            start = at - (BLOCK if overflow == "slide" else BLOCK // 2)
        seen.append(text[start:at])
    return seen


def predictions(kind: Kind, text: np.ndarray, prompt_length: int, overflow: Overflow) -> list[tuple[np.ndarray, int]]:
    """For every token after the prompt: the logits [V] of a full recomputation, and the token."""
    seen = windows(text, prompt_length, overflow)
    return [(logits_of(kind, window), int(token)) for window, token in zip(seen, text[prompt_length:], strict=True)]


# ------------------------------------------------------------------------------- the cache against a whole computation


@kinds
@overflows
@pytest.mark.parametrize("prompt_length", [1, 5, BLOCK, BLOCK + 4])
def test_every_greedy_token_is_the_likeliest_of_a_full_recomputation(
    kind: Kind, overflow: Overflow, prompt_length: int
) -> None:
    prompt = prompts(1, prompt_length, seed=prompt_length)
    (text,) = generator(kind).generate(prompt, 3 * BLOCK, temperature=0.0, overflow=overflow)
    np.testing.assert_array_equal(text[:prompt_length], prompt[0])
    assert len(text) == prompt_length + 3 * BLOCK
    behind = [logits.max() - logits[token] for logits, token in predictions(kind, text, prompt_length, overflow)]
    assert max(behind) <= TOLERANCE[kind]
    assert len(set(text[prompt_length:].tolist())) > 1, "a text of one token would prove little"


def test_the_two_ways_past_the_block_see_different_windows() -> None:
    """A control: the text of one is not what the other would have drawn."""
    (text,) = generator("float").generate(prompts(1, 5, seed=5), 3 * BLOCK, temperature=0.0, overflow="refill")
    slid = [logits.argmax() == token for logits, token in predictions("float", text, 5, "slide")]
    assert all(slid[: BLOCK - 4]), "up to the block, and one token on, they are the same"
    assert not all(slid)


@overflows
def test_pytorch_writes_the_same_greedy_text(overflow: Overflow) -> None:
    prompt = prompts(1, 4, seed=GREEDY_SEED)
    ours = generator("int8").generate(prompt, 3 * BLOCK, temperature=0.0, overflow=overflow)
    for logits, _ in predictions("int8", ours[0], 4, overflow):
        second, first = np.sort(logits)[-2:]
        assert first - second > TOLERANCE["int8"], "two tokens are nearly tied: choose another GREEDY_SEED"
    theirs = Int8GPT(MODEL).generate(torch.from_numpy(prompt), 3 * BLOCK, temperature=0.0, overflow=overflow)
    np.testing.assert_array_equal(ours, theirs.numpy())


# ------------------------------------------------------------------------------------------------------ several streams


def test_each_stream_is_continued_by_itself() -> None:
    batch = prompts(STREAMS, 6)
    write = functools.partial(generator("float").generate, max_new_tokens=2 * BLOCK, temperature=0.0)
    for row, alone in zip(write(batch), batch, strict=True):
        np.testing.assert_array_equal(row[None], write(alone[None]))


def test_a_seed_fixes_the_text_and_each_stream_has_its_own() -> None:
    batch = np.tile(prompts(1, 6), (STREAMS, 1))
    draw = functools.partial(generator("float").generate, batch, 2 * BLOCK, overflow="refill")
    text = draw(seed=1)
    np.testing.assert_array_equal(draw(seed=1), text)
    assert not np.array_equal(draw(seed=2), text)
    for one, other in itertools.combinations(text, 2):
        assert not np.array_equal(one, other)


def test_the_number_of_devices_does_not_change_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = jax.local_devices()
    assert len(devices) >= STREAMS, "each has a device of its own"
    draw = functools.partial(generator("float").generate, prompts(STREAMS, 6), BLOCK - 6)
    text = draw()
    monkeypatch.setattr(jax, "local_devices", lambda: devices[:1])
    np.testing.assert_array_equal(draw(), text)


@pytest.mark.parametrize(
    ("in_cache", "fewest", "turns"),
    [(6, 1, [12]), (5, 1, [6, 6]), (2, 1, [4, 4, 4]), (2, 3, [12])],
    ids=["all fit", "two turns", "three turns", "too few in a turn"],
)
def test_streams_that_take_turns_write_the_same_text(
    in_cache: int, fewest: int, turns: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve streams on two devices, whose caches hold the keys and values of `in_cache` each."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
    generate = functools.partial(generator("int8").generate, prompts(12, 6), 2 * BLOCK, overflow="refill", seed=5)
    text = generate()
    config = MODEL.model
    monkeypatch.setattr(generate_module, "TURN_BYTES", in_cache * 2 * config.n_layer * BLOCK * config.n_embd * 4)
    monkeypatch.setattr(generate_module, "TURN_STREAMS", fewest)
    filled: list[int] = []
    fill = Generator._fill

    def spy(self: Generator, variables: Any, rows: np.ndarray, *settings: Any) -> Any:
        filled.append(len(rows))
        return fill(self, variables, rows, *settings)

    monkeypatch.setattr(Generator, "_fill", spy)
    np.testing.assert_array_equal(generate(), text)
    assert filled == turns
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=1), 12, jax.devices()[:2])
    Generator.from_int8(MODEL, mesh).generate(prompts(12, 6), 1)
    assert filled == [*turns, 12], "a mesh that is given is for models larger than a cache"


# ------------------------------------------------------------------------------------------------------------ streaming


@pytest.mark.parametrize("sizes", [(1, 1, 4), (1, 2, 2)])
def test_a_mesh_splits_the_model_and_writes_the_same_text(sizes: tuple[int, int, int]) -> None:
    """Codes, scales and the KV cache: each device holds its share of their bytes."""
    data, fsdp, tensor = sizes
    model = random_model(n_layer=2, n_head=4, n_embd=32, block_size=BLOCK, vocab_size=12)
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), STREAMS, jax.devices()[:4])
    split = Generator.from_int8(model, mesh)
    codes = split._variables[1]["int8"]
    for path, divisor in {
        ("wte", "embedding"): fsdp * tensor,
        ("wpe", "embedding"): fsdp,
        ("h_0", "attn", "c_attn", "kernel"): fsdp * tensor,
        ("h_1", "mlp", "c_proj", "kernel"): fsdp * tensor,
    }.items():
        weight = functools.reduce(lambda tree, key: tree[key], path, codes)
        assert {shard.data.nbytes for shard in weight.codes.addressable_shards} == {weight.codes.nbytes // divisor}
    scale = codes["h_0"]["attn"]["c_attn"]["kernel"].scale
    assert scale.addressable_shards[0].data.shape == (96 // tensor, 1)
    tokens = jax.device_put(jnp.zeros((STREAMS, 8), jnp.int32), batch_sharding(mesh))
    cache = split._prefill(split._variables[1], tokens, jnp.int32(8)).cache
    assert {array.addressable_shards[0].data.shape for array in jax.tree.leaves(cache.layers)} == {
        (STREAMS // (data * fsdp), 4 // tensor, BLOCK, 8)
    }
    prompt = np.random.default_rng(0).integers(0, 12, (STREAMS, 3))
    options: dict[str, Any] = dict(temperature=0.8, seed=3, overflow="refill")
    one = Generator.from_int8(model).generate(prompt, BLOCK, **options)
    np.testing.assert_array_equal(split.generate(prompt, BLOCK, **options), one)


def test_a_vocabulary_that_does_not_divide_is_whole_on_every_device() -> None:
    """It was padded in training, where this is needed, and no longer is."""
    model = random_model(vocab_size=11)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=4), 1, jax.devices()[:4])
    split, prompt = Generator.from_int8(model, mesh), np.array([[1, 2, 3]])
    codes = split._variables[1]["int8"]["wte"]["embedding"].codes
    assert {shard.data.shape for shard in codes.addressable_shards} == {(11, 32)}
    one = Generator.from_int8(model).generate(prompt, 12, seed=3)
    np.testing.assert_array_equal(split.generate(prompt, 12, seed=3), one)


def test_a_mesh_that_does_not_divide_the_model_or_the_streams_says_so() -> None:
    meshes = [make_mesh(MeshConfig(data=1, fsdp=2, tensor=t), 2, jax.devices()[: 2 * t]) for t in (1, 4)]
    with pytest.raises(UserError, match=r"3 streams do not divide over mesh\.data \* mesh\.fsdp = 2"):
        Generator.from_int8(MODEL, meshes[0]).generate(prompts(3, 2), 1)
    model = random_model(n_head=2, vocab_size=12)
    with pytest.raises(UserError, match=r"attention heads .* of size 2, .* change mesh\.tensor or model\.n_head"):
        Generator.from_int8(model, meshes[1])


@overflows
def test_the_pieces_are_the_text_whatever_its_length(overflow: Overflow) -> None:
    """The draws depend on the position alone, so a shorter text is the beginning of a longer one."""
    count = 2 * TOKENS_PER_DISPATCH
    generate = functools.partial(generator("float").generate, prompts(1, 3), overflow=overflow)
    text = generate(count)
    pieces = list(generator("float").pieces(prompts(1, 3), Sampling(count, overflow=overflow)))
    assert text.dtype == np.int32
    assert text.shape == (1, 3 + count)
    assert 0 <= text.min() <= text.max() < VOCAB_SIZE
    assert len(pieces) > 2
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), text[:, 3:])
    np.testing.assert_array_equal(generate(count - 50), text[:, :-50])


def test_no_new_tokens_leave_the_prompt() -> None:
    prompt = prompts(1, BLOCK + 4)
    np.testing.assert_array_equal(generator("float").generate(prompt, 0), prompt)


# -------------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize(("overflow", "prompt_length"), [("slide", BLOCK), ("refill", 6)])
def test_the_likeliest_of_one_is_the_likeliest(overflow: Overflow, prompt_length: int) -> None:
    generate = functools.partial(generator("float").generate, prompts(1, prompt_length), 2 * BLOCK, overflow=overflow)
    greedy = generate(temperature=0.0)
    np.testing.assert_array_equal(generate(temperature=1.0, top_k=1, seed=3), greedy)
    assert not np.array_equal(generate(temperature=1.0, seed=3), greedy)


def test_a_wide_top_k_is_none() -> None:
    generate = functools.partial(generator("float").generate, prompts(1, 6), 8, seed=3)
    for top_k in (0, VOCAB_SIZE, VOCAB_SIZE + 1):
        np.testing.assert_array_equal(generate(top_k=top_k), generate(top_k=None))


@overflows
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.8, "seed": 3}, {"top_k": 3}])
def test_the_loop_of_the_other_runtimes_draws_the_same_text(overflow: Overflow, options: dict[str, Any]) -> None:
    """Where their logits agree: here they are one table's of the last token alone."""
    table_VV = np.random.default_rng(0).normal(0, 2, (VOCAB_SIZE, VOCAB_SIZE)).astype(np.float32)

    class Bigrams:
        """A model and a runtime that looks its logits up."""

        windows_at_once, block_size, vocab_size = 1, BLOCK, VOCAB_SIZE

        def new_cache(self, batch: int) -> Any:
            return types.SimpleNamespace(length=0)

        def forward(self, tokens_BT: np.ndarray, cache: Any = None, last_only: bool = False) -> np.ndarray:
            if cache is not None:
                cache.length += tokens_BT.shape[1]
            return table_VV[tokens_BT[:, -1:] if last_only else tokens_BT]

    def apply(self: Any, variables: Any, tokens: Any, cache: Any = None, **options: Any) -> Any:
        logits = jnp.asarray(table_VV)[tokens[:, -1:] if options.get("last_only") else tokens]
        length = jnp.int32(tokens.shape[1]) + (0 if cache is None else cache.length)
        return (logits, KVCache((), length)) if cache is not None or options.get("keep_cache") else logits

    streams = prompts(STREAMS, 6)
    with pytest.MonkeyPatch.context() as patch, quick_compilation():
        patch.setattr(Generator, "_apply", apply)
        found = Generator.from_params(MODEL.model, {}).generate(streams, 5 * BLOCK, overflow=overflow, **options)
    expected = loop.generate(Bigrams(), streams, 5 * BLOCK, overflow=overflow, **options)
    np.testing.assert_array_equal(found, expected)


# --------------------------------------------------------------------------------------------------------- the mistakes


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="the prompt has no tokens; at least one is needed"):
        generator("float").generate(np.zeros((1, 0), np.int32), 5)


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=rf"the prompt holds the token id {VOCAB_SIZE}; the vocabulary has ids 0 to"):
        generator("float").generate(np.array([[1, VOCAB_SIZE]]), 5)


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_a_temperature_is_a_number_from_zero_up(temperature: float) -> None:
    with pytest.raises(UserError, match=r"temperature=.* is not a number from 0 to 1e30"):
        generator("float").generate(prompts(1, 3), 5, temperature=temperature)
