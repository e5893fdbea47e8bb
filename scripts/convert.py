"""Writes a model in another format: `python scripts/convert.py --input=runs/m/int8 --to=torch-int8 --output=m.pt`."""

import sys
from pathlib import Path

from absl import flags

from picogpt_jax import cli, sources
from picogpt_jax.errors import UserError
from picogpt_jax.int8_model import Int8Model
from picogpt_jax.vocabulary import Vocabulary

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # configs/: an imported workdir needs a configuration

INPUT = flags.DEFINE_string(
    "input", None, "A workdir, an int8 folder, a PyTorch .pt file, or a Hugging Face GPT-2 folder."
)
OUTPUT = flags.DEFINE_string("output", None, "The file or folder to write.")
TO = flags.DEFINE_enum(
    "to",
    None,
    ["torch", "torch-int8", "checkpoint"],
    "torch: nanoGPT's float ckpt.pt; torch-int8: picoGPT's int8 file; checkpoint: a workdir to train further, of any "
    "model.",
)
REQUANTIZE = flags.DEFINE_enum(
    "requantize", None, ["per_tensor"], "For picoGPT's own loader: one scale per matrix, made from one per channel."
)
DATA = flags.DEFINE_string(
    "data",
    None,
    "With --requantize: data folder on which to measure what it costs in loss. With --to=checkpoint: folder with the "
    "vocabulary (meta.json, nanoGPT's meta.pkl or a tokenizer.json) of a model that comes without.",
)


def main() -> None:
    if INPUT.value is None or OUTPUT.value is None or TO.value is None:
        raise UserError(
            "--input, --to and --output are needed, e.g. --input=runs/debug/int8 --to=torch-int8 --output=m.pt"
        )
    if REQUANTIZE.value and TO.value != "torch-int8":
        raise UserError(f"--requantize goes with --to=torch-int8, not with --to={TO.value}")
    if DATA.value and not REQUANTIZE.value and TO.value != "checkpoint":
        raise UserError("--data goes with --requantize=per_tensor, whose cost it measures; leave it out")
    if TO.value == "checkpoint":
        to_checkpoint()
    elif TO.value == "torch":
        to_torch()
    else:
        to_torch_int8()


def to_checkpoint() -> None:
    from picogpt_jax.devices import set_up_jax

    set_up_jax("cpu", cpu_devices=1)
    from configs.base import get_config
    from picogpt_jax.import_checkpoint import load_for_import, write_workdir

    source = load_for_import(INPUT.value, DATA.value)
    write_workdir(source, get_config().to_dict(), OUTPUT.value)
    print(f"wrote {OUTPUT.value}: {source.config.n_parameters:,} parameters, {source.config.vocab_size:,} tokens")
    print(f"train it with: python scripts/train.py --config=configs/finetune.py --workdir={OUTPUT.value}")


def to_torch() -> None:
    from picogpt_jax.devices import set_up_jax

    set_up_jax("cpu", cpu_devices=1)
    from picogpt_jax.convert import float_arrays
    from picogpt_jax.torch_checkpoint import save_float_checkpoint

    source = sources.load_float(INPUT.value)
    save_float_checkpoint(
        source.config,
        float_arrays(source.config, source.params),
        OUTPUT.value,
        iter_num=source.step,
        best_val_loss=source.val_loss if source.val_loss is not None else float("inf"),
        config=source.run.to_dict() if source.run else {},
        vocabulary=source.vocabulary,
    )
    print(f"wrote {OUTPUT.value}: nanoGPT's float checkpoint of step {source.step:,}")


def to_torch_int8() -> None:
    from picogpt_jax.int8_model import requantize_per_tensor
    from picogpt_jax.torch_int8_checkpoint import save_int8_checkpoint

    model = sources.load_int8(INPUT.value)
    save_int8_checkpoint(model, OUTPUT.value, requantize=REQUANTIZE.value)
    print(f"wrote {OUTPUT.value}: picoGPT's int8 checkpoint")
    if REQUANTIZE.value:
        if DATA.value is None:
            print("one scale per matrix costs some loss; --data=DIR measures how much")
            return
        before, after = (loss(candidate) for candidate in (model, requantize_per_tensor(model)))
        granularity = model.quantization.weight_granularity
        print(f"loss {granularity} {before:.6f}, per_tensor {after:.6f} nats: {after - before:+.6f}")


def loss(model: Int8Model) -> float:
    from picogpt_jax.data import Tokens
    from picogpt_jax.torch_model import Int8GPT

    config = model.model
    if Vocabulary.from_data_dir(DATA.value) != model.vocabulary:
        raise UserError(f"--data={DATA.value} has another vocabulary than --input={INPUT.value}; give its own data")
    tokens = Tokens.open(DATA.value, "val", config.block_size, config.vocab_size)
    return Int8GPT(model).evaluate(tokens.ids, config.block_size)


if __name__ == "__main__":
    cli.run(main)
