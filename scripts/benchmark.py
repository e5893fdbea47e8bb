"""Measures the speed on this machine, ours beside PyTorch's: `python scripts/benchmark.py WHAT [--json=FILE]`.

train: the default model, QAT and float. decode: int8 text generation in JAX. serve: int8 text generation and prompts in
ONNX Runtime. targets: the C model on other processors, in bytes and instructions. gpu: all that is open on a real GPU.
Run it on an otherwise idle machine.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from picogpt_jax import cli
from picogpt_jax.config import Config
from picogpt_jax.devices.setup import set_up_jax
from picogpt_jax.errors import UserError, command
from picogpt_jax.files import atomic_path, check_own_page, write_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # configs/ import configs.base
DEFAULT_BATCH, GPT2_BATCH = 512, 32  # gpu: sequences a step
VOCAB_SIZE = 65  # tiny Shakespeare's, where the configuration leaves it to the data

WHAT = flags.DEFINE_enum(
    "what", None, ["train", "decode", "serve", "targets", "gpu"], "What to measure; also the first argument."
)
JSON = cli.DEFINE_path("json", None, "File for the machine, versions, figures and ratios.")
DEVICE = flags.DEFINE_enum("device", "auto", ["auto", "cpu", "gpu", "tpu"], "Where to run.")
CONFIG = config_flags.DEFINE_config_file(
    "config", str(ROOT / "configs" / "base.py"), "Configuration of the model and its training.", lock_config=True
)
MODEL = cli.DEFINE_path(
    "model", None, "decode, serve, targets: an int8 folder. decode, serve: default random weights, of --config's size."
)
NEW_TOKENS = flags.DEFINE_integer(
    "new_tokens", 2000, "decode, serve: tokens for each stream (decode: refill).", lower_bound=1
)
SLIDE_TOKENS = flags.DEFINE_integer("slide_tokens", 500, "decode: tokens of the stream, slide.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "How often everything is measured, in turn.", lower_bound=1)
DATA = cli.DEFINE_path("data", "data/shakespeare_char", "gpu: tiny Shakespeare by characters, for the recipe.")
OUTPUT = cli.DEFINE_path("output", None, "gpu: file for the page, HTML.")
TORCH = flags.DEFINE_bool("torch", True, "Measure PyTorch as well.")


def main() -> None:
    if WHAT.value is None:
        example = command("scripts/benchmark.py", what="train")
        raise UserError(f"say what to measure, train, decode, serve, targets or gpu, such as: {example}")
    if MODEL.value is not None and WHAT.value in ("train", "gpu"):
        raise UserError(
            f"--model is for decode and serve; {WHAT.value} has random weights of the size in --config: leave it out"
        )
    if MODEL.value is None and WHAT.value == "targets":
        raise UserError("targets needs --model, the int8 folder of a model in integers")
    sections = cli.config_sections(CONFIG)
    if sections["model"]["vocab_size"] is None:
        sections["model"]["vocab_size"] = VOCAB_SIZE
    if WHAT.value == "gpu":
        return measure_gpu(sections)
    set_up_jax(DEVICE.value)
    report = measure(Config.from_dict(sections))
    from picogpt_jax.benchmarks.report import format_report

    print(format_report(report))
    if JSON.value is not None:
        write_json(JSON.value, report)


def measure(config: Config) -> dict[str, Any]:
    from picogpt_jax.benchmarks import speed  # after set_up_jax
    from picogpt_jax.int8.folder import load_int8_model

    if WHAT.value == "targets":
        from picogpt_jax.benchmarks.targets import benchmark_targets

        return benchmark_targets(load_int8_model(MODEL.value))
    if WHAT.value == "train":
        return speed.benchmark_training(config, ROUNDS.value, TORCH.value)
    model = speed.random_int8_model(config.model) if MODEL.value is None else load_int8_model(MODEL.value)
    if WHAT.value == "serve":
        from picogpt_jax.benchmarks.serving import benchmark_serving

        return benchmark_serving(model, NEW_TOKENS.value, ROUNDS.value, TORCH.value)
    return speed.benchmark_decoding(model, NEW_TOKENS.value, SLIDE_TOKENS.value, ROUNDS.value, TORCH.value)


def measure_gpu(sections: dict[str, dict[str, Any]]) -> None:
    """Leaves JAX alone: the processes that measure need all of the GPU's memory."""
    from configs import gpt2
    from picogpt_jax.benchmarks import gpu, gpu_page
    from picogpt_jax.text.reading import vocabulary_of_data

    large = gpt2.get_config().to_dict()
    for model, batch_size in ((sections, DEFAULT_BATCH), (large, GPT2_BATCH)):
        model["train"] |= {"batch_size": batch_size, "gradient_accumulation_steps": 1}
    models = {gpu.DEFAULT: Config.from_dict(sections), gpu.GPT2: Config.from_dict(large)}
    data = str(Path(DATA.value).absolute())
    with tempfile.TemporaryDirectory(prefix="picogpt_gpu_") as folder:
        processes = gpu.Processes(ROOT, Path(folder))
        parts = gpu.all_parts(processes, data, models, ["--config=configs/shakespeare_char.py"])
        gpu.check_gpu(parts)
        json_file, page_file = JSON.value, OUTPUT.value
        if json_file is None or page_file is None:
            example = command("scripts/benchmark.py", what="gpu", json="gpu.json", output="gpu.html")
            raise UserError(f"gpu writes two files: give --json and --output, such as: {example}")
        check_own_page(page_file, gpu_page.MARK, "page of benchmark.py gpu")
        vocabulary_of_data(data, None)  # the recipe's, before minutes of work

        def save(report: dict[str, Any]) -> None:
            write_json(json_file, report)
            with atomic_path(page_file) as temporary:
                temporary.write_text(gpu_page.page(report), encoding="utf-8")

        report = gpu.run_parts(parts, save)
    for row in report["goals"]:
        print(f"{ {True: 'met', False: 'missed', None: 'open'}[row['is_met']]:<7} {row['goal']}: {row['found']}")
    print(f"wrote {json_file} and {page_file}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"--what={sys.argv[1]}"
    cli.run(main)
