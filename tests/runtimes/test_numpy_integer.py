"""The specification's own program, and the example that it is checked with by hand."""

import dataclasses
import math

import numpy as np
import pytest
from conftest import ROOT

from picogpt_jax.config import ModelConfig
from picogpt_jax.runtimes import numpy_integer
from picogpt_jax.runtimes.numpy_integer import NumpyIntegerGPT

SIZES = dict(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=5, mlp_ratio=2)
MATRICES = ("wte", "wpe", "h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj")
IDS = np.array([[0, 3, 1, 4]])


@pytest.fixture(scope="module")
def example() -> NumpyIntegerGPT:
    """The model of "A worked example"."""
    config = ModelConfig(**SIZES, bias=False, activation="gelu", layer_norm_epsilon=1e-5, dropout=0.0)  # type: ignore[arg-type]
    tensors = {}
    for number, name in enumerate(f"transformer.{module}" for module in MATRICES):
        shape = config.matrix_shapes()[name]
        row, column = np.indices(shape)
        codes = (101 * number + 37 * row + 59 * column + 13 * row * column) % 255 - 127
        tensors[f"{name}.weight"] = codes.astype(np.int8)
        tensors[f"{name}.weight_exponent"] = (-8 - np.arange(shape[0]) % 2)[:, None].astype(np.int8)
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        tensors[f"transformer.{name}.weight"] = (4096 - 100 * np.arange(8)).astype(np.int16)
        tensors[f"transformer.{name}.weight_exponent"] = np.array([-12], np.int8)
    described = {"format": "picogpt-int8", "format_version": 2, "arithmetic": "integer"}
    quantization = {"weight_granularity": "per_channel"}
    return NumpyIntegerGPT(described | {"model": dataclasses.asdict(config), "quantization": quantization}, tensors)


def test_the_worked_example_is_what_is_computed(example: NumpyIntegerGPT) -> None:
    """Every row of its table, which a reader checks a program of his own with."""
    block = example.blocks[0]
    x = example.wte.lookup(IDS) + example.wpe.lookup(np.arange(4))
    codes, exponent = block["ln_1"](x)
    heads = block["attn.c_attn"](codes, exponent, 12).reshape(1, 4, 3, 2, 4).transpose(2, 0, 3, 1, 4)
    q, k, v = (numpy_integer.quantize(part) for part in heads)
    attended, t = numpy_integer.attention(q, k, v, 4)
    after = x + block["attn.c_proj"](attended.reshape(1, 4, 8), t, 10)
    g = numpy_integer.gelu(block["mlp.c_fc"](*block["ln_2"](after), 8))
    hidden, t_hidden = numpy_integer.quantize(g)
    rows = {
        "x": x[0, 3],
        f"codes of `norm(x, ln_1)`, exponent {exponent[0, 3, 0]}": codes[0, 3],
        "queries, from `c_attn`": heads[0, 0, :, 3],
        f"their codes, tq = {q[1][0, 0, 3, 0]} in both heads": q[0][0, :, 3],
        f"codes of attention, exponent {t[0, 3, 0]}": attended[0, 3],
        "x after attention": after[0, 3],
        "g": g[0, 3],
        f"their codes, t = {t_hidden[0, 3, 0]}": hidden[0, 3],
        "logits": (example.forward(IDS)[0, 3] * 1024).astype(int),
    }
    page = (ROOT / "picogpt_jax" / "int8" / "README.md").read_text(encoding="utf-8")
    for what, integers in rows.items():
        assert f"| {what} | {', '.join(map(str, integers.ravel()))} |" in page


def test_a_cache_changes_nothing(example: NumpyIntegerGPT) -> None:
    whole, cache = example.forward(IDS), example.new_cache(1)
    pieces = [example.forward(IDS[:, start:end], cache) for start, end in ((0, 2), (2, 3), (3, 4))]
    np.testing.assert_array_equal(np.concatenate(pieces, 1), whole)
    assert cache.layers[0][0].dtype == np.int8
    assert (example.forward(IDS, last_only=True) == whole[:, -1:]).all()


@pytest.mark.parametrize("s", [1, 2, 8, 30, 31])
def test_a_shift_rounds_halves_up(s: int) -> None:
    x = np.array([-(1 << 23), -3, -2, -1, 0, 1, 2, 3, 1 << 23])
    expected = [(int(value) + (1 << (s - 1))) >> s for value in x]
    assert numpy_integer.shift(x.astype(np.int32), s).tolist() == expected


def test_gelu_is_accurate() -> None:
    u = np.arange(-3000, 3001, dtype=np.int32)
    exact = np.array([x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in u / 256])
    np.testing.assert_allclose(numpy_integer.gelu(u), 1024 * exact, rtol=0, atol=1.4)
    assert numpy_integer.gelu(np.array([-(1 << 22), -1024, 1024, 1 << 22], np.int32)).tolist() == [0, 0, 4096, 131068]
