"""The loss of a model: `python scripts/evaluate.py --model=runs/debug/int8 --data=data/stdlib_char`."""

import math

from absl import flags

from picogpt_jax import cli
from picogpt_jax.errors import UserError
from picogpt_jax.files import write_json
from picogpt_jax.formats import loading, sources
from picogpt_jax.text.batches import Tokens
from picogpt_jax.text.reading import vocabulary_of_data
from picogpt_jax.text.vocabulary import Vocabulary

MODEL = cli.DEFINE_path("model", None, "A workdir, an int8 folder, a PyTorch .pt, an ONNX folder, or a GGUF file.")
DATA = cli.DEFINE_path("data", None, "Folder with train.bin, val.bin and meta.json.")
RUNTIME = flags.DEFINE_enum(
    "runtime",
    "auto",
    ["auto", "jax", "torch", "onnx", "numpy", "c", "llama.cpp"],
    "What computes; torch takes int8 models, numpy int8 folders, c those of integer arithmetic, "
    "onnx what convert.py --to=onnx wrote, llama.cpp GGUF. "
    "auto: an export's own runtime, else JAX.",
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


def main() -> None:
    if MODEL.value is None or DATA.value is None:
        raise UserError("--model and --data are needed, e.g. --model=runs/debug/int8 --data=data/stdlib_char")
    kind = sources.recognise(MODEL.value)
    if kind in loading.INT8 and FORWARD.value == "float":
        raise UserError(
            f"--forward=float: {MODEL.value} has int8 codes only; give --model=WORKDIR, or leave --forward out"
        )
    runtime = loading.EXPORTS.get(kind, "jax") if RUNTIME.value == "auto" else RUNTIME.value  # fast for much text
    model = loading.load(MODEL.value, runtime, DEVICE.value, forward=FORWARD.value)
    ids = open_tokens(model.config.block_size, model.vocabulary).ids
    loss, tokens = model.engine.loss(ids), len(ids) - 1
    targets = Tokens.open(DATA.value, SPLIT.value, 1, model.vocabulary.size).ids[1 : tokens + 1]
    unit, tokens_a_unit = model.vocabulary.bits_unit(targets)
    bits = loss / math.log(2) * tokens_a_unit
    result = {"loss": loss, unit: bits, "tokens": tokens, "runtime": model.runtime, "model": MODEL.value}
    if JSON.value:
        write_json(JSON.value, result)
    name = "bits per token" if unit == "bits_per_token" else "bits per character"
    print(f"loss {loss:.6f} nats, {bits:.4f} {name}, {tokens:,} tokens ({kind}, {model.runtime})")


def open_tokens(block_size: int, vocabulary: Vocabulary) -> Tokens:
    """The tokens to evaluate, after checking that they are of the model's vocabulary."""
    if not vocabulary.fits(vocabulary_of_data(DATA.value, vocabulary.size)):
        raise UserError(f"--data={DATA.value} has another vocabulary than --model={MODEL.value}; give its own data")
    tokens = Tokens.open(DATA.value, SPLIT.value, block_size, vocabulary.size)
    if MAX_TOKENS.value is not None:
        tokens = Tokens(ids=tokens.ids[: MAX_TOKENS.value + 1], path=tokens.path)
    return tokens


if __name__ == "__main__":
    cli.run(main)
