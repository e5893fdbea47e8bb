"""The integer model in ONNX Runtime: the bits of NumPy's logits, for ordinary models and for those at every limit."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from picogpt_jax.config import Granularity, ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.formats import onnx_integer
from picogpt_jax.formats.onnx_export import onnx_model, save_onnx
from picogpt_jax.int8.integer_model import IntegerModel, integer_config_to_json, integer_layout
from picogpt_jax.runtimes import loop
from picogpt_jax.runtimes.numpy_integer import NumpyIntegerGPT
from picogpt_jax.runtimes.onnx_model import OnnxGPT
from picogpt_jax.text.vocabulary import Vocabulary

SMALL: dict[str, Any] = dict(
    n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=11, mlp_ratio=2, bias=False, activation="gelu",
    layer_norm_epsilon=1e-5, dropout=0.0,
)  # fmt: skip
WIDE: dict[str, Any] = dict(n_layer=1, n_head=12, n_embd=768, mlp_ratio=4)
CASES: list[dict[str, Any]] = [
    *({"bias": bias, "activation": name} for bias in (False, True) for name in ("relu", "gelu", "gelu_tanh")),
    {"granularity": "per_tensor"},
    {"granularity": "per_tensor", "bias": True},
    {"kind": "folded"},
    {"kind": "extreme"},
    {"kind": "extreme", "bias": True, "n_head": 1},
    {"kind": "outlier"},
    {"kind": "outlier", "bias": True, "activation": "relu"},
    *({"kind": "wild", "bias": bias, "seed": seed, "activation": name}
      for bias in (False, True) for seed in (1, 2) for name in ("relu", "gelu")),
    {"block_size": 600, "n_layer": 1},
    {"n_embd": 192, "mlp_ratio": 4},
    WIDE,
    {"kind": "extreme", **WIDE, "n_head": 1},
    {"kind": "wild", "bias": True, **WIDE},
]  # fmt: skip


def random_integer_model(
    granularity: Granularity = "per_channel", seed: int = 0, kind: str = "random", **changes: Any
) -> IntegerModel:
    """A small model.

    Args:
        kind: "wild": any exponent and bias that a file may hold; "extreme": all codes +-127; "folded": weights of
            LayerNorms are 1; "outlier": one feature far above all others.
    """
    generator = np.random.default_rng(seed)
    config = ModelConfig(**(SMALL | changes))
    tensors = {}
    for name, (dtype, shape) in integer_layout(config, granularity).items():
        if name.endswith("_exponent"):
            low, high = (-24, 16) if kind == "wild" else (-13, -11) if ".ln_" in name else (-9, -5)
            array = generator.integers(low, high, shape)
        elif dtype == "int8":
            array = generator.choice([-127, 127], shape) if kind == "extreme" else generator.integers(-127, 128, shape)
        elif dtype == "int16":
            array = generator.integers(2048, 4097, shape) * generator.choice([-1, 1, 1], shape)
            array = np.full(shape, 4096) if kind == "folded" else array
        else:
            array = np.clip(generator.normal(size=shape) * (2**22 if kind == "wild" else 600), -(2**22), 2**22)
        tensors[name] = array.astype(dtype)
    if kind == "outlier":
        tensors["transformer.wte.weight_exponent"][...] = 5
        tensors["transformer.wte.weight"][:, 1:] = 0
    vocabulary = Vocabulary(itos=tuple("\nabcdefghijklmnopqrstuvwxyz"[: config.vocab_size]))
    return IntegerModel(
        model=config, weight_granularity=granularity, training={}, vocabulary=vocabulary, tensors=tensors
    )


def by_numpy(model: IntegerModel) -> NumpyIntegerGPT:
    return NumpyIntegerGPT(integer_config_to_json(model), model.tensors)


def by_onnx(model: IntegerModel, threads: int | None = None) -> OnnxGPT:
    return OnnxGPT(onnx_model(model).SerializeToString(), threads)


def random_tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SMALL["vocab_size"], (batch, length))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_logits_are_numpys_bit_for_bit(case: dict[str, Any]) -> None:
    """Of whole windows, in pieces with a cache, and with two threads."""
    model = random_integer_model(**case)
    tokens_BT = random_tokens(3, min(model.model.block_size, 32))
    expected = by_numpy(model).forward(tokens_BT)
    assert len(np.unique(expected)) > 8
    found = by_onnx(model, threads=1)
    np.testing.assert_array_equal(found.forward(tokens_BT), expected, strict=True)
    np.testing.assert_array_equal(found.forward(tokens_BT, last_only=True), expected[:, -1:])
    np.testing.assert_array_equal(by_onnx(model, threads=2).forward(tokens_BT), expected)
    cache = found.new_cache(3)
    ends = itertools.pairwise((0, 5, 6, 7, 10, tokens_BT.shape[1]))
    pieces = [found.forward(tokens_BT[:, first:end], cache) for first, end in ends]
    np.testing.assert_array_equal(np.concatenate(pieces, 1), expected)


def test_a_large_vocabulary_is_looked_up_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_integer, "SMALL_TABLE", 4)
    for granularity in ("per_channel", "per_tensor"):
        model, tokens_BT = random_integer_model(granularity), random_tokens(2, 16)
        np.testing.assert_array_equal(by_onnx(model).forward(tokens_BT), by_numpy(model).forward(tokens_BT))


def feeds(model: IntegerModel, tokens_BT: np.ndarray, mask_BS: np.ndarray, past: dict[str, Any] | None = None) -> Any:
    """As transformers prepares them: positions count what the mask admits."""
    config, batch = model.model, len(tokens_BT)
    if past is None:
        sizes = {"key": ("i1", config.head_size), "key_scale": ("f4", config.head_size)}  # as Optimum begins
        sizes |= {name.replace("key", "value"): size for name, size in sizes.items()}
        past = {
            f"past_key_values.{layer}.{name}": np.zeros((batch, config.n_head, 0, size), dtype)
            for layer in range(config.n_layer)
            for name, (dtype, size) in sizes.items()
        }
    positions_BT = np.maximum(mask_BS.cumsum(-1) - 1, 0)[:, -tokens_BT.shape[1] :]
    return {"input_ids": tokens_BT, "attention_mask": mask_BS, "position_ids": positions_BT} | past


class GatherElements(OpRun):
    """onnx's own takes tables of 64 entries at most."""

    op_domain = ""

    def _run(self, table: np.ndarray, index: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:
        return (np.take_along_axis(table, index, axis or 0),)


def test_an_interpreter_of_the_standard_computes_the_same() -> None:
    """onnx's own, in NumPy, operator by operator, without any of ONNX Runtime's fusions."""
    for case in ({}, {"bias": True, "kind": "wild"}, {"mlp_ratio": 64}):
        model, tokens_BT = random_integer_model(**case), random_tokens(2, 9)
        evaluator = ReferenceEvaluator(onnx_model(model), new_ops=[GatherElements])
        (logits,) = evaluator.run(["logits"], feeds(model, tokens_BT, np.ones_like(tokens_BT)))
        np.testing.assert_array_equal(logits, by_numpy(model).forward(tokens_BT))


def test_padding_on_the_left_changes_no_bit() -> None:
    """A batch of prompts of several lengths, then a step with the cache; each row as if it were alone."""
    model = random_integer_model()
    session, reference = by_onnx(model)._session.onnx, by_numpy(model)
    names = [output.name for output in session.get_outputs()]
    rows = [random_tokens(1, length, seed=length)[0] for length in (3, 7, 5)]
    padded_BT = np.stack([np.pad(row, (7 - len(row), 0), constant_values=model.vocabulary.size) for row in rows])
    mask_BS = np.stack([np.arange(7) >= 7 - len(row) for row in rows]).astype(np.int64)
    outputs = dict(zip(names, session.run(None, feeds(model, padded_BT, mask_BS)), strict=True))
    token_B1 = random_tokens(3, 1, seed=1)
    past = {name.replace("present", "past_key_values"): value for name, value in outputs.items() if name != "logits"}
    longer_BS = np.pad(mask_BS, ((0, 0), (0, 1)), constant_values=1)
    (step,) = session.run(["logits"], feeds(model, token_B1, longer_BS, past))
    for index, row in enumerate(rows):
        alone = reference.forward(np.concatenate([row, token_B1[index]])[None])[0]
        np.testing.assert_array_equal(outputs["logits"][index, 7 - len(row) :], alone[:-1])
        np.testing.assert_array_equal(step[index], alone[-1:])
    assert np.isfinite(outputs["logits"]).all()


def test_no_float64_and_no_operator_beyond_the_standard() -> None:
    proto = onnx_model(random_integer_model(bias=True))
    assert {node.domain for node in proto.graph.node} == {""}
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    types = {value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    types |= {tensor.data_type for tensor in proto.graph.initializer}
    assert TensorProto.FLOAT in types
    assert not types & {TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}


def test_every_code_is_in_the_file_once() -> None:
    model = random_integer_model()
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx_model(model).graph.initializer}
    matrices = {name for name, array in stored.items() if array.ndim >= 2}
    assert matrices == {f"{name}.weight" for name in model.model.matrix_shapes()}
    for name in matrices:
        codes = model.tensors[name]
        expected = codes if name.startswith(("transformer.wte", "transformer.wpe")) else codes.T
        np.testing.assert_array_equal(stored[name], expected, strict=True)


def test_the_folder_is_read_back_and_draws_numpys_text(tmp_path: Path) -> None:
    model = random_integer_model()
    save_onnx(model, tmp_path / "onnx")
    loaded = OnnxGPT.load(tmp_path / "onnx")
    assert (loaded.config, loaded.vocabulary) == (model.model, model.vocabulary)
    for overflow in ("slide", "refill"):
        settings: dict[str, Any] = dict(max_new_tokens=30, temperature=0.8, seed=3, overflow=overflow)
        texts = [loop.generate(runtime, random_tokens(2, 4), **settings) for runtime in (loaded, by_numpy(model))]
        np.testing.assert_array_equal(*texts)
    other = dataclasses.replace(model, model=dataclasses.replace(model.model, n_layer=1), tensors={
        name: array for name, array in model.tensors.items() if ".h.1." not in name
    })  # fmt: skip
    save_onnx(other, tmp_path / "onnx")
    assert OnnxGPT.load(tmp_path / "onnx").config.n_layer == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"folder of other files \(thesis.txt\)"):
        save_onnx(model, tmp_path / "mine")


def test_powers_of_two_are_those_of_the_specification() -> None:
    """Every value that `fit` and `below` may meet, and every square root."""
    a = np.arange(2**23 + 1, dtype=np.float32)
    bits = np.frexp(a)[1]
    q = a * np.float32(2**23 + 1)
    np.testing.assert_array_equal(q - q * np.float32(1 - 2.0**-24), np.where(a > 0, np.exp2(bits - 1.0), 0))
    t = np.maximum(bits - 7, 0)
    t += np.floor(np.ldexp(a, -t) + 0.5) == 128
    q = a * np.float32(float(np.float32(256 / 255)) * (2**23 + 1) / 64)
    np.testing.assert_array_equal(np.maximum(q - q * np.float32(1 - 2.0**-24), 1), np.exp2(t))
