"""One int8 model in every runtime: `python scripts/compare.py --model=runs/m/int8 --data=data/m --output=runs/m/all`.

Writes the exports, `compare.json` and `compare.png` to --output, and prints the table.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from absl import flags

from picogpt_jax import cli
from picogpt_jax.benchmarks import compare
from picogpt_jax.errors import UserError
from picogpt_jax.files import write_json
from picogpt_jax.formats import loading
from picogpt_jax.int8.folder import load_int8_model, stored_version
from picogpt_jax.int8.int8_model import Int8Model
from picogpt_jax.int8.integer_model import INTEGER_VERSION, IntegerModel
from picogpt_jax.runtimes.engine import Sampling
from picogpt_jax.text.batches import Tokens
from picogpt_jax.text.reading import vocabulary_of_data

ALL = ["jax", "torch", "onnx", "numpy", "c", "llama.cpp"]

MODEL = cli.DEFINE_path("model", None, "An int8 folder.")
DATA = cli.DEFINE_path("data", None, "Its data: folder with train.bin, val.bin and meta.json.")
OUTPUT = cli.DEFINE_path("output", None, "Folder for the exports, compare.json and compare.png.")
RUNTIMES = flags.DEFINE_list("runtimes", None, f"Of {', '.join(ALL)}. Default: those that are installed.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "Targets to compare on. Default: all of val.bin.", lower_bound=1)
PROMPTS = flags.DEFINE_integer("prompts", 100, "Texts to compare; 0: none.", lower_bound=0)
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 16, "Tokens of each prompt.", lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 200, "Tokens of each text.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "At which texts are drawn; 0: the likeliest token.", lower_bound=0)
SPEED_TOKENS = flags.DEFINE_integer("speed_tokens", 2000, "Tokens of the timed sample; 0: no timing.", lower_bound=0)

START = "\n"  # the prompt of the timed sample, where the vocabulary has it


def main() -> None:
    if MODEL.value is None or DATA.value is None or OUTPUT.value is None:
        raise UserError("--model, --data and --output are needed; --model is an int8 folder of scripts/quantize.py")
    runtimes = chosen_runtimes()
    model = load_int8_model(MODEL.value)
    ids = open_ids(model)
    failures: dict[str, str] = {}  # runtime -> why it has no figures
    paths: dict[str, Path] = {}
    for name in runtimes:
        try:
            paths[name] = EXPORTS.get(name, lambda _: Path(MODEL.value))(model)
        except UserError as error:
            failures[name] = str(error)
    processes = {
        name: compare.Apart(functools.partial(passes, name, TEMPERATURE.value), path) for name, path in paths.items()
    }

    forwards = {name: process.passes[0] for name, process in processes.items()}
    agreements = compare.agreement(forwards, ids, model.model.block_size, failures)
    texts: dict[str, float] = {}
    if PROMPTS.value:
        continues = {name: process.passes[1] for name, process in processes.items()}
        texts = compare.same_texts(continues, ids, PROMPTS.value, PROMPT_TOKENS.value, NEW_TOKENS.value, failures)
    for process in processes.values():
        process.close()
    rows: list[dict[str, Any]] = []
    for name in runtimes:
        row: dict[str, Any] = {"runtime": name}
        if name not in failures:
            row |= {"model": str(paths[name]), "bytes": compare.disk_bytes(paths[name])}
            row |= dataclasses.asdict(agreements[name]) | {"same_texts": texts.get(name)}
            row["loss_difference"] = agreements[name].loss - agreements[compare.REFERENCE].loss
            try:
                row |= time_sample(name, paths[name], model) if SPEED_TOKENS.value else {}
            except UserError as error:
                failures[name] = str(error)
        rows.append(row | ({"error": failures[name]} if name in failures else {}))
    texts_of = f"{PROMPTS.value} texts of {NEW_TOKENS.value} tokens at temperature {TEMPERATURE.value:g}"
    print(f"{len(ids) - 1:,} targets, {texts_of}")
    print(compare.format_table(rows))
    write_json(Path(OUTPUT.value) / "compare.json", {"tokens": len(ids) - 1, "runtimes": rows})
    compare.draw(rows, Path(OUTPUT.value) / "compare.png", f"One int8 model, {len(rows)} ways to run it")


def chosen_runtimes() -> list[str]:
    """Those of --runtimes, or all that are installed; the reference first."""
    for name in RUNTIMES.value or []:
        if name not in ALL:
            raise UserError(f"--runtimes: {name!r} is not one of {', '.join(ALL)}")
        if not loading.is_installed(name):
            module, extra = loading.EXTRAS[name]
            raise UserError(f"--runtimes={name} needs {module}, which is not installed: pip install '{extra}'")
    if RUNTIMES.value:
        return [name for name in ALL if name in {compare.REFERENCE, *RUNTIMES.value}]
    missing = [name for name in loading.EXTRAS if not loading.is_installed(name)]
    for extra in dict.fromkeys(loading.EXTRAS[name][1] for name in missing):
        left_out = ", ".join(name for name in missing if loading.EXTRAS[name][1] == extra)
        print(f"left out: {left_out}; to include it: pip install '{extra}'")
    computes_integers = stored_version(MODEL.value) == INTEGER_VERSION
    return [name for name in ALL if name not in missing and (name != "c" or computes_integers)]


def open_ids(model: Int8Model | IntegerModel) -> npt.NDArray[np.uint16]:
    if not model.vocabulary.fits(vocabulary_of_data(DATA.value, model.vocabulary.size)):
        raise UserError(f"--data={DATA.value} has another vocabulary than --model={MODEL.value}; give its own data")
    ids = Tokens.open(DATA.value, "val", model.model.block_size, model.model.vocab_size).ids
    return ids if MAX_TOKENS.value is None else ids[: MAX_TOKENS.value + 1]


def passes(runtime: loading.Runtime, temperature: float, path: Path) -> compare.Passes:
    """What a process of its own computes: logits, and texts."""
    engine = loading.load(path, runtime, "cpu").engine

    def texts(prompts_BT: npt.NDArray[np.int64], new_tokens: int) -> npt.NDArray[np.integer]:
        sampling = Sampling(new_tokens, temperature=temperature)
        return np.concatenate([prompts_BT, *engine.pieces(prompts_BT, sampling)], axis=1)

    return engine.logits, texts


def time_sample(name: str, path: Path, model: Int8Model | IntegerModel) -> dict[str, float]:
    """Times `sample.py` with this runtime; the second run counts, when what can be cached on disk is."""
    start = START if START in model.vocabulary.itos else model.vocabulary.itos[0]
    script = Path(__file__).resolve().parent / "sample.py"
    command = [sys.executable, str(script), f"--model={path}", f"--start={start}", f"--runtime={name}"]
    command += [f"--max_new_tokens={SPEED_TOKENS.value}", "--overflow=refill"]
    compare.time_process(command, len(start))
    return dataclasses.asdict(compare.time_process(command, len(start)))


def export_onnx(model: Int8Model | IntegerModel) -> Path:
    folder = Path(OUTPUT.value) / "onnx"
    from picogpt_jax.formats.onnx_export import save_onnx

    save_onnx(model, folder)
    return folder


def export_gguf(model: Int8Model | IntegerModel) -> Path:
    from picogpt_jax.formats.gguf_export import save_gguf

    path = Path(OUTPUT.value) / "model.gguf"
    save_gguf(model.mixed(), path)
    return path


# The others read the int8 folder.
EXPORTS: dict[str, Callable[[Int8Model | IntegerModel], Path]] = {
    "onnx": export_onnx,
    "llama.cpp": export_gguf,
}
if __name__ == "__main__":
    cli.run(main)
