"""Makes a training's int8 model: `python scripts/quantize.py --workdir=runs/debug --output=runs/debug/int8`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from absl import flags

from picogpt_jax import cli
from picogpt_jax.devices.setup import set_up_jax
from picogpt_jax.errors import UserError

if TYPE_CHECKING:
    from picogpt_jax.formats.sources import FloatModel

EXAMPLE_TOKENS = 1024  # whose products are compared

WORKDIR = cli.DEFINE_path(
    "workdir", None, "Workdir of scripts/train.py (its best checkpoint), a float ckpt.pt or a Hugging Face folder."
)
OUTPUT = cli.DEFINE_path("output", None, "Folder for the int8 model.")
GRANULARITY = flags.DEFINE_enum(
    "weight_granularity", None, ["per_channel", "per_tensor"], "Scales of the weights. Default: as trained."
)
ACTIVATION_BITS = flags.DEFINE_enum(
    "activation_bits",
    None,
    ["8", "none"],
    "8: int8 products; none: only the weights are int8. Default: as trained.",
    case_sensitive=False,  # None is how a configuration spells it
)
DEVICE = flags.DEFINE_enum("device", "cpu", ["auto", "cpu", "gpu", "tpu"], "Where to compute.")


def main() -> None:
    if WORKDIR.value is None or OUTPUT.value is None:
        raise UserError("--workdir and --output are needed, e.g. --workdir=runs/debug --output=runs/debug/int8")
    from picogpt_jax.int8.folder import file_bytes, is_int8_folder, save_int8_model

    output = Path(OUTPUT.value)
    if output.is_dir() and any(output.iterdir()) and not is_int8_folder(output):
        raise UserError(f"--output={output} is a folder of other files, which it would replace; name a new one")
    set_up_jax(DEVICE.value, cpu_devices=1)
    from picogpt_jax.formats import sources
    from picogpt_jax.int8 import convert

    source = sources.load_float(WORKDIR.value)
    quant = source.quant
    if GRANULARITY.value:
        quant = dataclasses.replace(quant, weight_granularity=GRANULARITY.value)
    if ACTIVATION_BITS.value:
        quant = dataclasses.replace(quant, activation_bits=8 if ACTIVATION_BITS.value == "8" else None)
    training = {
        "step": source.step,
        "val_loss": source.val_loss,
        "dataset": (Path(source.run.data.dir).name if source.run else "") or Path(WORKDIR.value).name,
    }
    tokens_BT, text = example(source)
    parts = (source.config, quant, source.params, source.vocabulary, training)
    model, rows = convert.quantized(*parts, source.qat, tokens_BT)
    save_int8_model(model, OUTPUT.value)

    print(convert.report_table(rows))
    print(f"products: of {tokens_BT.size:,} tokens of {text}")
    how = "trained with quantization (QAT)" if source.qat else "trained in float: post-training quantization"
    if source.qat and not model.training["quantization_aware"]:
        how += ", but its products were bad: quantized anew, with LayerNorm weights in the matrices that follow them"
    written, float32_bytes = file_bytes(OUTPUT.value), 4 * model.model.n_parameters
    print(f"{how}; weights {quant.weight_granularity}, activation_bits {quant.activation_bits}, step {source.step:,}")
    print(
        f"wrote {OUTPUT.value}: {written:,} bytes, {float32_bytes / written:.2f}x smaller than "
        f"{float32_bytes:,} of float32; {100 * model.model.int8_share:.2f}% of the parameters are int8"
    )


def example(source: "FloatModel") -> tuple[npt.NDArray[np.integer], str]:
    """Token ids [B, T] to measure on, and what they are: the run's validation text, or any where it is not at hand."""
    from picogpt_jax.text.batches import Tokens
    from picogpt_jax.text.reading import vocabulary_of_data

    time = source.config.block_size
    shape = (max(EXAMPLE_TOKENS // time, 1), time)
    try:
        if source.run and source.vocabulary.fits(vocabulary_of_data(source.run.data.dir, source.vocabulary.size)):
            tokens = Tokens.open(source.run.data.dir, "val", time, source.vocabulary.size)
            return tokens.windows(np.linspace(0, len(tokens) - time, shape[0]).astype(np.int64), time), str(tokens.path)
    except UserError:
        pass  # the text of a run that was trained elsewhere
    return np.random.default_rng(0).integers(0, source.vocabulary.size, shape), "no text, drawn at random"


if __name__ == "__main__":
    cli.run(main)
