"""The PyTorch runtime: its numerics against their definition in numpy, generation and evaluation."""

import copy
import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_int8_model import random_model

from picogpt_jax.devices import cpu
from picogpt_jax.errors import UserError
from picogpt_jax.formats.sources import load_int8
from picogpt_jax.formats.torch_int8_checkpoint import save_int8_checkpoint
from picogpt_jax.int8.folder import save_int8_model
from picogpt_jax.int8.int8_model import Int8Model, Int8Tensor
from picogpt_jax.runtimes.torch_model import Int8GPT, KVCache


def random_tokens(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(11, (batch, time), generator=torch.Generator().manual_seed(seed))


# A reference that shares nothing with the module: numpy, float64 apart from the quantization, one sequence at a time.


def reference_quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = x.astype(np.float32)
    scale = np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127)
    return np.rint(np.clip(x * (np.float32(1) / scale), -127, 127)).astype(np.int64), scale


def reference_matmul(model: Int8Model, name: str, x: np.ndarray) -> np.ndarray:
    matrix = model.matrices[name]
    if model.quantization.activation_bits is None:
        y = x @ (matrix.codes * matrix.scale.astype(np.float64)).T
    else:
        codes, scale = reference_quantize(x)
        y = (codes @ matrix.codes.astype(np.int64).T) * (scale * matrix.scale.T).astype(np.float64)
    return y + model.vectors.get(f"{name}.bias", 0.0)


def reference_norm(model: Int8Model, name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + model.model.layer_norm_epsilon)
    return y * model.vectors[f"{name}.weight"] + model.vectors.get(f"{name}.bias", 0.0)


REFERENCE_ACTIVATIONS = {
    "gelu": np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


def reference_logits(model: Int8Model, ids: list[int]) -> np.ndarray:
    config, time = model.model, len(ids)
    wte, wpe = (model.matrices[f"transformer.{name}"] for name in ("wte", "wpe"))
    x = (wte.codes * wte.scale)[ids].astype(np.float64) + (wpe.codes * wpe.scale)[:time]
    hidden = np.triu(np.ones((time, time), bool), 1)
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        q, k, v = np.split(
            reference_matmul(model, f"{block}.attn.c_attn", reference_norm(model, f"{block}.ln_1", x)), 3, 1
        )
        heads = []
        for h in np.split(np.arange(config.n_embd), config.n_head):
            scores = np.where(hidden, -np.inf, q[:, h] @ k[:, h].T / math.sqrt(len(h)))
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, h])
        x = x + reference_matmul(model, f"{block}.attn.c_proj", np.concatenate(heads, 1))
        y = reference_matmul(model, f"{block}.mlp.c_fc", reference_norm(model, f"{block}.ln_2", x))
        x = x + reference_matmul(model, f"{block}.mlp.c_proj", REFERENCE_ACTIVATIONS[config.activation](y))
    return reference_matmul(model, "transformer.wte", reference_norm(model, "transformer.ln_f", x))


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"granularity": "per_tensor"},
        {"activation_bits": None},
        {"bias": True},
        {"activation": "gelu_tanh"},
        {"activation": "relu", "mlp_ratio": 4},
        {"layer_norm_epsilon": 0.1, "n_head": 1},
    ],
    ids=str,
)
def test_the_logits_are_those_of_the_definition(variant: dict[str, Any]) -> None:
    """Where float32 and float64 differ, a code may be rounded the other way, which shows in the tokens after it."""
    model, tokens = random_model(**variant), random_tokens(16, 8)
    logits = Int8GPT(model)(tokens).numpy()
    assert logits.dtype == np.float32
    expected = np.stack([reference_logits(model, ids) for ids in tokens.tolist()])
    assert expected.std() > 1
    errors_BT = np.abs(logits - expected).max(-1)
    assert np.median(errors_BT) < 1e-5
    assert errors_BT.max() < 0.5


def test_quantizing_the_activations_matters() -> None:
    """The control of the test above: float activations exceed its bound by far."""
    model = random_model()
    weight_only = dataclasses.replace(model, quantization=dataclasses.replace(model.quantization, activation_bits=None))
    tokens = random_tokens(16, 8)
    errors_BT = (Int8GPT(model)(tokens) - Int8GPT(weight_only)(tokens)).abs().amax(-1)
    assert errors_BT.median() > 1e-2


def test_the_model_in_memory_is_int8_and_the_head_is_tied() -> None:
    model = Int8GPT(random_model())
    assert not list(model.parameters())
    names = [name for name, buffer in model.named_buffers() if buffer.ndim == 2]
    assert {buffer.dtype for name, buffer in model.named_buffers() if name in names} == {torch.int8}
    assert len(names) == 2 * 5 + 2  # the queries' rows of c_attn and the others; no matrix of its own for the head


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, tokens = Int8GPT(random_model()), random_tokens(1, 16)
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 11
    before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:8], after[:8], atol=1e-5, rtol=0)
    assert (before[8:] - after[8:]).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pieces", [[16], [5, 1, 10]])
def test_the_last_logits_alone_are_the_last_of_all(pieces: list[int], bias: bool) -> None:
    model, tokens = Int8GPT(random_model(bias=bias)), random_tokens(3, 16)
    whole, cache = model(tokens), KVCache(model.config, 3, torch.device("cpu"))
    for piece in tokens.split(pieces, dim=1):
        last = model(piece, cache, last_only=True)
        torch.testing.assert_close(last[:, 0], whole[:, cache.length - 1], atol=1e-5, rtol=0)
    if len(pieces) == 1:
        assert torch.equal(model(tokens, last_only=True), last)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_a_model_that_was_used_can_be_copied_and_pickled(activation: str) -> None:
    model, tokens = Int8GPT(random_model(activation=activation)), random_tokens(3, 16)
    logits = model(tokens)
    assert torch.equal(copy.deepcopy(model)(tokens), logits)
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens), logits)


def test_more_positions_than_the_model_has_are_refused() -> None:
    with pytest.raises(ValueError, match="17 positions do not fit into block_size=16"):
        Int8GPT(random_model())(random_tokens(1, 17))


def test_it_loads_both_kinds_of_file(tmp_path: Path) -> None:
    model, tokens = random_model(), random_tokens(1, 16)
    save_int8_model(model, tmp_path / "int8")
    save_int8_checkpoint(model, tmp_path / "model.pt")
    expected = Int8GPT(model)(tokens)
    assert torch.equal(Int8GPT(load_int8(tmp_path / "int8"))(tokens), expected)
    assert torch.equal(Int8GPT(load_int8(tmp_path / "model.pt"))(tokens), expected)


def greedy_without_cache(model: Int8GPT, tokens: torch.Tensor, new: int, overflow: str) -> torch.Tensor:
    """Recomputes the whole window for every token."""
    window = tokens[:, -model.config.block_size :]
    for _ in range(new):
        if window.shape[1] > model.config.block_size:
            keep = model.config.block_size if overflow == "slide" else model.config.block_size // 2
            window = window[:, -keep:]
        token = model(window)[:, -1].argmax(-1, keepdim=True)
        window, tokens = torch.cat((window, token), 1), torch.cat((tokens, token), 1)
    return tokens


@pytest.mark.parametrize("overflow", ["slide", "refill"])
@pytest.mark.parametrize("prompt_length", [1, 5, 16, 21])
def test_cached_greedy_generation_is_that_of_full_recomputation(overflow: Any, prompt_length: int) -> None:
    """With float activations, where the last bit of a sum cannot become a whole step of the grid and another token."""
    model, prompt = Int8GPT(random_model(activation_bits=None)), random_tokens(2, prompt_length)
    found = model.generate(prompt, 40, temperature=0.0, overflow=overflow)
    assert torch.equal(found, greedy_without_cache(model, prompt, 40, overflow))


def test_the_cache_changes_no_logits() -> None:
    model, tokens = Int8GPT(random_model()), random_tokens(16, 16)
    cache = KVCache(model.config, 16, torch.device("cpu"))
    parts = [model(tokens[:, start:end], cache) for start, end in ((0, 3), (3, 9), (9, 10), (10, 16))]
    errors_BT = (torch.cat(parts, 1) - model(tokens)).abs().amax(-1)
    assert errors_BT.median() < 1e-5
    assert errors_BT.max() < 0.5


def test_slide_and_refill_part_only_after_the_block() -> None:
    model, prompt = Int8GPT(random_model()), random_tokens(1, 1)
    slide = model.generate(prompt, 60, temperature=0.0, overflow="slide")
    refill = model.generate(prompt, 60, temperature=0.0, overflow="refill")
    assert torch.equal(slide[:, :17], refill[:, :17])
    assert not torch.equal(slide, refill)


def test_a_seed_fixes_the_draws() -> None:
    model, prompt = Int8GPT(random_model()), random_tokens(3, 4)
    first = model.generate(prompt, 20, temperature=0.9, seed=5)
    assert torch.equal(first, model.generate(prompt, 20, temperature=0.9, seed=5))
    assert not torch.equal(first, model.generate(prompt, 20, temperature=0.9, seed=6))
    assert torch.equal(first[:, :4], prompt)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1 is negative"),
        ({"temperature": -0.5}, "temperature=-0.5 is not a number from 0 to 1e30"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1 is negative"),
        ({"seed": -1}, r"seed=-1 is not in \[0, 2\*\*32\)"),
        ({"tokens_BT": torch.zeros(1, 0, dtype=torch.int64)}, "the prompt has no tokens"),
        ({"tokens_BT": torch.tensor([[3, 11]])}, "the prompt holds the token id 11; the vocabulary has ids 0 to 10"),
        ({"tokens_BT": torch.tensor([[-2]])}, "the prompt holds the token id -2"),
    ],
)
def test_generation_refuses_what_it_cannot_do(setting: dict[str, Any], message: str) -> None:
    arguments = {"tokens_BT": random_tokens(1, 2), "max_new_tokens": 1} | setting
    with pytest.raises(UserError, match=message):
        Int8GPT(random_model()).generate(**arguments)


@pytest.mark.parametrize("length", [2, 16, 17, 18, 33, 100])
def test_evaluation_counts_every_target_once(length: int) -> None:
    """Against a plain loop over windows, one at a time, in float64."""
    model, data = Int8GPT(random_model(activation_bits=None)), random_tokens(1, length)[0].numpy().astype(np.uint16)
    total, count = 0.0, 0
    for start in range(0, length - 1, 16):
        window = torch.from_numpy(data[start : start + 17].astype(np.int64))
        log_probabilities = model(window[None, :-1])[0].double().log_softmax(-1)
        total -= log_probabilities.gather(1, window[1:, None]).sum().item()
        count += len(window) - 1
    assert count == length - 1
    assert model.evaluate(data, 16, batch_size=3) == pytest.approx(total / count, rel=1e-5)


def test_a_uniform_model_loses_log_v_nats_per_token() -> None:
    model = random_model()
    wte = Int8Tensor(np.zeros((11, 32), np.int8), np.ones((11, 1), np.float32))
    uniform = dataclasses.replace(model, matrices=model.matrices | {"transformer.wte": wte})
    assert Int8GPT(uniform).evaluate(random_tokens(1, 50)[0].numpy(), 8) == pytest.approx(math.log(11), rel=1e-6)


@pytest.mark.parametrize(
    ("tokens", "block_size", "message"),
    [
        (np.array([1], np.uint16), 16, r"found uint16 \[1\]; expected at least two token ids"),
        (np.array([1.0, 2.0]), 16, r"found float64 \[2\]"),
        (np.array([1, 2]), 17, "windows of 17 tokens; the model takes 1 to 16"),
        (np.array([1, 2]), 0, "windows of 0 tokens"),
        (np.array([1, 99]), 16, "the data holds the token id 99"),
    ],
)
def test_evaluation_refuses_what_it_cannot_do(tokens: np.ndarray, block_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Int8GPT(random_model()).evaluate(tokens, block_size)


@pytest.mark.parametrize("mlp_ratio", [1, 2])
def test_a_model_of_one_feature_has_the_right_numbers(mlp_ratio: int) -> None:
    """LayerNorm makes 0 of a single feature: what is left are the biases, which the head multiplies."""
    model, tokens = random_model(n_embd=1, n_head=1, bias=True, mlp_ratio=mlp_ratio), random_tokens(4, 8)
    expected = np.stack([reference_logits(model, ids) for ids in tokens.tolist()])
    assert expected.std() > 0.01
    np.testing.assert_allclose(Int8GPT(model)(tokens).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_small_calls_have_one_thread_and_the_callers_number_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, threads = Int8GPT(random_model()), []
    model.ln_f.register_forward_pre_hook(lambda module, inputs: threads.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        model.generate(random_tokens(1, 4), 2)
        monkeypatch.setattr(cpu, "SMALL_CALL", 15 * sum(buffer.nbytes for buffer in model.buffers()))
        for length in (15, 16):
            model(random_tokens(1, length))
            assert torch.get_num_threads() == 3
        with pytest.raises(ValueError, match="17 positions"):
            model(random_tokens(1, 17)[:, :17])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 1, 1, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_same_text_and_has_the_same_loss() -> None:
    model, prompt, data = random_model(activation_bits=None), random_tokens(2, 3), random_tokens(1, 50)[0].numpy()
    on_cpu, on_cuda = Int8GPT(model), Int8GPT(model).to("cuda")
    text = on_cuda.generate(prompt.to("cuda"), 30, seed=5)
    assert text.device.type == "cuda"
    assert torch.equal(text.cpu(), on_cpu.generate(prompt, 30, seed=5))
    assert on_cuda.evaluate(data, 16) == pytest.approx(on_cpu.evaluate(data, 16), rel=1e-5)
