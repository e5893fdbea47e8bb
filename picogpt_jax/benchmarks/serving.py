"""How fast the exported int8 model is in ONNX Runtime, beside the same graph in float and beside PyTorch, on the CPU.

The model is computed in both arithmetics (`speed.in_both`), and in float without quantization. "PyTorch loop" is
picoGPT's way of sampling (`benchmarks.torch_baseline.Decoding`). Of a prompt, only the last position's logits are
computed. PyTorch has a thread per core, or one ("1 thread"); ONNX Runtime as many as are fast.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt_jax.benchmarks.report import Comparison, Work, make_report, take_turns, throughput
from picogpt_jax.benchmarks.speed import in_both
from picogpt_jax.config import Arithmetic
from picogpt_jax.errors import UserError
from picogpt_jax.int8.int8_model import Int8Model
from picogpt_jax.int8.integer_model import IntegerModel
from picogpt_jax.runtimes import loop
from picogpt_jax.runtimes.engine import Overflow

TEMPERATURE = 0.8
PROMPTS, PASSES = 32, 20  # prompts processed together, and how often in one turn

LOOPS = ("PyTorch loop", "PyTorch loop, 1 thread")  # so small a model can be faster with one thread than with all
COMPARISONS = (
    *(Comparison(loop, "ONNX integer, slide", ">= 3.0") for loop in LOOPS),
    Comparison("ONNX float, refill", "ONNX integer, refill", ">= 1.0"),
    Comparison("ONNX float, slide", "ONNX integer, slide", ">= 1.2"),
    Comparison("ONNX float, prompts", "ONNX integer, prompts", ">= 1.2"),
    Comparison("ONNX float, refill", "ONNX mixed, refill", ">= 1.0"),
    Comparison("ONNX float, slide", "ONNX mixed, slide", ">= 1.3"),
    Comparison("ONNX float, prompts", "ONNX mixed, prompts", ">= 1.5"),
    Comparison("PyTorch float, prompts", "PyTorch integer, prompts", ">= 1.0"),
    Comparison("PyTorch float, prompts", "PyTorch mixed, prompts", ">= 1.5"),
)


def benchmark_serving(
    model: Int8Model | IntegerModel, new_tokens: int, rounds: int, with_torch: bool
) -> dict[str, Any]:
    """Times one stream of text, from a prompt of one token at temperature 0.8, and the processing of prompts.

    Args:
        new_tokens: tokens that each contender draws.

    Returns:
        The report: a JSON value, see `format_report`.

    Raises:
        UserError: `with_torch`, and PyTorch is missing.
    """
    from picogpt_jax.formats.onnx_export import onnx_model
    from picogpt_jax.runtimes.onnx_model import OnnxGPT

    prompt_tokens = model.model.block_size
    prompts_BT = np.random.default_rng(0).integers(0, model.model.vocab_size, (PROMPTS, prompt_tokens))
    settings: dict[str, Any] = dict(rounds=rounds, new_tokens=new_tokens, prompts=PROMPTS, prompt_tokens=prompt_tokens)
    settings |= dict(temperature=TEMPERATURE, model=dataclasses.asdict(model.model))
    models = in_both(model)
    protos = {str(arithmetic): onnx_model(model) for arithmetic, model in models.items()}
    protos["float"] = onnx_model(models["mixed"], "float")
    sessions = {f"ONNX {kind}": OnnxGPT(proto.SerializeToString()) for kind, proto in protos.items()}
    overflows: tuple[Overflow, ...] = ("refill", "slide")
    streams: dict[str, Work] = {
        f"{name}, {overflow}": _generation(session, new_tokens, overflow)
        for overflow in overflows
        for name, session in sessions.items()
    }
    prompts: dict[str, Work] = {
        f"{name}, prompts": _passes(functools.partial(session.forward, prompts_BT, last_only=True))
        for name, session in sessions.items()
    }
    if with_torch:
        torch_streams, torch_prompts, settings["torch_threads"] = _torch_work(models, new_tokens, prompts_BT)
        streams, prompts = streams | torch_streams, prompts | torch_prompts
    timings = take_turns(streams | prompts, rounds)
    tokens = dict.fromkeys(streams, new_tokens) | dict.fromkeys(prompts, PASSES * prompts_BT.size)
    return make_report("serve", settings, throughput(timings, tokens), timings, COMPARISONS)


def _generation(model: Any, new_tokens: int, overflow: Overflow) -> Work:
    prompt_BT = np.zeros((1, 1), np.int64)
    return lambda: loop.generate(model, prompt_BT, new_tokens, temperature=TEMPERATURE, overflow=overflow)


def _passes(forward: Callable[[], object]) -> Work:
    def work() -> None:
        for _ in range(PASSES):
            forward()

    return work


def _torch_work(
    models: dict[Arithmetic, Any], new_tokens: int, prompts_BT: npt.NDArray[np.int64]
) -> tuple[dict[str, Work], dict[str, Work], int]:
    """PyTorch's contenders, streams and prompts, and its number of threads."""
    try:
        import torch

        from picogpt_jax.benchmarks import torch_baseline
        from picogpt_jax.runtimes.torch_integer import IntegerGPT
        from picogpt_jax.runtimes.torch_model import Int8GPT
    except ImportError as error:
        raise UserError(f"{error}; or leave PyTorch out: --notorch") from None
    threads, tokens = torch.get_num_threads(), torch.from_numpy(prompts_BT)
    integer, mixed = IntegerGPT(models["integer"]), Int8GPT(models["mixed"])
    float32 = torch_baseline.dequantized(models["mixed"])

    def prompts(forward: Callable[[], object]) -> Work:
        def work() -> None:
            torch.set_num_threads(threads)
            with torch.no_grad():
                _passes(forward)()

        return work

    streams: dict[str, Work] = {
        name: torch_baseline.Decoding(models["mixed"], new_tokens, TEMPERATURE, "cpu", count)
        for name, count in zip(LOOPS, (threads, 1), strict=True)
    }
    passes = {
        "PyTorch integer, prompts": prompts(lambda: integer(tokens, last_only=True)),
        "PyTorch mixed, prompts": prompts(lambda: mixed(tokens, last_only=True)),
        "PyTorch float, prompts": prompts(lambda: float32.last_logits(tokens)),
    }
    return streams, passes, threads
