"""How fast the int8 model is in C, JAX and ONNX Runtime, beside the same graph in float, PyTorch and llama.cpp, on CPU.

The model is computed in both arithmetics (`speed.in_both`), and in float without quantization. "PyTorch loop" is
picoGPT's way of sampling (`benchmarks.torch_baseline.Decoding`). Of a prompt, only the last position's logits are
computed. PyTorch has a thread per core, or one ("1 thread"); ONNX Runtime as many as are fast. "Passes" fill the cache
of one stream token by token, with one thread: llama.cpp draws nothing from its logits, C does. Of JAX is here
what C is compared with; `speed.benchmark_decoding` has all of it.
"""

import ctypes
import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
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
from picogpt_jax.runtimes.c_model import CGPT
from picogpt_jax.runtimes.engine import Engine, Overflow, Sampling
from picogpt_jax.runtimes.jax_generator import Generator

TEMPERATURE = 0.8
OVERFLOWS: tuple[Overflow, ...] = ("refill", "slide")
PROMPTS, PASSES = 32, 20  # prompts processed together, and how often in one turn
STREAMS, CONTEXTS = 32, 10  # texts drawn together; contexts filled in one turn

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
    Comparison("JAX integer, refill", "C, refill", ">= 5.0"),
    Comparison("ONNX mixed, refill", "C, refill", ">= 6.0"),
    Comparison(f"JAX integer, {STREAMS} streams", f"C, {STREAMS} streams", ">= 2.0"),
    Comparison("JAX mixed, slide", "C, slide", ">= 5.0"),
    Comparison("ONNX mixed, prompts", "C, prompts", ">= 1.0"),
    Comparison("llama.cpp, passes", "C, passes", ">= 5.0", ">= 8.0"),
)


def benchmark_serving(
    model: Int8Model | IntegerModel, new_tokens: int, rounds: int, with_torch: bool
) -> dict[str, Any]:
    """Times text, from a prompt of one token at temperature 0.8, and the processing of prompts.

    Args:
        new_tokens: tokens that each contender draws, of each stream.

    Returns:
        The report: a JSON value, see `format_report`. llama.cpp is in it where it is installed.

    Raises:
        UserError: there is no C compiler; or `with_torch`, and PyTorch is missing.
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
    c = CGPT(models["integer"])
    jax = {arithmetic: Generator.from_int8(model).generate for arithmetic, model in models.items()}

    draws: dict[str, Callable[..., object]] = {"C": functools.partial(_generate, c)}
    draws |= {name: functools.partial(loop.generate, session) for name, session in sessions.items()}
    streams = {
        f"{name}, {overflow}": _drawing(draw, 1, new_tokens, overflow)
        for overflow in OVERFLOWS
        for name, draw in draws.items()
    }
    streams["JAX integer, refill"] = _drawing(jax["integer"], 1, new_tokens, "refill")
    streams["JAX mixed, slide"] = _drawing(jax["mixed"], 1, new_tokens, "slide")
    side_by_side = {
        f"{name}, {STREAMS} streams": _drawing(draw, STREAMS, new_tokens, "refill")
        for name, draw in (("JAX integer", jax["integer"]), ("C", draws["C"]))
    }
    prompts = {
        f"{name}, prompts": _passes(functools.partial(session.forward, prompts_BT, last_only=True))
        for name, session in ({"C": c} | sessions).items()
    }
    in_context = CONTEXTS * (prompt_tokens - 1)
    passes = {"C, passes": _drawing(draws["C"], 1, prompt_tokens - 1, "refill", CONTEXTS)}
    if importlib.util.find_spec("llama_cpp"):
        passes["llama.cpp, passes"] = _llama_cpp_passes(models["mixed"])
    if with_torch:
        torch_streams, torch_prompts, settings["torch_threads"] = _torch_work(models, new_tokens, prompts_BT)
        streams, prompts = streams | torch_streams, prompts | torch_prompts
    timings = take_turns(streams | side_by_side | prompts | passes, rounds)
    tokens = dict.fromkeys(streams, new_tokens) | dict.fromkeys(side_by_side, STREAMS * new_tokens)
    tokens |= dict.fromkeys(prompts, PASSES * prompts_BT.size) | dict.fromkeys(passes, in_context)
    return make_report("serve", settings, throughput(timings, tokens), timings, COMPARISONS)


def _drawing(draw: Callable[..., object], streams: int, new_tokens: int, overflow: Overflow, times: int = 1) -> Work:
    prompt_BT = np.zeros((streams, 1), np.int32)

    def work() -> None:
        for _ in range(times):
            draw(prompt_BT, new_tokens, temperature=TEMPERATURE, overflow=overflow)

    return work


def _generate(engine: Engine, prompt_BT: npt.NDArray[np.integer], new_tokens: int, **settings: Any) -> None:
    for _ in engine.pieces(prompt_BT, Sampling(new_tokens, **settings)):
        pass


def _llama_cpp_passes(model: Int8Model) -> Work:
    """Single tokens until the context is full, through the functions of the C library."""
    from llama_cpp import llama_batch_get_one, llama_cpp, llama_decode

    from picogpt_jax.formats.gguf_export import save_gguf
    from picogpt_jax.runtimes.llama_cpp_model import LlamaCppGPT

    with tempfile.TemporaryDirectory() as folder:
        save_gguf(model, Path(folder) / "model.gguf")
        llama = LlamaCppGPT(Path(folder) / "model.gguf")._llama
    ids = (ctypes.c_int32 * 1)()
    llama_cpp.llama_set_n_threads(llama.ctx, 1, 1)

    def work() -> None:
        batch = llama_batch_get_one(ids, 1)
        for _ in range(CONTEXTS):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
            for _ in range(model.model.block_size - 1):
                if llama_decode(llama.ctx, batch):
                    raise RuntimeError("llama.cpp did not compute a token")

    return work


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
