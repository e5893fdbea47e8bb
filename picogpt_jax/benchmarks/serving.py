"""How fast the exported int8 model is in ONNX Runtime, beside the same graph in float and beside PyTorch, on the CPU.

"PyTorch loop" is picoGPT's way of sampling (`benchmarks.torch_baseline.Decoding`). "fast" leaves out the float64 that
makes the text JAX's (`exact=False`), and so do the graph and the model in float. Of a prompt, only the last position's
logits are computed. PyTorch has a thread per core, or one ("1 thread"); ONNX Runtime as many as are fast.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt_jax.benchmarks.report import Comparison, Work, make_report, take_turns, throughput
from picogpt_jax.errors import UserError
from picogpt_jax.int8.int8_model import Int8Model
from picogpt_jax.runtimes import loop
from picogpt_jax.runtimes.engine import Overflow

TEMPERATURE = 0.8
PROMPTS, PASSES = 32, 20  # prompts processed together, and how often in one turn

LOOPS = ("PyTorch loop", "PyTorch loop, 1 thread")  # so small a model can be faster with one thread than with all
KINDS = ("int8", "int8 fast")
COMPARISONS = (
    *(Comparison(loop, f"ONNX {kind}, refill", ">= 10.0") for kind in KINDS for loop in LOOPS),
    *(Comparison(loop, f"ONNX {kind}, slide", ">= 3.0") for kind in KINDS for loop in LOOPS),
    *(Comparison("ONNX float, slide", f"ONNX {kind}, slide", ">= 1.3") for kind in KINDS),
    *(Comparison("ONNX float, prompts", f"ONNX {kind}, prompts", ">= 1.5") for kind in KINDS),
    *(Comparison("PyTorch float, prompts", f"PyTorch {kind}, prompts", ">= 1.5") for kind in KINDS),
)


def benchmark_serving(model: Int8Model, new_tokens: int, rounds: int, with_torch: bool) -> dict[str, Any]:
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
    settings["quantization"] = dataclasses.asdict(model.quantization)
    kinds = {"int8": onnx_model(model), "int8 fast": onnx_model(model, exact=False)}
    kinds["float"] = onnx_model(model, "float", exact=False)
    models = {f"ONNX {kind}": OnnxGPT(proto.SerializeToString()) for kind, proto in kinds.items()}
    streams: dict[str, Work] = {
        f"ONNX {kind}, refill": _generation(models[f"ONNX {kind}"], new_tokens, "refill") for kind in KINDS
    }
    streams |= {f"{name}, slide": _generation(model, new_tokens, "slide") for name, model in models.items()}
    prompts: dict[str, Work] = {
        f"{name}, prompts": _passes(functools.partial(model.forward, prompts_BT, last_only=True))
        for name, model in models.items()
    }
    if with_torch:
        torch_streams, torch_prompts, settings["torch_threads"] = _torch_work(model, new_tokens, prompts_BT)
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
    model: Int8Model, new_tokens: int, prompts_BT: npt.NDArray[np.int64]
) -> tuple[dict[str, Work], dict[str, Work], int]:
    """PyTorch's contenders, streams and prompts, and its number of threads."""
    try:
        import torch

        from picogpt_jax.benchmarks import torch_baseline
        from picogpt_jax.runtimes.torch_model import Int8GPT
    except ImportError as error:
        raise UserError(f"{error}; or leave PyTorch out: --notorch") from None
    threads, tokens = torch.get_num_threads(), torch.from_numpy(prompts_BT)
    float32, int8, fast = torch_baseline.dequantized(model), Int8GPT(model), Int8GPT(model, exact=False)

    def prompts(forward: Callable[[], object]) -> Work:
        def work() -> None:
            torch.set_num_threads(threads)
            with torch.no_grad():
                _passes(forward)()

        return work

    streams: dict[str, Work] = {
        name: torch_baseline.Decoding(model, new_tokens, TEMPERATURE, "cpu", count)
        for name, count in zip(LOOPS, (threads, 1), strict=True)
    }
    passes = {
        "PyTorch int8, prompts": prompts(lambda: int8(tokens, last_only=True)),
        "PyTorch int8 fast, prompts": prompts(lambda: fast(tokens, last_only=True)),
        "PyTorch float, prompts": prompts(lambda: float32.last_logits(tokens)),
    }
    return streams, passes, threads
