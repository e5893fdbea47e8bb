"""One int8 model in every runtime: `python scripts/compare.py --model=runs/m/int8 --data=data/m --output=runs/m/compare`.

Writes the exports, `compare.json` and `compare.png` to --output, and prints the table.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from absl import flags

from picogpt_jax import cli
from picogpt_jax.errors import UserError
from picogpt_jax.files import write_json

RUNTIMES = ["jax", "torch", "onnx", "numpy", "llama.cpp"]

MODEL = flags.DEFINE_string("model", None, "An int8 folder.")
DATA = flags.DEFINE_string("data", None, "Its data: folder with train.bin, val.bin and meta.json.")
OUTPUT = flags.DEFINE_string("output", None, "Folder for the exports, compare.json and compare.png.")
RUNTIME = flags.DEFINE_list("runtimes", None, f"Of {', '.join(RUNTIMES)}. Default: those that are installed.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "Targets to compare on. Default: all of val.bin.", lower_bound=1)
PROMPTS = flags.DEFINE_integer("prompts", 100, "Greedy texts to compare; 0: none.", lower_bound=0)
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 16, "Tokens of each prompt.", lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 200, "Tokens of each greedy text.", lower_bound=1)
SPEED_TOKENS = flags.DEFINE_integer("speed_tokens", 2000, "Tokens of the timed sample; 0: no timing.", lower_bound=0)

EXTRAS = {"torch": ("torch", "torch"), "onnx": ("onnxruntime", "onnx"), "llama.cpp": ("llama_cpp", None)}  # module, extra


def main() -> None:
    if MODEL.value is None or DATA.value is None or OUTPUT.value is None:
        raise UserError("--model, --data and --output are needed; --model is an int8 folder of scripts/quantize.py")
    runtimes = chosen_runtimes()
    from picogpt_jax.devices import set_up_jax

    set_up_jax("cpu", cpu_devices=1)
    from picogpt_jax import compare
    from picogpt_jax.data import Tokens
    from picogpt_jax.int8_model import load_int8_model
    from picogpt_jax.vocabulary import Vocabulary

    model = load_int8_model(MODEL.value)
    config = model.model
    if Vocabulary.from_data_dir(DATA.value) != model.vocabulary:
        raise UserError(f"--data={DATA.value} has another vocabulary than --model={MODEL.value}; give its own data")
    ids = Tokens.open(DATA.value, "val", config.block_size, config.vocab_size).ids
    if MAX_TOKENS.value is not None:
        ids = ids[: MAX_TOKENS.value + 1]
    paths = write_exports(model, runtimes)
    passes = {name: LOADERS[name](paths[name]) for name in runtimes}

    agreements = compare.agreement({name: forward for name, (forward, _) in passes.items()}, ids, config.block_size)
    texts = {}
    if PROMPTS.value:
        continues = {name: go_on for name, (_, go_on) in passes.items()}
        texts = compare.same_texts(continues, ids, PROMPTS.value, PROMPT_TOKENS.value, NEW_TOKENS.value)
    reference = agreements[compare.REFERENCE].loss
    rows: list[dict[str, Any]] = []
    for name in runtimes:
        result = agreements[name]
        row = {"runtime": name, "model": str(paths[name]), "bytes": compare.disk_bytes(paths[name])}
        row |= {"loss": result.loss, "loss_difference": result.loss - reference}
        row |= {"largest_difference": result.largest_difference, "same_next_token": result.same_next_token}
        row |= {"same_texts": texts.get(name)}
        rows.append(row | (speed(name, paths[name]) if SPEED_TOKENS.value else {}))
    print(f"{len(ids) - 1:,} targets, {PROMPTS.value} greedy texts of {NEW_TOKENS.value} tokens")
    print(compare.format_table(rows))
    write_json(Path(OUTPUT.value) / "compare.json", {"tokens": len(ids) - 1, "runtimes": rows})
    compare.draw(rows, Path(OUTPUT.value) / "compare.png", f"One int8 model, {len(rows)} runtimes")
