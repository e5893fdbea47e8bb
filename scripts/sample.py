"""Prints text from a model: `python scripts/sample.py --model=runs/shakespeare/int8 --start="ROMEO:"`."""

import os
import sys
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from absl import flags

from picogpt_jax import cli
from picogpt_jax.errors import UserError, errors_in
from picogpt_jax.formats import loading
from picogpt_jax.runtimes.engine import Sampling
from picogpt_jax.text.plain import read_text
from picogpt_jax.text.vocabulary import Vocabulary

MODEL = cli.DEFINE_path(
    "model", None, "A workdir (float), an int8 folder, a PyTorch .pt, an ONNX folder, or a GGUF file."
)
RUNTIME = flags.DEFINE_enum(
    "runtime",
    "auto",
    ["auto", "jax", "torch", "onnx", "numpy", "c", "llama.cpp"],
    "What computes; torch takes int8 models, numpy int8 folders, c those of integer arithmetic, "
    "onnx what convert.py --to=onnx wrote, llama.cpp GGUF. "
    "auto: JAX with an accelerator or for float parameters, else what answers first.",
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
SHOW_STATS = flags.DEFINE_bool("show_stats", False, "Print size, runtime and speed after the text.")
DEVICE = flags.DEFINE_enum("device", "auto", ["auto", "cpu", "gpu", "tpu"], "Where JAX computes.")
TENSOR = flags.DEFINE_integer(
    "tensor", 1, "JAX devices that split the matrices of an int8 model and its KV cache among them.", lower_bound=1
)


def main() -> None:
    began = time.perf_counter()
    if MODEL.value is None:
        raise UserError("--model is needed: a workdir, an int8 folder or a PyTorch .pt file")
    model = loading.load(MODEL.value, RUNTIME.value, DEVICE.value, TENSOR.value)
    prompt = model.vocabulary.encode(start_text(model.vocabulary), "--start")
    prompt_BT = np.tile(prompt, (NUM_SAMPLES.value, 1))
    loaded = time.perf_counter()
    arrivals: list[float] = []

    def pieces() -> Iterator[npt.NDArray[np.integer]]:
        settings = (MAX_NEW_TOKENS.value, TEMPERATURE.value, TOP_K.value, SEED.value, OVERFLOW.value)
        for piece_BN in model.engine.pieces(prompt_BT, Sampling(*settings)):
            arrivals.append(time.perf_counter())
            yield piece_BN

    if NUM_SAMPLES.value == 1:
        print(model.vocabulary.decode(prompt), end="", flush=True)
        for text in model.texts(piece_BN[0] for piece_BN in pieces()):
            print(text, end="", flush=True)
        print()
    else:
        for index, row in enumerate(np.concatenate([prompt_BT, *pieces()], axis=1)):
            print(f"--- sample {index + 1}\n{model.vocabulary.decode(row)}")
    if SHOW_STATS.value:
        speed = NUM_SAMPLES.value * MAX_NEW_TOKENS.value / (time.perf_counter() - loaded)
        first = f", first tokens {arrivals[0] - began:.2f} s after the start" if arrivals else ""
        print(f"--- {model.description}", file=sys.stderr)
        print(f"--- {speed:,.0f} tokens/s with compilation{first}", file=sys.stderr)


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


if __name__ == "__main__":
    cli.run(main)
