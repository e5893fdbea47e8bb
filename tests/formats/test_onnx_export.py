"""The exported folder, read without our code: onnxruntime, onnx's own interpreter and checker, transformers."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from test_int8_model import random_model
from test_numpy_model import VARIANTS, assert_same_logits, jax_logits, numpy_model, random_tokens
from transformers import AutoConfig, AutoTokenizer

from picogpt_jax.benchmarks.speed import random_int8_model
from picogpt_jax.config import ModelConfig
from picogpt_jax.devices.cpu import has_vnni
from picogpt_jax.errors import UserError
from picogpt_jax.formats import onnx_graph
from picogpt_jax.formats.onnx_export import IR_VERSION, OPSET, onnx_model, save_onnx
from picogpt_jax.formats.onnx_graph import GraphBuilder
from picogpt_jax.int8.folder import file_bytes, save_int8_model
from picogpt_jax.int8.int8_model import Int8Model, config_to_json
from picogpt_jax.runtimes.numpy_model import quantize

Arrays = dict[str, np.ndarray]


def session_of(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def inputs(model: Int8Model, tokens_BT: np.ndarray, past: Arrays | None = None, mask: Any = None) -> Arrays:
    """As Optimum and transformers prepare them: positions count what the mask admits."""
    batch, queries = tokens_BT.shape
    config = model.model
    if past is None:
        empty = np.zeros((batch, config.n_head, 0, config.head_size), np.float32)
        layers = range(config.n_layer)
        past = {f"past_key_values.{layer}.{part}": empty for layer in layers for part in ("key", "value")}
    length = next(iter(past.values())).shape[2]
    mask = np.ones((batch, length + queries), np.int64) if mask is None else np.asarray(mask)
    positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -queries:]
    return {"input_ids": tokens_BT, "attention_mask": mask, "position_ids": positions} | past


def as_past(outputs: Arrays) -> Arrays:
    return {name.replace("present", "past_key_values"): value for name, value in outputs.items() if name != "logits"}


def run(session: onnxruntime.InferenceSession, feeds: Arrays) -> Arrays:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("is_narrow", [True, False], ids=["narrow", "wide"])
def test_the_logits_are_those_of_the_model_that_was_trained(
    variant: dict[str, Any], is_narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_narrow:
        monkeypatch.setattr(onnx_graph, "NARROW", 0)
    model, tokens_BT = random_model(**variant), random_tokens(16, 16)
    outputs = run(session_of(onnx_model(model)), inputs(model, tokens_BT))
    assert_same_logits(outputs["logits"], jax_logits(model, tokens_BT))


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_a_large_vocabulary_is_looked_up_in_int8(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens_BT = random_model(granularity=granularity), random_tokens(2, 16)
    whole = run(session_of(onnx_model(model)), inputs(model, tokens_BT))["logits"]
    monkeypatch.setattr(onnx_graph, "SMALL_TABLE", 4)
    proto = onnx_model(model)
    gathered = {node.input[0] for node in proto.graph.node if node.op_type == "Gather"}
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= gathered
    np.testing.assert_array_equal(run(session_of(proto), inputs(model, tokens_BT))["logits"], whole)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[5]], ids=str)
def test_an_interpreter_of_the_standard_computes_the_same(variant: dict[str, Any]) -> None:
    """onnx's own, in NumPy, operator by operator, without any of ONNX Runtime's fusions."""
    model, tokens_BT = random_model(**variant), random_tokens(2, 9)
    (logits,) = ReferenceEvaluator(onnx_model(model)).run(["logits"], inputs(model, tokens_BT))
    assert_same_logits(logits, numpy_model(model).forward(tokens_BT))


def test_the_signature_is_optimums() -> None:
    model = random_model()
    session = session_of(onnx_model(model))
    parts = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    found = {value.name: (value.type, value.shape) for value in session.get_inputs()}
    total = "past_sequence_length + sequence_length"
    ids = ("tensor(int64)", ["batch_size", "sequence_length"])
    past = ("tensor(float)", ["batch_size", 4, "past_sequence_length", 8])
    expected = {"input_ids": ids, "attention_mask": ("tensor(int64)", ["batch_size", total]), "position_ids": ids}
    assert found == expected | {f"past_key_values.{part}": past for part in parts}
    assert [value.name for value in session.get_outputs()] == ["logits", *(f"present.{part}" for part in parts)]
    assert session.get_outputs()[1].shape == ["batch_size", 4, total, 8]


def test_the_integers_scales_and_product_become_one_node(tmp_path: Path) -> None:
    """And the mask of a full window a constant, where it is as small as here."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(
        onnx_model(random_model()).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    operators = [node.op_type for node in nodes]
    assert operators.count("MatMulIntegerToFloat") == 2 * (3 + 1 + 2) + 1
    assert not {"MatMulInteger", "Trilu"} & set(operators)
    assert operators.count("Mul") == 2 * 4 + 1, "the tokens' scales, each once"


def test_it_needs_no_more_than_the_declared_opset() -> None:
    proto = onnx_model(random_model())
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 23)]
    assert proto.ir_version == 11
    assert {node.domain for node in proto.graph.node} == {""}


def test_decoding_token_by_token_is_the_whole_computation() -> None:
    model, tokens_BT = random_model(activation_bits=None), random_tokens(3, 16)
    session = session_of(onnx_model(model))
    whole = run(session, inputs(model, tokens_BT))["logits"]
    outputs, logits = run(session, inputs(model, tokens_BT[:, :5])), []
    logits.append(outputs["logits"])
    for at in range(5, 16):
        outputs = run(session, inputs(model, tokens_BT[:, at : at + 1], as_past(outputs)))
        logits.append(outputs["logits"])
    np.testing.assert_allclose(np.concatenate(logits, 1), whole, atol=1e-4)


def test_padding_on_the_left_changes_nothing() -> None:
    """A batch of prompts of several lengths, then a step with the cache; each row as if it were alone."""
    model = random_model(activation_bits=None)
    session, reference = session_of(onnx_model(model)), numpy_model(model)
    rows = [random_tokens(1, length, seed=length)[0] for length in (3, 7, 5)]
    padded_BT = np.stack([np.pad(row, (7 - len(row), 0), constant_values=model.vocabulary.size) for row in rows])
    mask_BS = np.stack([np.arange(7) >= 7 - len(row) for row in rows]).astype(np.int64)
    outputs = run(session, inputs(model, padded_BT, mask=mask_BS))
    token_B1 = random_tokens(3, 1, seed=1)
    step = run(session, inputs(model, token_B1, as_past(outputs), np.pad(mask_BS, ((0, 0), (0, 1)), constant_values=1)))
    for index, row in enumerate(rows):
        alone = reference.forward(np.concatenate([row, token_B1[index]])[None])[0]
        np.testing.assert_allclose(outputs["logits"][index, 7 - len(row) :], alone[:-1], atol=1e-4)
        np.testing.assert_allclose(step["logits"][index], alone[-1:], atol=1e-4)
    assert np.isfinite(outputs["logits"]).all()
    assert outputs["logits"].shape[2] == model.vocabulary.size, "what pads is never drawn"
    unmasked = run(session, inputs(model, padded_BT))["logits"]
    assert np.abs(unmasked[0, -1] - outputs["logits"][0, -1]).max() > 1e-2
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="indices element out of"):
        run(session, inputs(model, padded_BT + 1))


def test_nothing_is_said_when_the_file_is_opened(capfd: pytest.CaptureFixture[str]) -> None:
    """An input that is an initializer, say, is a warning at every load."""
    contents = onnx_model(random_model()).SerializeToString()
    onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])
    assert capfd.readouterr() == ("", "")


def test_padding_does_not_count_as_positions() -> None:
    """A row of 5 tokens padded to the 16 that the model sees, and then a sixth: 17 keys."""
    model = random_model(activation_bits=None)
    session, row_1T = session_of(onnx_model(model)), random_tokens(1, 6)
    padded_1T, mask_1S = np.pad(row_1T[:, :5], ((0, 0), (11, 0))), np.arange(17)[None] >= 11
    outputs = run(session, inputs(model, padded_1T, mask=mask_1S[:, :16].astype(np.int64)))
    step = run(session, inputs(model, row_1T[:, 5:], as_past(outputs), mask_1S.astype(np.int64)))
    np.testing.assert_allclose(step["logits"][0, 0], numpy_model(model).forward(row_1T)[0, -1], atol=1e-4)


@pytest.mark.parametrize("keep", [1, 3, 16, 99])
def test_the_last_logits_can_be_had_alone(keep: int) -> None:
    model, tokens_BT = random_model(activation_bits=None), random_tokens(2, 16)
    session = session_of(onnx_model(model))
    whole = run(session, inputs(model, tokens_BT))
    mask_BS = np.ones((2, 16), np.int64)
    mask_BS[1, 3] += keep
    kept = run(session, inputs(model, tokens_BT) | {"attention_mask": mask_BS})
    assert kept["logits"].shape == (2, min(keep, 16), 11)
    np.testing.assert_allclose(kept["logits"], whole["logits"][:, -keep:], atol=1e-4)
    for name in set(whole) - {"logits"}:
        np.testing.assert_allclose(kept[name], whole[name], atol=1e-5, err_msg=name)


def test_the_integers_are_ours() -> None:
    """Codes and scales of awkward activations: ties, zeros, the smallest and the largest."""
    generator = np.random.default_rng(0)
    scales = 10.0 ** generator.uniform(-30, 30, (1, 2000, 1))
    x = (generator.normal(size=(1, 2000, 64)) * scales).astype(np.float32)
    x[0, 0], x[0, 1, 1:], x[0, 2] = 0, 0, [127, *np.arange(63) + 0.5]
    builder = GraphBuilder(random_model(), "int8")
    codes, scale = builder.quantize("x", 64)
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "T"])
    graph = helper.make_graph(
        builder.nodes,
        "quantize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "T", 64]), ids],
        [
            helper.make_tensor_value_info(codes, TensorProto.UINT8, [1, "T", 64]),
            helper.make_tensor_value_info(scale, TensorProto.FLOAT, [1, "T", 1]),
        ],
        list(builder.initializers.values()),
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    feeds = {"x": x, "input_ids": np.zeros((1, 2000), np.int64)}
    found_codes, found_scale = session_of(proto).run(None, feeds)
    expected_codes, expected_scale = quantize(x)
    np.testing.assert_array_equal(found_scale[:, 1:], expected_scale[:, 1:])
    assert found_codes[0, 2].tolist()[:5] == [255, 128, 130, 130, 132]
    differences = np.abs(found_codes.astype(np.int32) - 128 - expected_codes)
    # x / scale and x * (1 / scale) may fall to the two sides of a tie; the codes of the token of zeros are any.
    assert differences[:, 1:].max() <= 1
    assert differences[:, 1:].mean() < 1e-4
    assert found_scale[0, 0] == 0


@pytest.mark.parametrize(
    "variant", [{}, {"granularity": "per_tensor"}, {"activation_bits": None, "bias": True}], ids=str
)
def test_every_code_is_in_the_file_once_and_no_weight_in_float(variant: dict[str, Any]) -> None:
    model = random_model(**variant)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx_model(model).graph.initializer}
    for name, matrix in model.matrices.items():
        is_table, labels = name in ("transformer.wte", "transformer.wpe"), [""]
        if name.endswith("c_attn"):
            labels = [".q", ".k", ".v"]
        parts = [stored.pop(f"{name}.weight{label}") for label in labels]
        found = parts[0] if is_table else np.concatenate(parts, 1).T
        np.testing.assert_array_equal(found, matrix.codes, strict=True)
        scales = [stored.pop(f"{name}.weight_scale{label}") for label in labels]
        is_one = len(matrix.scale) == 1
        np.testing.assert_array_equal(scales[0] if is_one else np.concatenate(scales), matrix.scale[:, 0], strict=True)
    assert max(array.ndim for array in stored.values()) == 1, "no other matrix"
    largest = max(array.size for array in stored.values() if array.dtype != np.int8)
    assert largest <= max(matrix.codes.shape[0] for matrix in model.matrices.values())
    products = [node.op_type for node in onnx_model(model).graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == (6 * 2 + 1 if model.quantization.activation_bits else 0)


def test_the_file_is_hardly_larger_than_the_int8_folder(tmp_path: Path) -> None:
    """Of the default size; of a tiny model the names alone take more."""
    config = ModelConfig(
        n_layer=3, n_head=4, n_embd=192, block_size=128, vocab_size=65, mlp_ratio=2, bias=False, activation="gelu",
        layer_norm_epsilon=1e-5, dropout=0.0,
    )  # fmt: skip
    model = random_int8_model(config)
    save_int8_model(model, tmp_path / "int8")
    save_onnx(model, tmp_path / "onnx")
    assert os.path.getsize(tmp_path / "onnx" / "model.onnx") <= 1.05 * file_bytes(tmp_path / "int8")


def test_the_same_graph_in_float() -> None:
    model, tokens_BT = random_model(activation_bits=None), random_tokens(2, 16)
    proto = onnx_model(model, "float")
    assert not {"MatMulInteger", "QuantizeLinear", "Round"} & {node.op_type for node in proto.graph.node}
    logits = run(session_of(proto), inputs(model, tokens_BT))["logits"]
    np.testing.assert_allclose(logits, numpy_model(model).forward(tokens_BT), atol=1e-4)


def test_transformers_reads_what_lies_beside_the_graph(tmp_path: Path) -> None:
    model = random_model(activation="gelu_tanh", bias=True)
    save_onnx(model, tmp_path / "onnx")
    names = ["config.json", "generation_config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == names
    config = AutoConfig.from_pretrained(tmp_path / "onnx")
    assert (config.model_type, config.n_layer, config.n_inner, config.activation_function) == (
        "gpt2",
        2,
        64,
        "gelu_new",
    )
    ids = AutoTokenizer.from_pretrained(tmp_path / "onnx")("bad\n")["input_ids"]
    assert ids == model.vocabulary.encode("bad\n").tolist()


def test_the_metadata_holds_our_own_files(tmp_path: Path) -> None:
    model = random_model()
    save_onnx(model, tmp_path / "onnx")
    proto = onnx.load(tmp_path / "onnx" / "model.onnx")
    (metadata,) = (json.loads(entry.value) for entry in proto.metadata_props if entry.key == "picogpt_jax")
    expected = {"config": config_to_json(model), "vocabulary": model.vocabulary.to_json(), "weights": "int8"}
    assert metadata == expected


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"onnx is a folder of other files \(thesis.txt\)"):
        save_onnx(random_model(), tmp_path / "onnx")
    assert (tmp_path / "onnx" / "thesis.txt").exists()
    save_onnx(random_model(), tmp_path / "other")
    save_onnx(random_model(seed=1), tmp_path / "other")
