"""Prints text from a model: `python scripts/sample.py --model=runs/shakespeare/int8 --start="ROMEO:"`."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from absl import flags

from picogpt_jax import cli
from picogpt_jax.errors import UserError, errors_in
from picogpt_jax.formats import sources
from picogpt_jax.text.plain import read_text
from picogpt_jax.text.vocabulary import Vocabulary

MODEL = cli.DEFINE_path(
    "model", None, "A workdir (float), an int8 folder, a PyTorch .pt, an ONNX folder, or a GGUF file."
)
RUNTIME = flags.DEFINE_enum(
    "runtime",
    "jax",
    ["jax", "torch", "onnx", "numpy", "llama.cpp"],
    "What computes; torch takes int8 models, numpy int8 folders, onnx what convert.py --to=onnx wrote, llama.cpp GGUF.",
)
START = flags.DEFINE_string("start", None, "Text to continue, or FILE:path. Default: a line break.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Texts drawn at once.", lower_bound=1, upper_bound=1 << 20)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 500, "Tokens drawn for each.", lower_bound=0, upper_bound=1 << 30
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "0 takes the likeliest token; 1 draws as trained.", lower_bound=0.0, upper_bound=1e30
)
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among the k likeliest tokens; 0: among all.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 1337, "Of the draws.", lower_bound=0, upper_bound=2**32 - 1)
OVERFLOW = flags.DEFINE_enum(
    "overflow",
    "slide",
    ["slide", "refill"],
    "Past block_size: slide the window (exact, slow) or refill the cache (fast).",
)
SHOW_STATS = flags.DEFINE_bool("show_stats", False, "Print size and speed after the text.")
DEVICE = flags.DEFINE_enum("device", "auto", ["auto", "cpu", "gpu", "tpu"], "Where JAX computes.")
TENSOR = flags.DEFINE_integer(
    "tensor", 1, "JAX devices that split the matrices of an int8 model and its KV cache among them.", lower_bound=1
)

CHARACTER_BYTES = 4  # at most, in UTF-8

# prompt [B, T], called with each new piece [B, n] -> [B, T + max_new_tokens]
Generate = Callable[[npt.NDArray[np.int64], Callable[[npt.NDArray[np.integer]], None]], npt.NDArray[np.integer]]


def main() -> None:
    began = time.perf_counter()
    if MODEL.value is None:
        raise UserError("--model is needed: a workdir, an int8 folder or a PyTorch .pt file")
    cli.check_device_flags(RUNTIME.value, DEVICE.value, TENSOR.value)
    kind = sources.recognise(MODEL.value)
    generate, vocabulary, size = RUNTIMES[RUNTIME.value](kind)
    prompt = vocabulary.encode(start_text(vocabulary), "--start").astype(np.int64)
    prompt_BT = np.tile(prompt, (NUM_SAMPLES.value, 1))

    shown = prompt.tolist() if NUM_SAMPLES.value == 1 else None
    arrivals: list[float] = []
    unshown: list[int] = []
    if shown:
        print(vocabulary.decode(shown), end="", flush=True)

    def show(piece_BN: npt.NDArray[np.integer]) -> None:
        arrivals.append(time.perf_counter())
        unshown.extend(piece_BN[0].tolist() if shown else ())
        text = vocabulary.decode(unshown)
        if not text.endswith("\ufffd") or len(unshown) >= CHARACTER_BYTES:  # a token may end within a character
            print(text, end="", flush=True)
            unshown.clear()

    loaded = time.perf_counter()
    text_BT = generate(prompt_BT, show)
    seconds = time.perf_counter() - loaded
    if shown:
        print(vocabulary.decode(unshown))
    else:
        for index, row in enumerate(text_BT):
            print(f"--- sample {index + 1}\n{vocabulary.decode(row)}")
    if SHOW_STATS.value:
        drawn = NUM_SAMPLES.value * MAX_NEW_TOKENS.value
        first = f", first tokens {arrivals[0] - began:.2f} s after the start" if arrivals else ""
        print(f"--- {size}", file=sys.stderr)
        print(f"--- {drawn / seconds:,.0f} tokens/s with compilation{first}", file=sys.stderr)


def start_text(vocabulary: Vocabulary) -> str:
    """The prompt; by default a line break, where the vocabulary has one."""
    if START.value is None:
        return vocabulary.default_prompt
    if START.value.startswith("FILE:"):
        with errors_in("--start"):
            return read_text(os.path.expanduser(START.value.removeprefix("FILE:")))
    if not START.value:
        raise UserError("--start is empty; give at least one character")
    return START.value


def load_jax(kind: sources.Kind) -> tuple[Generate, Vocabulary, str]:
    from picogpt_jax.devices.setup import set_up_jax

    set_up_jax(DEVICE.value)
    from picogpt_jax.config import MeshConfig
    from picogpt_jax.devices.sharding import make_mesh
    from picogpt_jax.runtimes.jax_generator import Generator

    if TENSOR.value > 1 and kind not in ("int8", "torch-int8"):
        raise UserError("--tensor splits int8 models; give --model=INT8_FOLDER, or leave --tensor out")
    if kind in ("int8", "torch-int8"):
        model = sources.load_int8(MODEL.value)
        mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=TENSOR.value), 1) if TENSOR.value > 1 else None
        generator, vocabulary, size = Generator.from_int8(model, mesh), model.vocabulary, describe_int8(model)
    else:
        source = sources.load_float(MODEL.value)
        generator, vocabulary = Generator.from_params(source.config, source.params), source.vocabulary
        count = source.config.n_parameters
        size = f"{count:,} parameters, 0% int8, {4 * count:,} bytes of float32"
    options: dict[str, Any] = {"temperature": TEMPERATURE.value, "top_k": TOP_K.value or None, "seed": SEED.value}

    def generate(
        prompt_BT: npt.NDArray[np.int64], stream: Callable[[npt.NDArray[np.integer]], None]
    ) -> npt.NDArray[np.integer]:
        return generator.generate(prompt_BT, MAX_NEW_TOKENS.value, overflow=OVERFLOW.value, stream=stream, **options)

    return generate, vocabulary, size


def load_torch(kind: sources.Kind) -> tuple[Generate, Vocabulary, str]:
    import torch

    from picogpt_jax.runtimes.torch_model import Int8GPT

    model = sources.load_int8(MODEL.value)
    network = Int8GPT(model)

    def generate(
        prompt_BT: npt.NDArray[np.int64], stream: Callable[[npt.NDArray[np.integer]], None]
    ) -> npt.NDArray[np.integer]:
        return network.generate(
            torch.from_numpy(prompt_BT),
            MAX_NEW_TOKENS.value,
            temperature=TEMPERATURE.value,
            top_k=TOP_K.value or None,
            seed=SEED.value,
            overflow=OVERFLOW.value,
            callback=lambda token_B: stream(token_B.numpy()[:, None]),
        ).numpy()

    return generate, model.vocabulary, describe_int8(model)


def load_onnx(kind: sources.Kind) -> tuple[Generate, Vocabulary, str]:
    model = sources.load_onnx(MODEL.value)
    size = (Path(MODEL.value) / sources.ONNX_FILE).stat().st_size
    return shared_loop(model), model.vocabulary, f"{model.config.n_parameters:,} parameters, a file of {size:,} bytes"


def load_llama_cpp(kind: sources.Kind) -> tuple[Generate, Vocabulary, str]:
    model = sources.load_gguf(MODEL.value)
    return shared_loop(model), model.vocabulary, f"{model.description}; {Path(MODEL.value).stat().st_size:,} bytes"


def load_numpy(kind: sources.Kind) -> tuple[Generate, Vocabulary, str]:
    model, vocabulary = sources.load_numpy(MODEL.value)
    return shared_loop(model), vocabulary, describe_int8(sources.load_int8(MODEL.value))


def shared_loop(model: Any) -> Generate:
    from picogpt_jax.runtimes import loop

    options: dict[str, Any] = {"temperature": TEMPERATURE.value, "top_k": TOP_K.value, "seed": SEED.value}
    return lambda prompt_BT, stream: loop.generate(
        model, prompt_BT, MAX_NEW_TOKENS.value, overflow=OVERFLOW.value, stream=stream, **options
    )


def describe_int8(model: Any) -> str:
    from picogpt_jax.int8.int8_model import size_report

    size = size_report(model)
    return (
        f"{model.model.n_parameters:,} parameters, {100 * size.int8_share:.2f}% int8, {size.total_bytes:,} bytes "
        f"({size.float32_bytes / size.total_bytes:.2f}x smaller than float32)"
    )


RUNTIMES = {
    "jax": load_jax,
    "torch": load_torch,
    "onnx": load_onnx,
    "numpy": load_numpy,
    "llama.cpp": load_llama_cpp,
}

if __name__ == "__main__":
    cli.run(main)
