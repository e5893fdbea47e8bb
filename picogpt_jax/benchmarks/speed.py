"""How fast training and decoding are on the machine at hand, beside PyTorch: `python scripts/benchmark.py`.

"JAX" is this library; "PyTorch" is picoGPT's way of doing the same (`picogpt_jax.benchmarks.torch_baseline`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from picogpt_jax.benchmarks.report import Comparison, Figures, Timing, Work, make_report, take_turns, throughput
from picogpt_jax.config import Arithmetic, Config, ModelConfig
from picogpt_jax.devices.chips import model_flops_utilization
from picogpt_jax.devices.setup import compiler_options
from picogpt_jax.errors import UserError
from picogpt_jax.formats.huggingface import dequantized
from picogpt_jax.int8.int8_model import Int8Model, Int8Tensor, Quantization
from picogpt_jax.int8.integer_model import IntegerModel, integer_model
from picogpt_jax.kernels.int8_product import int8_dot_general
from picogpt_jax.kernels.products import Dimensions
from picogpt_jax.runtimes.engine import Overflow
from picogpt_jax.runtimes.jax_generator import Generator
from picogpt_jax.text.batches import Tokens
from picogpt_jax.text.vocabulary import Vocabulary
from picogpt_jax.training.trainer import Batches, Trainer

CORPUS_TOKENS = 100_000
MATMUL_SHAPE = (4096, 192, 576)  # rows, in, out: c_attn of the default model on a batch of 32 x 128
MATMULS = 20  # of one turn
TEMPERATURE = 0.8
STREAMS = 32

ARITHMETICS: tuple[Arithmetic, ...] = ("integer", "mixed")

TRAIN_COMPARISONS = (
    Comparison("JAX integer QAT", "JAX mixed QAT", "<= 1.3", "<= 1.1"),
    Comparison("PyTorch QAT", "JAX integer QAT", ">= 2.5"),
    Comparison("PyTorch QAT", "JAX mixed QAT", ">= 3.0", ">= 4.0"),
    Comparison("PyTorch float", "JAX mixed QAT", ">= 2.3", ">= 3.0"),
    Comparison("JAX mixed QAT", "JAX float", "<= 1.10"),
)
REFILL, SLIDE = "refill, 1 stream", "slide, 1 stream"
DECODE_COMPARISONS = (  # so small a model can be faster with one thread than with all
    *(
        Comparison(f"JAX mixed {name}", f"JAX integer {name}", ">= 1.0")
        for name in (REFILL, f"refill, {STREAMS} streams", SLIDE)
    ),
    Comparison(f"PyTorch {SLIDE}", f"JAX integer {SLIDE}", ">= 2.0"),
    Comparison("PyTorch slide, 1 thread", f"JAX integer {SLIDE}", ">= 2.0"),
)


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
    tokens = random_tokens(config)
    qat = JaxTraining(config, "mixed", tokens)
    same = dataclasses.replace(config.train, attention=qat.trainer.attention)  # which may have been measured
    steps: dict[str, Work] = {
        "JAX integer QAT": JaxTraining(config, "integer", tokens),
        "JAX mixed QAT": qat,
        "JAX float": JaxTraining(dataclasses.replace(config, train=same), None, tokens),
    }
    settings: dict[str, Any] = dict(rounds=rounds, steps_per_round=config.train.log_interval)
    settings |= dict(dtype=qat.trainer.dtype.name, attention=qat.trainer.attention, config=config.to_dict())
    on_cpu = jax.default_backend() == "cpu"
    matmuls = _jax_matmuls() if on_cpu else {}
    if with_torch:
        baseline, device = _torch_baseline()
        for name, quantized in (("PyTorch float", False), ("PyTorch QAT", True)):
            steps[name] = baseline.Training(config, quantized, tokens, settings["dtype"], device)
        matmuls |= {"PyTorch float32 matmul": baseline.matmuls(*MATMUL_SHAPE, MATMULS)} if on_cpu else {}
        settings["torch_threads"] = baseline.torch.get_num_threads()
    timings = take_turns(steps | matmuls, rounds)

    figures = {name: _training_figures(config, timings[name]) for name in steps}
    for name in matmuls:
        figures[name] = {"flops_per_second": 2 * math.prod(MATMUL_SHAPE) * MATMULS / timings[name].median}
    _add_shares(figures, list(steps), qat.trainer.mesh.size)
    return make_report("train", settings, figures, timings, TRAIN_COMPARISONS)


def random_tokens(config: Config) -> Tokens:
    """A text for training whose content does not matter."""
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
    kind = jax.devices()[0].device_kind
    for name in names:
        library, flops = name.split()[0], figures[name]["flops_per_second"]
        if f"{library} float32 matmul" in figures:
            figures[name]["share_of_float32_matmul"] = flops / figures[f"{library} float32 matmul"]["flops_per_second"]
        mfu = model_flops_utilization(flops, kind, devices)
        if mfu is not None and library == "JAX":
            figures[name]["mfu"] = mfu


def with_arithmetic(config: Config, arithmetic: Arithmetic | None) -> Config:
    """QAT from the first step in this arithmetic; training in float for None."""
    quant = dataclasses.replace(config.quant, mode="int8" if arithmetic else "none", start_step=0)
    return dataclasses.replace(config, quant=dataclasses.replace(quant, arithmetic=arithmetic or quant.arithmetic))


class JaxTraining:
    """Training steps as `picogpt_jax.training.loop.train` dispatches them."""

    def __init__(self, config: Config, arithmetic: Arithmetic | None, tokens: Tokens) -> None:
        config = with_arithmetic(config, arithmetic)
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

    def work(dtype: str, dot: Callable[[jax.Array, jax.Array, Dimensions], jax.Array]) -> Work:
        x = jax.device_put(np.ones((rows // len(devices) * len(devices), features), dtype), split)
        w = jax.device_put(np.ones((features, outputs), dtype), replicated)
        product = jax.jit(lambda x, w: dot(x, w, (((1,), (0,)), ((), ()))), compiler_options=compiler_options())

        def matmuls() -> None:
            # A loop on the device would hold one product only: XLA moves what does not vary out of it.
            for _ in range(MATMULS):
                product(x, w).block_until_ready()

        return matmuls

    return {
        "JAX float32 matmul": work("float32", lax.dot_general),
        "JAX int8 matmul": work("int8", int8_dot_general),
    }


def benchmark_decoding(
    model: Int8Model | IntegerModel, new_tokens: int, slide_tokens: int, rounds: int, with_torch: bool
) -> dict[str, Any]:
    """Times the generation of text from a prompt of one token, at temperature 0.8.

    Args:
        model: computed in both arithmetics, see `in_both`.
        new_tokens: tokens for each stream with overflow="refill".
        slide_tokens: the same with overflow="slide".

    Returns:
        The report: a JSON value, see `format_report`.

    Raises:
        UserError: `with_torch`, and PyTorch is missing or has no such device.
    """
    settings: dict[str, Any] = dict(rounds=rounds, new_tokens=new_tokens, slide_tokens=slide_tokens)
    settings |= dict(temperature=TEMPERATURE, model=dataclasses.asdict(model.model))
    models = in_both(model)
    generators = {arithmetic: Generator.from_int8(model) for arithmetic, model in models.items()}
    settings |= {f"{name}_cache_bytes": _cache_bytes(generator) for name, generator in generators.items()}

    def generate(arithmetic: Arithmetic, streams: int, count: int, overflow: Overflow) -> Work:
        prompt_BT = np.zeros((streams, 1), np.int32)
        generator = generators[arithmetic]
        return lambda: generator.generate(prompt_BT, count, temperature=TEMPERATURE, overflow=overflow)

    work: dict[str, Work] = {}
    drawn: dict[str, int] = {}
    cases: tuple[tuple[int, int, Overflow], ...]
    cases = (1, new_tokens, "refill"), (STREAMS, new_tokens, "refill"), (1, slide_tokens, "slide")
    for streams, count, overflow in cases:
        for arithmetic in ARITHMETICS:
            name = f"JAX {arithmetic} {overflow}, {streams} stream{'s' * (streams > 1)}"
            work[name], drawn[name] = generate(arithmetic, streams, count, overflow), streams * count
    if with_torch:
        baseline, device = _torch_baseline()
        settings["torch_threads"] = every = baseline.torch.get_num_threads()
        for name, threads in (("PyTorch slide, 1 stream", every), ("PyTorch slide, 1 thread", 1)):
            work[name] = baseline.Decoding(models["mixed"], slide_tokens, TEMPERATURE, device, threads)
            drawn[name] = slide_tokens
    timings = take_turns(work, rounds)
    return make_report("decode", settings, throughput(timings, drawn), timings, DECODE_COMPARISONS)


def _cache_bytes(generator: Generator) -> int:
    """Bytes of a stream's keys and values."""
    apply = functools.partial(generator.model.apply, keep_cache=True)
    ids_BT = jax.ShapeDtypeStruct((1, generator.block_size), np.dtype(np.int32))
    _, cache = jax.eval_shape(apply, generator.variables, ids_BT)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def in_both(model: Int8Model | IntegerModel) -> dict[Arithmetic, Any]:
    """The model as an `IntegerModel` and as an `Int8Model`, one of which it is: their speed is comparable."""
    if isinstance(model, IntegerModel):
        return {"integer": model, "mixed": model.mixed()}
    granularity = model.quantization.weight_granularity
    integers = integer_model(model.model, granularity, dequantized(model), model.vocabulary, model.training)
    return {"integer": integers, "mixed": model}


def random_int8_model(config: ModelConfig) -> Int8Model:
    """An untrained model, per channel and with int8 activations: as fast as a trained one."""
    generator = np.random.default_rng(0)
    first = 0x20 if config.vocab_size < 96 else 0x10000  # GGUF takes ASCII alone
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
        vocabulary=Vocabulary(itos=tuple(chr(first + token) for token in range(config.vocab_size))),
        matrices=matrices,
        vectors=vectors,
    )


def _torch_baseline() -> tuple[ModuleType, str]:
    """`benchmarks.torch_baseline`, and PyTorch's name of the kind of device that JAX runs on; a UserError without."""
    try:
        from picogpt_jax.benchmarks import torch_baseline
    except ImportError as error:
        raise UserError(f"{error}; or leave PyTorch out: --notorch") from None
    return torch_baseline, torch_baseline.device_like(jax.default_backend())
