"""How fast training and decoding are on the machine at hand, beside PyTorch: `python scripts/benchmark.py`.

Machines drift: clocks sink with heat, neighbours come and go. So all contenders take turns (A B C A B C ...), and only
figures of one run are compared, by their medians over the rounds. The first turn of each, which compiles, stands apart.

"JAX" is this library; "PyTorch" is picoGPT's way of doing the same (`picogpt_jax.torch_baseline`).
"""

import dataclasses
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from picogpt_jax.config import Config, ModelConfig
from picogpt_jax.data import Tokens
from picogpt_jax.devices import compiler_options
from picogpt_jax.errors import UserError
from picogpt_jax.generate import Generator, Overflow
from picogpt_jax.int8_model import Int8Model, Int8Tensor, Quantization
from picogpt_jax.train import Batches, Trainer
from picogpt_jax.vocabulary import Vocabulary

Work = Callable[[], object]  # a fixed amount of work; returns when it is done
Figures = dict[str, float]

CORPUS_TOKENS = 100_000
MATMUL_SHAPE = (4096, 192, 576)  # rows, in, out: c_attn of the default model on a batch of 32 x 128
MATMULS = 20  # of one turn
TEMPERATURE = 0.8
STREAMS = 32

# Dense bfloat16 FLOP/s of one device, from the vendors' data sheets: JAX's device_kind as a pattern -> peak.
PEAK_FLOPS = {
    r"NVIDIA A100.*": 312e12,
    r"NVIDIA (H100 80GB HBM3|H200)": 989e12,
    r"NVIDIA B200": 2250e12,
    r"TPU v4": 275e12,
    r"TPU v5( lite|e)": 197e12,
    r"TPU v5p?": 459e12,
    r"TPU v6( lite|e)": 918e12,
}
CPU_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")

# How a figure is printed: key -> (heading, format, divisor).
COLUMNS = {
    "step_time_ms": ("ms/step", ".1f", 1),
    "step_time_ms_min": ("min", ".1f", 1),
    "tokens_per_second": ("tokens/s", ",.0f", 1),
    "tokens_per_second_max": ("max", ",.0f", 1),
    "flops_per_second": ("GFLOP/s", ",.1f", 1e9),
    "share_of_float32_matmul": ("of float32 matmul", ".1%", 1),
    "mfu": ("MFU", ".1%", 1),
    "first_call_seconds": ("first call s", ".1f", 1),
}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one contender: its first turn, and one turn for each round."""

    first: float
    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        return min(self.rounds)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Time of `over` divided by that of `under`, and what it should be."""

    over: str
    under: str
    target: str
    goal: str = ""

    def result(self, timings: Mapping[str, Timing]) -> dict[str, Any]:
        over, under = timings[self.over], timings[self.under]
        return {
            "name": f"time of {self.over} / {self.under}",
            "of_medians": over.median / under.median,
            "of_minima": over.best / under.best,
            "target": self.target,
            "goal": self.goal,
        }


TRAIN_COMPARISONS = (
    Comparison("PyTorch QAT", "JAX QAT", ">= 3.0", ">= 4.0"),
    Comparison("PyTorch float", "JAX QAT", ">= 2.3", ">= 3.0"),
    Comparison("JAX QAT", "JAX float", "<= 1.10"),
)
DECODE_COMPARISONS = (  # so small a model can be faster with one thread than with all
    Comparison("PyTorch slide, 1 stream", "JAX slide, 1 stream", ">= 2.0"),
    Comparison("PyTorch slide, 1 thread", "JAX slide, 1 stream", ">= 2.0"),
)


def take_turns(contenders: Mapping[str, Work], rounds: int) -> dict[str, Timing]:
    """Runs every contender once, then `rounds` times all of them in turn."""
    first = {name: _seconds(work) for name, work in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            seconds[name].append(_seconds(work))
    return {name: Timing(first[name], seconds[name]) for name in contenders}


def _seconds(work: Work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def benchmark_training(config: Config, rounds: int, with_torch: bool) -> dict[str, Any]:
    """Times optimizer steps on random tokens, `train.log_interval` of them a turn, in one dispatch, as in training.

    `quant.mode` is what each contender trains with; `train.dtype="auto"` is bfloat16 on accelerators, for all of them.
    On CPU the FLOP/s are also given as a share of what a float32 matmul of the same library reaches, on accelerators as
    a share of the peak (MFU).

    Returns:
        The report: a JSON value, see `format_report`.

    Raises:
        UserError: `with_torch`, and PyTorch is missing or has no such device.
    """
    tokens = _random_tokens(config)
    qat = JaxTraining(config, "int8", tokens)
    steps: dict[str, Work] = {"JAX QAT": qat, "JAX float": JaxTraining(config, "none", tokens)}
    settings: dict[str, Any] = dict(rounds=rounds, steps_per_round=config.train.log_interval)
    settings |= dict(dtype=qat.trainer.dtype.name, config=config.to_dict())
    on_cpu = jax.default_backend() == "cpu"
    matmuls = _jax_matmuls() if on_cpu else {}
    if with_torch:
        baseline, device = _torch_baseline()
        for name, quantized in (("PyTorch float", False), ("PyTorch QAT", True)):
            steps[name] = baseline.Training(config, quantized, tokens, settings["dtype"], device)
        matmuls |= {"PyTorch float32 matmul": baseline.matmuls(*MATMUL_SHAPE, MATMULS)} if on_cpu else {}
        settings["torch_threads"] = baseline.threads()
    timings = take_turns(steps | matmuls, rounds)

    figures = {name: _training_figures(config, timings[name]) for name in steps}
    for name in matmuls:
        figures[name] = {"flops_per_second": 2 * math.prod(MATMUL_SHAPE) * MATMULS / timings[name].median}
    _add_shares(figures, list(steps), qat.trainer.mesh.size)
    return _report("train", settings, figures, timings, TRAIN_COMPARISONS)


def _random_tokens(config: Config) -> Tokens:
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, CORPUS_TOKENS + config.model.block_size)
    return Tokens(ids=ids.astype(np.uint16), path=Path("random"))


def _training_figures(config: Config, timing: Timing) -> Figures:
    steps = config.train.log_interval
    tokens_per_second = steps * config.train.batch_size * config.model.block_size / timing.median
    return {
        "step_time_ms": 1e3 * timing.median / steps,
        "step_time_ms_min": 1e3 * timing.best / steps,
        "tokens_per_second": tokens_per_second,
        "flops_per_second": tokens_per_second * config.model.flops_per_token,
        "first_call_seconds": timing.first,
    }


def _add_shares(figures: dict[str, Figures], names: list[str], devices: int) -> None:
    """Adds how close the training steps come to the matmul of their library or, JAX's, to the peak of their devices."""
    peak = peak_flops(jax.devices()[0].device_kind)
    for name in names:
        library, flops = name.split()[0], figures[name]["flops_per_second"]
        if f"{library} float32 matmul" in figures:
            figures[name]["share_of_float32_matmul"] = flops / figures[f"{library} float32 matmul"]["flops_per_second"]
        if peak is not None and library == "JAX":
            figures[name]["mfu"] = flops / (peak * devices)


class JaxTraining:
    """Training steps as `picogpt_jax.train.train` dispatches them."""

    def __init__(self, config: Config, quant_mode: Literal["int8", "none"], tokens: Tokens) -> None:
        quant = dataclasses.replace(config.quant, mode=quant_mode, start_step=0)
        config = dataclasses.replace(config, quant=quant)
        self.trainer = Trainer(config)
        self.batches = Batches(config, tokens, self.trainer.mesh)
        self.state = self.trainer.init()
        self.mode, self.step, self.count = self.trainer.mode_at(0), 0, config.train.log_interval

    def __call__(self) -> float:
        """Returns the last loss, in nats per token."""
        batches = self.batches(self.step, self.step + self.count)
        self.state, metrics = self.trainer.steps(self.state, self.batches.corpus, batches, self.mode)
        self.step += self.count
        jax.block_until_ready(self.state)
        return float(metrics.loss[-1])


def _jax_matmuls() -> dict[str, Work]:
    """One matmul over all CPU devices, its rows split among them: what the machine reaches with nothing around it."""
    rows, features, outputs = MATMUL_SHAPE
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("rows",), axis_types=(AxisType.Auto,), devices=devices)
    split, replicated = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())

    def work(dtype: str, result: str) -> Work:
        x = jax.device_put(np.ones((rows // len(devices) * len(devices), features), dtype), split)
        w = jax.device_put(np.ones((features, outputs), dtype), replicated)
        product = jax.jit(
            lambda x, w: lax.dot(x, w, preferred_element_type=jnp.dtype(result)), compiler_options=compiler_options()
        )

        def matmuls() -> None:
            # A loop on the device would hold one product only: XLA moves what does not vary out of it.
            for _ in range(MATMULS):
                product(x, w).block_until_ready()

        return matmuls

    return {"JAX float32 matmul": work("float32", "float32"), "JAX int8 matmul": work("int8", "int32")}


def benchmark_decoding(
    model: Int8Model, new_tokens: int, slide_tokens: int, rounds: int, with_torch: bool
) -> dict[str, Any]:
    """Times the generation of text from a prompt of one token, at temperature 0.8.

    Args:
        new_tokens: tokens for each stream with overflow="refill".
        slide_tokens: the same with overflow="slide".

    Returns:
        The report: a JSON value, see `format_report`.

    Raises:
        UserError: `with_torch`, and PyTorch is missing or has no such device.
    """
    settings: dict[str, Any] = dict(rounds=rounds, new_tokens=new_tokens, slide_tokens=slide_tokens)
    settings |= dict(temperature=TEMPERATURE, model=dataclasses.asdict(model.model))
    settings["quantization"] = dataclasses.asdict(model.quantization)
    generator = Generator.from_int8(model)

    def generate(streams: int, count: int, overflow: Overflow) -> Work:
        prompt_BT = np.zeros((streams, 1), np.int32)
        return lambda: generator.generate(prompt_BT, count, temperature=TEMPERATURE, overflow=overflow)

    work: dict[str, Work] = {
        "JAX refill, 1 stream": generate(1, new_tokens, "refill"),
        f"JAX refill, {STREAMS} streams": generate(STREAMS, new_tokens, "refill"),
        "JAX slide, 1 stream": generate(1, slide_tokens, "slide"),
    }
    drawn = dict(zip(work, (new_tokens, STREAMS * new_tokens, slide_tokens), strict=True))
    if with_torch:
        baseline, device = _torch_baseline()
        settings["torch_threads"] = baseline.threads()
        for name, threads in (("PyTorch slide, 1 stream", baseline.threads()), ("PyTorch slide, 1 thread", 1)):
            work[name] = baseline.Decoding(model, slide_tokens, TEMPERATURE, device, threads)
            drawn[name] = slide_tokens
    timings = take_turns(work, rounds)
    figures = {
        name: {
            "tokens_per_second": drawn[name] / timing.median,
            "tokens_per_second_max": drawn[name] / timing.best,
            "first_call_seconds": timing.first,
        }
        for name, timing in timings.items()
    }
    return _report("decode", settings, figures, timings, DECODE_COMPARISONS)


def random_int8_model(config: ModelConfig) -> Int8Model:
    """An untrained model, per channel and with int8 activations: as fast as a trained one."""
    generator = np.random.default_rng(0)
    matrices = {
        name: Int8Tensor(
            codes=generator.integers(-127, 128, shape, dtype=np.int8),
            scale=np.full((shape[0], 1), 0.02 / 73, np.float32),  # the codes deviate by 73, the initial weights by 0.02
        )
        for name, shape in config.matrix_shapes().items()
    }
    vectors = {
        name: np.full(shape, float(name.endswith(".weight")), np.float32)
        for name, shape in config.vector_shapes().items()
    }
    return Int8Model(
        model=config,
        quantization=Quantization(weight_granularity="per_channel", activation_bits=8),
        training={},
        vocabulary=Vocabulary(itos=tuple(chr(0x10000 + token) for token in range(config.vocab_size))),
        matrices=matrices,
        vectors=vectors,
    )


def _torch_baseline() -> tuple[ModuleType, str]:
    """`picogpt_jax.torch_baseline`, and PyTorch's name of the kind of device that JAX runs on; a UserError without."""
    try:
        from picogpt_jax import torch_baseline
    except ImportError as error:
        raise UserError(f"{error}; or leave PyTorch out: --notorch") from None
    return torch_baseline, torch_baseline.device_like(jax.default_backend())


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None for one that is not in the table."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if re.fullmatch(kind, device_kind)), None)


def _report(
    what: str,
    settings: dict[str, Any],
    figures: Mapping[str, Figures],
    timings: Mapping[str, Timing],
    comparisons: tuple[Comparison, ...],
) -> dict[str, Any]:
    measured = [item for item in comparisons if item.over in timings and item.under in timings]
    return {
        "benchmark": what,
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "figures": figures,
        "ratios": [item.result(timings) for item in measured],
        "seconds": {name: dataclasses.asdict(timing) for name, timing in timings.items()},
    }


def machine() -> dict[str, Any]:
    """The CPU's name and those of its features that matter here, the cores that may be used, and JAX's devices."""
    name, features = _cpu()
    devices = jax.devices()
    return {
        "cpu": name,
        "cpu_features": features,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
    }


def _cpu() -> tuple[str, list[str]]:
    """Linux tells both, other systems the name only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    fields = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    found = fields.get("flags", fields.get("features", "")).split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, [feature for feature in CPU_FEATURES if feature in found]


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide about speed, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "torch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text: the machine, a table of figures (medians, unless it says min or max) and one of ratios."""
    machine, figures = report["machine"], report["figures"]
    keys = [key for key in COLUMNS if any(key in row for row in figures.values())]
    rows = [["", *(COLUMNS[key][0] for key in keys)]]
    rows += [[name, *(_cell(key, row.get(key)) for key in keys)] for name, row in figures.items()]
    ratios = [["ratio", "of medians", "of minima", "target", "goal"]]
    for item in report["ratios"]:
        numbers = [f"{item[key]:.2f}" for key in ("of_medians", "of_minima")]
        ratios.append([item["name"], *numbers, item["target"], item["goal"]])
    settings = {key: value for key, value in report["settings"].items() if not isinstance(value, dict)}
    lines = [
        f"{machine['cpu']} ({' '.join(machine['cpu_features'])}), {machine['cores']} cores; "
        f"{machine['devices']} {machine['platform']} devices ({machine['device_kind']})",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        ", ".join(f"{name} {value}" for name, value in settings.items()),
        "",
        *_table(rows),
        "",
        *(_table(ratios) if report["ratios"] else []),
    ]
    return "\n".join(lines).rstrip()


def _cell(key: str, value: float | None) -> str:
    _, form, divisor = COLUMNS[key]
    return "" if value is None else format(value / divisor, form)


def _table(rows: list[list[str]]) -> list[str]:
    """Aligned lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
