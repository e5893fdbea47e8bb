"""The benchmark: turns, ratios, the report, and that PyTorch's side computes what it is said to; no timings."""

import dataclasses
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RunScript
from tiny import tiny_config
from torch.ao.quantization import FakeQuantizeBase

from picogpt_jax.benchmarks import serving, speed
from picogpt_jax.benchmarks.report import Comparison, Timing, format_report, take_turns
from picogpt_jax.benchmarks.speed import JaxTraining, random_int8_model
from picogpt_jax.benchmarks.torch_baseline import (
    GPT,
    Decoding,
    Training,
    dequantized,
    dequantizing,
    device_like,
    prepare_qat,
)
from picogpt_jax.config import Arithmetic, Config, ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.int8.int8_model import Int8Model, Quantization, requantize_per_tensor
from picogpt_jax.runtimes.torch_model import Int8GPT
from picogpt_jax.text.batches import Tokens


def model_config(**changes: object) -> ModelConfig:
    return dataclasses.replace(tiny_config().model, n_layer=2, **changes)


def repeated_tokens() -> Tokens:
    return Tokens(ids=np.tile(np.arange(11, dtype=np.uint16), 20), path=Path("repeated"))


def test_contenders_take_turns_and_the_first_turn_stands_apart() -> None:
    order: list[str] = []
    timings = take_turns({name: lambda name=name: order.append(name) for name in "ABC"}, rounds=2)
    assert "".join(order) == 3 * "ABC"
    assert {name: len(timing.rounds) for name, timing in timings.items()} == {"A": 2, "B": 2, "C": 2}


def test_a_ratio_leaves_the_first_turn_out() -> None:
    timings = {"slow": Timing(100.0, [6.0, 9.0, 4.0]), "fast": Timing(50.0, [1.0, 2.0, 8.0])}
    result = Comparison("slow", "fast", ">= 3.0", ">= 4.0").result(timings)
    assert (result["of_medians"], result["of_minima"]) == (6.0 / 2.0, 4.0 / 1.0)
    assert (result["target"], result["goal"]) == (">= 3.0", ">= 4.0")


def test_a_known_peak_gives_an_mfu_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "model_flops_utilization", lambda flops, kind, devices: flops / (1000.0 * devices))
    figures = {"JAX QAT": {"flops_per_second": 600.0}, "PyTorch QAT": {"flops_per_second": 600.0}}
    speed._add_shares(figures, list(figures), devices=2)
    assert figures == {"JAX QAT": {"flops_per_second": 600.0, "mfu": 0.3}, "PyTorch QAT": {"flops_per_second": 600.0}}


@pytest.mark.parametrize("arithmetic", ["integer", "mixed", None])
def test_every_turn_of_ours_goes_on_training_in_its_own_mode(arithmetic: Arithmetic | None) -> None:
    config = tiny_config(quant__mode="none", quant__start_step=4)
    training = JaxTraining(config, arithmetic, repeated_tokens())
    assert training.mode == ("train" if arithmetic else "float")
    assert arithmetic is None or training.trainer.config.quant.arithmetic == arithmetic
    first = training()
    for _ in range(15):
        last = training()
    assert int(training.state.step) == training.step == 32
    assert last < first < 1.2 * math.log(11)


@pytest.mark.parametrize("quantized", [False, True])
def test_every_turn_of_pytorch_goes_on_training(quantized: bool) -> None:
    training = Training(tiny_config(), quantized, repeated_tokens(), "float32", "cpu")
    first = training()
    for _ in range(15):
        last = training()
    assert last < first < 1.2 * math.log(11)


@pytest.mark.parametrize(("quantized", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_pytorch_trains_in_the_compute_type_where_it_can(quantized: bool, dtype: torch.dtype) -> None:
    training = Training(tiny_config(), quantized, repeated_tokens(), "bfloat16", "cpu")
    seen = set()
    training.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    training()
    assert seen == {dtype}


@pytest.mark.parametrize("bias", [False, True])
def test_the_baseline_has_the_parameters_of_the_model(bias: bool) -> None:
    config = model_config(bias=bias)
    assert sum(parameter.numel() for parameter in GPT(config).parameters()) == config.n_parameters


def test_qat_fakes_every_linear_layer_and_nothing_else() -> None:
    model = prepare_qat(GPT(model_config()))
    faked = [name.rpartition(".")[0] for name, module in model.named_modules() if isinstance(module, FakeQuantizeBase)]
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(faked) == sorted(2 * linear)  # the weights of each, and its output
    assert len(linear) == 4 * 2 + 1
    assert model.lm_head.weight is model.transformer["wte"].weight


@pytest.mark.parametrize("changes", [{}, {"bias": True, "activation": "relu"}])
def test_the_dequantizing_model_is_the_int8_model_with_float_activations(changes: dict[str, object]) -> None:
    model = varied(random_int8_model(model_config(**changes)))
    weight_only = Quantization(weight_granularity="per_tensor", activation_bits=None)
    reference = Int8GPT(dataclasses.replace(requantize_per_tensor(model), quantization=weight_only))
    tokens = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = dequantizing(model)(tokens)
        torch.testing.assert_close(logits, reference(tokens)[:, -1], rtol=1e-4, atol=1e-5)
    assert logits.std() > 0.01


def varied(model: Int8Model) -> Int8Model:
    """Other vectors and one scale for each row, so that a mix-up changes the logits."""
    generator = np.random.default_rng(1)
    vectors = {
        name: vector + generator.normal(0, 0.1, vector.shape).astype(np.float32)
        for name, vector in model.vectors.items()
    }
    matrices = {
        name: dataclasses.replace(
            matrix, scale=matrix.scale * generator.uniform(5, 15, matrix.scale.shape).astype(np.float32)
        )
        for name, matrix in model.matrices.items()
    }
    return dataclasses.replace(model, vectors=vectors, matrices=matrices)


def test_decoding_goes_beyond_the_window() -> None:
    model = random_int8_model(model_config())
    ids = Decoding(model, 20, 0.8, "cpu", torch.get_num_threads())()
    assert len(ids) == 21
    assert ids[0] == 0
    assert all(0 <= token < model.model.vocab_size for token in ids)


def test_a_device_that_pytorch_cannot_use_is_refused() -> None:
    assert device_like("cpu") == "cpu"
    with pytest.raises(UserError, match=r"JAX runs on a tpu, which this PyTorch cannot use; .* --notorch"):
        device_like("tpu")


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """The number of threads after the test is that before it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("torch_threads")
def test_decode_reports_every_way_of_generating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "STREAMS", 2)
    model = random_int8_model(tiny_config().model)
    report = speed.benchmark_decoding(model, new_tokens=9, slide_tokens=9, rounds=1, with_torch=True)
    drawn = {"refill, 1 stream": 9, "refill, 2 streams": 18, "slide, 1 stream": 9}
    drawn = {f"JAX {arithmetic} {what}": count for what, count in drawn.items() for arithmetic in speed.ARITHMETICS}
    pytorch = ["PyTorch slide, 1 stream", "PyTorch slide, 1 thread"]
    assert list(report["figures"]) == [*drawn, *pytorch]
    for name, count in drawn.items():
        assert report["figures"][name]["tokens_per_second"] == count / report["seconds"][name]["rounds"][0]
    integer, mixed = (report["settings"][f"{name}_cache_bytes"] for name in speed.ARITHMETICS)
    assert integer < mixed
    assert [item["name"] for item in report["ratios"]][-2:] == [
        f"time of {name} / JAX integer slide, 1 stream" for name in pytorch
    ]


def test_a_model_of_either_arithmetic_is_measured_in_both() -> None:
    model = random_int8_model(tiny_config().model)
    integers = speed.in_both(model)["integer"]
    assert speed.in_both(integers)["integer"] is integers
    for name, matrix in speed.in_both(integers)["mixed"].matrices.items():
        step = matrix.scale.max()
        np.testing.assert_allclose(matrix.dequantize(), model.matrices[name].dequantize(), atol=0.51 * step)


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("with_torch", [False, True])
def test_serve_reports_every_runtime(monkeypatch: pytest.MonkeyPatch, with_torch: bool) -> None:
    monkeypatch.setattr(serving, "PROMPTS", 2)
    model = random_int8_model(tiny_config().model)
    report = serving.benchmark_serving(model, new_tokens=9, rounds=1, with_torch=with_torch)
    kinds = (*speed.ARITHMETICS, "float")
    ours = [f"ONNX {kind}, {what}" for kind in kinds for what in ("refill", "slide", "prompts")]
    jax = ["JAX integer, refill", "JAX mixed, slide", "JAX integer, 32 streams"]
    c = [f"C, {what}" for what in ("refill", "slide", "32 streams", "prompts", "passes")]
    llama_cpp = ["llama.cpp, passes"] if importlib.util.find_spec("llama_cpp") else []
    others = [*serving.LOOPS, *(f"PyTorch {kind}, prompts" for kind in kinds)] if with_torch else []
    assert set(report["figures"]) == {*ours, *others, *jax, *c, *llama_cpp}
    seconds = {name: timing["rounds"][0] for name, timing in report["seconds"].items()}
    figures = {name: figures["tokens_per_second"] for name, figures in report["figures"].items()}
    assert figures["ONNX integer, slide"] == 9 / seconds["ONNX integer, slide"]
    assert figures["ONNX integer, prompts"] == serving.PASSES * 2 * 8 / seconds["ONNX integer, prompts"]
    assert len(report["ratios"]) == len(serving.COMPARISONS) - (4 - 4 * with_torch) - 1 + len(llama_cpp)
    assert "time of ONNX float, slide / ONNX integer, slide" in format_report(report)


def test_the_float_baseline_is_the_int8_model_with_float_activations() -> None:
    model = varied(random_int8_model(model_config(bias=True)))
    weight_only = Quantization(weight_granularity="per_channel", activation_bits=None)
    tokens = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = Int8GPT(dataclasses.replace(model, quantization=weight_only))(tokens)[:, -1]
        for found in (dequantized(model)(tokens), dequantized(model).last_logits(tokens)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_train_writes_the_report_that_it_prints(run_script: RunScript, tmp_path: Path) -> None:
    size = ["n_layer=1", "n_head=2", "n_embd=16", "block_size=8"]
    flags = [*(f"--config.model.{item}" for item in size), "--config.train.batch_size=4", "--config.mesh.data=1"]
    done = run_script("scripts/benchmark.py", "train", "--rounds=1", "--device=cpu", "--json=out/train.json", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads((tmp_path / "out" / "train.json").read_text())
    assert format_report(report) == done.stdout.rstrip()
    steps = ["JAX integer QAT", "JAX mixed QAT", "JAX float", "PyTorch float", "PyTorch QAT"]
    matmuls = ["JAX float32 matmul", "JAX int8 matmul", "PyTorch float32 matmul"]
    assert list(report["figures"]) == steps + matmuls
    config = Config.from_dict(report["settings"]["config"])
    assert config.model.vocab_size == 65
    for name in steps:
        figures = report["figures"][name]
        assert figures["tokens_per_second"] == pytest.approx(4 * 8 / (1e-3 * figures["step_time_ms"]))
        assert figures["flops_per_second"] == figures["tokens_per_second"] * config.model.flops_per_token
        matmul = report["figures"][f"{name.split()[0]} float32 matmul"]["flops_per_second"]
        assert figures["share_of_float32_matmul"] == figures["flops_per_second"] / matmul
    assert [item["target"] for item in report["ratios"]] == ["<= 1.3", ">= 2.5", ">= 3.0", ">= 2.3", "<= 1.10"]
    assert report["machine"]["devices"] == 4
    assert {"jax", "torch"} < set(report["versions"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to measure"),
        (["sleep"], "value should be one of <train|decode|serve|targets|gpu>"),
        (["train", "--model=int8"], "--model is for decode and serve"),
        (["gpu", "--model=int8"], "gpu has random weights"),
        (["decode", "--model=nowhere", "--device=cpu"], "nowhere is not a folder"),
    ],
)
def test_a_mistake_is_one_line(run_script: RunScript, arguments: list[str], message: str) -> None:
    done = run_script("scripts/benchmark.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
