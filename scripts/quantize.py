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
    from picogpt_jax.int8.int8_model import Int8Model
    from picogpt_jax.int8.integer_model import IntegerModel

LOSS_TOKENS = 10_240  # whose loss shows what integers cost

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
ARITHMETIC = flags.DEFINE_enum(
    "arithmetic",
    None,
    ["mixed", "integer"],
    "mixed: floats between the products (format version 1); integer: integers from end to end, the same bits in every "
    "runtime (version 2). Default: as trained.",
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
    from picogpt_jax.int8.integer_model import IntegerModel
    from picogpt_jax.training.metrics import METRICS_FILE
    from picogpt_jax.training.plot import curves_to_json

    source = sources.load_float(WORKDIR.value)
    quant = source.quant
    if GRANULARITY.value:
        quant = dataclasses.replace(quant, weight_granularity=GRANULARITY.value)
    if ACTIVATION_BITS.value:
        quant = dataclasses.replace(quant, activation_bits=8 if ACTIVATION_BITS.value == "8" else None)
    training: dict[str, object] = {
        "step": source.step,
        "val_loss": source.val_loss,
        "dataset": (Path(source.run.data.dir).name if source.run else "") or Path(WORKDIR.value).name,
    }
    metrics = Path(WORKDIR.value) / METRICS_FILE
    if metrics.is_file():
        try:
            training["curve"] = curves_to_json(metrics)
        except UserError as error:  # the model does without
            print(f"no curve of the training: {error}")
    arithmetic = ARITHMETIC.value or source.quant.arithmetic
    ids = sources.validation_ids(source)
    tokens_BT, text = sources.example(source, ids)
    parts = (source.config, quant, source.params, source.vocabulary, training, source.qat, tokens_BT)
    model, rows = convert.quantized(*parts, arithmetic)
    save_int8_model(model, OUTPUT.value)

    print(convert.report_table(rows))
    print(f"products: of {tokens_BT.size:,} {text}")
    if isinstance(model, IntegerModel) and ids is not None:
        ids = ids[: LOSS_TOKENS + 1]
        mixed, integer = loss(convert.quantized(*parts, "mixed")[0], ids), loss(model, ids)
        difference = f"{integer - mixed:+.6f} on its first {len(ids) - 1:,} targets"
        print(f"loss: integer {integer:.6f}, mixed {mixed:.6f} nats: {difference}")
    how = "trained with quantization (QAT)" if source.qat else "trained in float: post-training quantization"
    if source.qat and not model.training["quantization_aware"]:
        how += ", but its products were bad: quantized anew, with LayerNorm weights in the matrices that follow them"
    written, float32_bytes = file_bytes(OUTPUT.value), 4 * model.model.n_parameters
    how += f"; {arithmetic} arithmetic, weights {quant.weight_granularity}, activation_bits {quant.activation_bits}"
    print(f"{how}, step {source.step:,}")
    print(
        f"wrote {OUTPUT.value}: {written:,} bytes, {float32_bytes / written:.2f}x smaller than "
        f"{float32_bytes:,} of float32; {100 * model.model.int8_share:.2f}% of the parameters are int8"
    )


def loss(model: "Int8Model | IntegerModel", ids: npt.NDArray[np.uint16]) -> float:
    """Mean loss in nats of the ids."""
    from picogpt_jax.int8.int8_model import config_to_json
    from picogpt_jax.int8.integer_model import IntegerModel, integer_config_to_json
    from picogpt_jax.runtimes.loop import evaluate
    from picogpt_jax.runtimes.numpy_integer import NumpyIntegerGPT
    from picogpt_jax.runtimes.numpy_model import NumpyGPT

    runtime: NumpyGPT | NumpyIntegerGPT
    if isinstance(model, IntegerModel):
        runtime = NumpyIntegerGPT(integer_config_to_json(model), model.tensors)
    else:
        runtime = NumpyGPT(config_to_json(model), model.tensors())
    return evaluate(runtime, ids, model.model.block_size, batch_size=4)  # a few windows fit into a processor's cache


if __name__ == "__main__":
    cli.run(main)
