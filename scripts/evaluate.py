"""The loss of a model: `python scripts/evaluate.py --model=runs/debug/int8 --data=data/stdlib_char`."""

import math
from typing import Any

from absl import flags

from picogpt_jax import cli
from picogpt_jax.errors import UserError
from picogpt_jax.files import write_json
from picogpt_jax.formats import sources
from picogpt_jax.text.batches import Tokens
from picogpt_jax.text.reading import vocabulary_of_data
from picogpt_jax.text.vocabulary import Vocabulary

MODEL = cli.DEFINE_path("model", None, "A workdir, an int8 folder, a PyTorch .pt, an ONNX folder, or a GGUF file.")
DATA = cli.DEFINE_path("data", None, "Folder with train.bin, val.bin and meta.json.")
RUNTIME = flags.DEFINE_enum(
    "runtime",
    "jax",
    ["jax", "torch", "onnx", "numpy", "llama.cpp"],
    "What computes; torch takes int8 models, numpy int8 folders, onnx what convert.py --to=onnx wrote, llama.cpp GGUF.",
)
SPLIT = flags.DEFINE_enum("split", "val", ["train", "val"], "Which part of the text.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "Targets to evaluate. Default: all.", lower_bound=1)
FORWARD = flags.DEFINE_enum(
    "forward",
    "trained",
    ["trained", "float"],
    "Of a workdir: the forward pass it was trained with (quantized, after QAT), or its plain float parameters.",
)
JSON = cli.DEFINE_path("json", None, "File for the result.")
DEVICE = flags.DEFINE_enum("device", "auto", ["auto", "cpu", "gpu", "tpu"], "Where JAX computes.")

BATCH_SIZE = 32  # windows computed at once


def main() -> None:
    if MODEL.value is None or DATA.value is None:
        raise UserError("--model and --data are needed, e.g. --model=runs/debug/int8 --data=data/stdlib_char")
    cli.check_device_flags(RUNTIME.value, DEVICE.value)
    kind = sources.recognise(MODEL.value)
    is_int8 = kind in ("int8", "torch-int8", "onnx", "gguf")
    if is_int8 and FORWARD.value == "float":
        raise UserError(
            f"--forward=float: {MODEL.value} has int8 codes only; give --model=WORKDIR, or leave --forward out"
        )
    if RUNTIME.value == "torch":
        loss, tokens, vocabulary = evaluate_torch()
    elif RUNTIME.value == "jax":
        loss, tokens, vocabulary = evaluate_jax(is_int8)
    else:
        loss, tokens, vocabulary = evaluate_shared()
    targets = Tokens.open(DATA.value, SPLIT.value, 1, vocabulary.size).ids[1 : tokens + 1]
    unit, tokens_a_unit = vocabulary.bits_unit(targets)
    bits = loss / math.log(2) * tokens_a_unit
    result = {"loss": loss, unit: bits, "tokens": tokens, "runtime": RUNTIME.value, "model": MODEL.value}
    if JSON.value:
        write_json(JSON.value, result)
    name = "bits per token" if unit == "bits_per_token" else "bits per character"
    print(f"loss {loss:.6f} nats, {bits:.4f} {name}, {tokens:,} tokens ({kind}, {RUNTIME.value})")


def open_tokens(block_size: int, vocabulary: Vocabulary) -> Tokens:
    """The tokens to evaluate, after checking that they are of the model's vocabulary."""
    if not vocabulary.fits(vocabulary_of_data(DATA.value, vocabulary.size)):
        raise UserError(f"--data={DATA.value} has another vocabulary than --model={MODEL.value}; give its own data")
    tokens = Tokens.open(DATA.value, SPLIT.value, block_size, vocabulary.size)
    if MAX_TOKENS.value is not None:
        tokens = Tokens(ids=tokens.ids[: MAX_TOKENS.value + 1], path=tokens.path)
    return tokens


def evaluate_torch() -> tuple[float, int, Vocabulary]:
    from picogpt_jax.runtimes.torch_model import Int8GPT

    model = sources.load_int8(MODEL.value)
    tokens = open_tokens(model.model.block_size, model.vocabulary)
    return Int8GPT(model).evaluate(tokens.ids, model.model.block_size, BATCH_SIZE), len(tokens) - 1, model.vocabulary


def evaluate_shared() -> tuple[float, int, Vocabulary]:
    from picogpt_jax.runtimes import loop

    model: Any
    if RUNTIME.value == "numpy":
        model, vocabulary = sources.load_numpy(MODEL.value)
    else:
        model = sources.load_onnx(MODEL.value) if RUNTIME.value == "onnx" else sources.load_gguf(MODEL.value)
        vocabulary = model.vocabulary
    tokens = open_tokens(model.block_size, vocabulary)
    return loop.evaluate(model, tokens.ids, model.block_size, BATCH_SIZE), len(tokens) - 1, vocabulary


def evaluate_jax(is_int8: bool) -> tuple[float, int, Vocabulary]:
    from picogpt_jax.devices.setup import set_up_jax

    set_up_jax(DEVICE.value, cpu_devices=1)
    import jax

    from picogpt_jax.config import MeshConfig
    from picogpt_jax.devices.sharding import make_mesh
    from picogpt_jax.int8 import convert
    from picogpt_jax.model.gpt import GPT
    from picogpt_jax.model.numerics import Numerics
    from picogpt_jax.training.evaluate import Evaluator

    if is_int8:
        model = sources.load_int8(MODEL.value)
        config, vocabulary = model.model, model.vocabulary
        network, variables = (
            GPT(config, Numerics(convert.serving_quant(model), "serve")),
            convert.serving_variables(model),
        )
    else:
        source = sources.load_float(MODEL.value)
        config, vocabulary = source.config, source.vocabulary
        is_workdir = sources.recognise(MODEL.value) == "workdir"
        quantized = source.qat and FORWARD.value == "trained" and is_workdir
        network, variables = (
            GPT(config, Numerics(source.quant, "train" if quantized else "float")),
            {"params": source.params},
        )
    tokens = open_tokens(config.block_size, vocabulary)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), BATCH_SIZE, jax.devices()[:1])
    evaluator = Evaluator(network.apply, mesh, config.block_size, BATCH_SIZE)
    return evaluator.loss(variables, tokens.ids), len(tokens) - 1, vocabulary


if __name__ == "__main__":
    cli.run(main)
