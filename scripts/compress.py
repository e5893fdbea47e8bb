"""Compresses a file with an int8 model: `python scripts/compress.py --model=INT8 --input=a.txt --output=a.pgz`.

The model must be of integer arithmetic: then every runtime decompresses what another one compressed.
"""

import contextlib
from pathlib import Path
from typing import Any

from absl import flags

from picogpt_jax import cli
from picogpt_jax.errors import UserError, command, errors_in
from picogpt_jax.files import atomic_path
from picogpt_jax.formats import compression, loading
from picogpt_jax.runtimes.loop import Loop

MODEL = cli.DEFINE_path("model", None, "An int8 folder of integer arithmetic, or an export of one.")
INPUT = cli.DEFINE_path("input", None, "The file to compress, or with --decompress the compressed file.")
OUTPUT = cli.DEFINE_path("output", None, "The file to write.")
DECOMPRESS = flags.DEFINE_bool("decompress", False, "Bring the content back.")
RUNTIME = flags.DEFINE_enum(
    "runtime", "auto", ["auto", "jax", "torch", "onnx", "numpy", "c"], "What computes; any reads the file."
)
BLOCK_SIZE = flags.DEFINE_integer(
    "block_size",
    compression.BLOCK_SIZE,
    "Tokens of a block. More take a little less room; fewer are decompressed faster, as more stand side by side.",
    lower_bound=1,
    upper_bound=compression.LARGEST_BLOCK,
)


def main() -> None:
    if MODEL.value is None or INPUT.value is None or OUTPUT.value is None:
        raise UserError("--model, --input and --output are needed, e.g. --model=INT8 --input=a.txt --output=a.pgz")
    content = read(INPUT.value)
    is_folder = RUNTIME.value == "auto" and Path(MODEL.value, "model.safetensors").is_file()
    model = loading.load(MODEL.value, RUNTIME.value, "cpu" if is_folder else "auto")
    if model.digest is None:
        make = command("scripts/quantize.py", workdir="WORKDIR", arithmetic="integer", output="INT8_FOLDER")
        raise UserError(f"{MODEL.value} is no model of integer arithmetic; make one with: {make}")
    computing: Any = model.engine.runtime if isinstance(model.engine, Loop) else model.engine
    settings = (computing, model.vocabulary, model.digest)
    with errors_in(INPUT.value):
        if DECOMPRESS.value:
            result = compression.decompress(content, *settings)
        else:
            result = compression.compress(content, *settings, BLOCK_SIZE.value)
    with atomic_path(OUTPUT.value) as temporary:
        temporary.write_bytes(result)
    plain, packed = (result, content) if DECOMPRESS.value else (content, result)
    characters, unit = len(plain), "byte"
    with contextlib.suppress(UnicodeDecodeError):
        characters, unit = len(plain.decode("utf-8")), "character"
    bits = f", {8 * len(packed) / characters:.4f} bits per {unit}" if characters else ""
    print(f"wrote {OUTPUT.value}: {len(content):,} bytes -> {len(result):,} bytes{bits}")


def read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read --input={path}: {error.strerror}; give a file that can be read") from None


if __name__ == "__main__":
    cli.run(main)
