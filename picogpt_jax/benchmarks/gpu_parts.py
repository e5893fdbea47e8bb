"""What one process measures on a GPU for `benchmarks.gpu`: it reads a question on stdin and answers on stdout, in JSON.

A process for each measurement: the device's peak memory is that of all that a process has done, a compilation cannot be
interrupted from within, and where one fails or takes too long the others go on.

Shapes: B windows, T time, V vocabulary.
"""

import dataclasses
import gzip
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from picogpt_jax.benchmarks import report
from picogpt_jax.benchmarks.speed import JaxTraining, random_tokens, with_arithmetic
from picogpt_jax.config import Arithmetic, Config, ModelConfig
from picogpt_jax.devices.chips import chip_of, model_flops_utilization
from picogpt_jax.devices.setup import compiler_options, set_up_jax
from picogpt_jax.errors import UserError
from picogpt_jax.int8.convert import FLOAT, params_from_arrays, serving_quant, serving_variables
from picogpt_jax.int8.folder import load_int8_model
from picogpt_jax.int8.integer_model import IntegerModel, integer_model
from picogpt_jax.int8.layout import float_layout
from picogpt_jax.model.gpt import GPT
from picogpt_jax.model.numerics import Numerics
from picogpt_jax.planning.hlo import parse_module
from picogpt_jax.planning.kernels import product_kernels, read_ptx
from picogpt_jax.planning.plan import make_plan
from picogpt_jax.text.batches import Tokens
from picogpt_jax.text.vocabulary import Vocabulary

ROUNDS, LEAST_ROUNDS, ROUND_SECONDS = 7, 3, 10.0  # turns of the steps; no more than the least once so long has passed
TOP_KERNELS = 12  # of a trace
WINDOWS = 16  # of the validation text whose logits are compared
KERNEL = "training by the attention kernel"
# Of logits: another size of model, the windows [B, T].
SIZES: tuple[tuple[dict[str, Any], tuple[int, int]], ...] = (
    ({}, (1, 1)),
    ({}, (32, 128)),
    (dict(bias=True, activation="relu", n_head=6), (5, 37)),
    (dict(n_layer=2, n_embd=768, n_head=12, block_size=1024, vocab_size=8192, mlp_ratio=4), (2, 1024)),
)


def device() -> dict[str, Any]:
    """The machine, versions, and what JAX says of the device that the rest is measured on."""
    first = jax.devices()[0]
    found = {**report.machine(), "versions": report.versions()}
    limit = (first.memory_stats() or {}).get("bytes_limit")
    return {**found, "platform_version": first.client.platform_version.split("\n")[-1], "memory_limit_bytes": limit}


# --- logits -------------------------------------------------------------------------------------------------------


def logits(config: ModelConfig, one: jax.Device, other: jax.Device) -> list[dict[str, Any]]:
    """Compares the logits of random models in integers on two devices: of serving, of training, and by the kernel.

    Training in float32 is compared for the first of `SIZES` alone: each forward pass is compiled twice.
    """
    rows: list[dict[str, Any]] = []
    for changes, shape in SIZES:
        model = dataclasses.replace(config, **changes)
        arrays = random_arrays(model)
        vocabulary = Vocabulary(itos=tuple(chr(0x10000 + token) for token in range(model.vocab_size)))
        served = _serving(integer_model(model, "per_channel", arrays, vocabulary, {}))
        quant = dataclasses.replace(FLOAT, mode="int8", arithmetic="integer")
        forwards = {"serving": served}
        for dtype in ("bfloat16",) if rows else ("float32", "bfloat16"):
            numerics = Numerics(quant, "train", jnp.dtype(dtype))
            params = {"params": params_from_arrays(model, arrays)}
            forwards[f"training in {dtype}"] = GPT(model, numerics), params
        forwards[KERNEL] = GPT(model, dataclasses.replace(numerics, attention="cudnn")), params
        ids_BT = np.random.default_rng(0).integers(0, model.vocab_size, shape)
        for name, (gpt, variables) in forwards.items():
            rows.append(compare(gpt, variables, ids_BT, one, other) | {"forward": name})
    return rows


def random_arrays(config: ModelConfig) -> dict[str, npt.NDArray[np.float32]]:
    """Float parameters under nanoGPT's names, biases and LayerNorms included, of about the size of trained ones."""
    generator = np.random.default_rng(0)
    return {
        name: generator.normal(float(len(shape) == 1 and name.endswith(".weight")), 0.2, shape).astype(np.float32)
        for name, (_, shape) in float_layout(config).items()
    }


def folder_logits(folder: str, data_dir: str, one: jax.Device, other: jax.Device) -> dict[str, Any]:
    """Compares the logits of an int8 folder, on windows spread over the validation text."""
    model = load_int8_model(folder)
    if not isinstance(model, IntegerModel):
        raise UserError(f"{folder} is a model in mixed arithmetic; train with --config.quant.arithmetic=integer")
    length = model.model.block_size
    tokens = Tokens.open(data_dir, "val", length, model.vocabulary.size)
    starts = np.linspace(0, len(tokens) - length, WINDOWS).astype(np.int64)
    return compare(*_serving(model), tokens.windows(starts, length), one, other) | {"model": model.digest.hex()}


def _serving(model: IntegerModel) -> tuple[GPT, Any]:
    return GPT(model.model, Numerics(serving_quant(model), "serve")), serving_variables(model)


def compare(
    model: GPT, variables: Any, ids_BT: npt.NDArray[np.integer], one: jax.Device, other: jax.Device
) -> dict[str, Any]:
    """Whether two devices compute the same bits of every logit of these windows, and their digest."""
    first_BTV, second_BTV = (on_device(model, variables, ids_BT, place) for place in (one, other))
    config = model.config
    return {
        "size": f"{config.n_layer} x {config.n_embd}, {config.n_head} heads, {config.activation}",
        "shape": list(first_BTV.shape),
        "equal": first_BTV.tobytes() == second_BTV.tobytes(),
        "largest_difference": float(np.abs(first_BTV - second_BTV).max()),
        "distinct_values": len(np.unique(first_BTV)),
        "digest": hashlib.sha256(first_BTV.tobytes()).hexdigest()[:16],
    }


def on_device(
    model: GPT, variables: Any, ids_BT: npt.NDArray[np.integer], place: jax.Device
) -> npt.NDArray[np.float32]:
    """Logits, float32 [B, T, V], computed by one device: where the arguments are committed to.

    A CPU computes what is asked of the attention kernel by the plain form.
    """
    if place.platform == "cpu":
        model = model.clone(numerics=dataclasses.replace(model.numerics, attention="plain"))
    forward = jax.jit(model.apply, compiler_options=compiler_options(place.platform))
    return np.asarray(forward(*jax.device_put((variables, ids_BT.astype(np.int32)), place)).astype(jnp.float32))


# --- steps --------------------------------------------------------------------------------------------------------


def steps(config: Config, arithmetic: Arithmetic | None, seconds: float = ROUND_SECONDS) -> dict[str, Any]:
    """Times training steps, `train.log_interval` in a dispatch, on random tokens; reads the compiled program.

    Args:
        arithmetic: of QAT; None: training in float, which is bfloat16 on a GPU.
        seconds: after so many no round begins, once there are `LEAST_ROUNDS`.
    """
    training = JaxTraining(config, arithmetic, random_tokens(config))
    trainer, corpus, count = training.trainer, training.batches.corpus, training.count
    batches = training.batches(0, count)
    with tempfile.TemporaryDirectory(prefix="picogpt_gpu_") as folder:
        began = time.perf_counter()
        lowered = trainer.steps.lower(training.state, corpus, batches, training.mode)
        options: dict[str, str | bool] | None = {"xla_dump_to": folder} if jax.default_backend() == "gpu" else None
        program = lowered.compile(options)
        compile_seconds = time.perf_counter() - began
        code = read_ptx(Path(folder))
    state, metrics = program(training.state, corpus, batches)
    jax.block_until_ready(state)
    rounds: list[float] = []
    while len(rounds) < LEAST_ROUNDS or (len(rounds) < ROUNDS and sum(rounds) < seconds):
        began = time.perf_counter()
        state, metrics = program(state, corpus, batches)
        jax.block_until_ready(state)
        rounds.append(time.perf_counter() - began)
    with tempfile.TemporaryDirectory(prefix="picogpt_gpu_") as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(program(state, corpus, batches))
        traced = top_kernels(Path(folder))
    first, memory, text = jax.devices()[0], program.memory_analysis(), program.as_text()
    assert memory is not None
    assert text is not None
    step_seconds = float(np.median(rounds)) / count
    tokens_per_second = config.train.batch_size * config.model.block_size / step_seconds
    flops_per_second = tokens_per_second * config.model.flops_per_token
    return {
        "dtype": trainer.dtype.name,
        "attention": trainer.attention,
        "batch_size": config.train.batch_size,
        "block_size": config.model.block_size,
        "remat": config.train.remat,
        "parameters": config.model.n_parameters,
        "steps_per_round": count,
        "round_seconds": rounds,
        "loss": float(metrics.loss[-1]),
        "step_time_ms": 1e3 * step_seconds,
        "step_time_ms_min": 1e3 * min(rounds) / count,
        "tokens_per_second": tokens_per_second,
        "mfu": model_flops_utilization(flops_per_second, first.device_kind, 1),
        "compile_seconds": compile_seconds,
        "peak_bytes": (first.memory_stats() or {}).get("peak_bytes_in_use"),
        "compiled_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "products": [dataclasses.asdict(row) for row in product_kernels(parse_module(text), code)],
        "kernels": traced,
    }


def top_kernels(folder: Path) -> list[dict[str, Any]]:
    """The kernels that took most of a GPU's time in a trace: their names, milliseconds, calls, and shares of all."""
    milliseconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for path in folder.rglob("*.trace.json.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        named = [event for event in events if event.get("ph") == "M"]
        gpus = {event["pid"] for event in named if event["args"].get("name", "").startswith("/device:GPU")}
        streams = {  # other rows of the trace repeat the kernels' time under the names of XLA's operations
            (event["pid"], event["tid"])
            for event in named
            if event["name"] == "thread_name" and event["args"]["name"].startswith("Stream")
        }
        for event in events:
            is_kernel = event.get("ph") == "X" and event["pid"] in gpus and (event["pid"], event["tid"]) in streams
            if is_kernel:
                milliseconds[event["name"]] += event["dur"] / 1e3
                calls[event["name"]] += 1
    total = sum(milliseconds.values())
    return [
        {"name": name, "ms": value, "calls": calls[name], "share": value / total}
        for name, value in milliseconds.most_common(TOP_KERNELS)
    ]


# --- memory, planned ----------------------------------------------------------------------------------------------


def plan(config: Config, arithmetic: Arithmetic | None, device_kind: str) -> dict[str, Any]:
    """What `scripts/plan.py` says of a step on one such GPU, without touching one.

    Raises:
        UserError: planning does not know the GPU, or its compiler is not installed.
    """
    chip = chip_of(device_kind)
    if chip is None or chip.topology is None:
        raise UserError(f"planning does not know {device_kind}; add it to devices/chips.py")
    planned = make_plan(with_arithmetic(config, arithmetic), f"{chip.topology}:1")
    return {name: planned.get(name) for name in ("topology", "bytes_per_chip", "fits", "step_time_ms", "mfu")}


# --- a process ----------------------------------------------------------------------------------------------------


def answer(question: dict[str, Any]) -> Any:
    """The result of the part `question["part"]`; the other values are its arguments."""
    arguments = {name: value for name, value in question.items() if name != "part"}
    if "config" in arguments:
        arguments["config"] = Config.from_dict(arguments["config"])
    one, other = jax.devices()[0], jax.devices("cpu")[0]
    if question["part"] == "device":
        return device()
    if question["part"] == "logits":
        return logits(arguments["config"].model, one, other)
    if question["part"] == "folder":
        return folder_logits(**arguments, one=one, other=other)
    if question["part"] == "plan":
        return plan(**arguments)
    return steps(**arguments)


def check_platform(platforms: str) -> None:
    """Where JAX can use no GPU it takes the next platform of the list, without a word.

    Raises:
        UserError: it did.
    """
    if platforms.startswith("cuda") and jax.default_backend() != "gpu":
        raise UserError(
            "the system shows a GPU, which JAX cannot use; pip install 'picogpt_jax[cuda]', and see that nvidia-smi "
            "lists the GPU"
        )


def main() -> None:
    """Reads the question, answers it on the last line of stdout; a `UserError` is one line on stderr, status 2."""
    question = json.load(sys.stdin)
    try:
        set_up_jax()
        check_platform(os.environ.get("JAX_PLATFORMS", ""))
        print(json.dumps(answer(question)), flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
