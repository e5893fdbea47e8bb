"""Writes a model in another format: `python scripts/convert.py --input=runs/m/int8 --to=torch-int8 --output=m.pt`."""

import sys
from pathlib import Path

from absl import flags

from picogpt_jax import cli
from picogpt_jax.errors import UserError, command
from picogpt_jax.formats import sources
from picogpt_jax.int8.folder import VOCABULARY_FILE
from picogpt_jax.int8.int8_model import Int8Model
from picogpt_jax.int8.integer_model import IntegerModel
from picogpt_jax.text.reading import vocabulary_of_data

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # configs/: an imported workdir needs a configuration

INPUT = cli.DEFINE_path("input", None, "A workdir, an int8 folder, a PyTorch .pt file, or a Hugging Face GPT-2 folder.")
OUTPUT = cli.DEFINE_path("output", None, "The file or folder to write.")
TO = flags.DEFINE_enum(
    "to",
    None,
    ["torch", "torch-int8", "huggingface", "gguf", "onnx", "c", "web", "checkpoint"],
    "torch: nanoGPT's float ckpt.pt; torch-int8: picoGPT's int8 file; huggingface: a folder for transformers, GPT-2 in "
    "float with its tokenizer; gguf: a file for llama.cpp, Q8_0; onnx: an int8 folder for ONNX Runtime, with Optimum's "
    "names; c: an int8 folder of integer arithmetic as a program in C; web: the same as an HTML page that runs it; "
    "checkpoint: a workdir to train further, of any model.",
)
REQUANTIZE = flags.DEFINE_enum(
    "requantize", None, ["per_tensor"], "For picoGPT's own loader: one scale per matrix, made from one per channel."
)
DATA = cli.DEFINE_path(
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
    FORMATS[TO.value]()


def to_checkpoint() -> None:
    from picogpt_jax.devices.setup import set_up_jax

    set_up_jax("cpu", cpu_devices=1)
    from configs.base import get_config
    from picogpt_jax.formats.import_checkpoint import load_for_import, write_workdir

    source = load_for_import(INPUT.value, DATA.value)
    write_workdir(source, get_config().to_dict(), OUTPUT.value)
    padding = f", without {source.left_out:,} rows that stand for none" if source.left_out else ""
    tokens = f"{source.config.vocab_size:,} tokens{padding}"
    print(f"wrote {OUTPUT.value}: {source.config.n_parameters:,} parameters, {tokens}")
    data = DATA.value or (source.run.data.dir if source.run else "")
    if not data or not (Path(data) / "train.bin").is_file():
        data = f"{OUTPUT.value}/data"
        prepare = {"input_file": "TEXT", "out_dir": data, "vocabulary": f"{OUTPUT.value}/{VOCABULARY_FILE}"}
        print(f"prepare a text for it with: {command('data/text_char/prepare.py', **prepare)}")
    train = {"config": "configs/finetune.py", "config.data.dir": data, "workdir": OUTPUT.value}
    print(f"train it with: {command('scripts/train.py', **train)}")


def load_float() -> sources.FloatModel:
    from picogpt_jax.devices.setup import set_up_jax

    set_up_jax("cpu", cpu_devices=1)
    return sources.load_float(INPUT.value)


def to_torch() -> None:
    from picogpt_jax.formats.gpt2_tensors import FloatCheckpoint
    from picogpt_jax.formats.torch_checkpoint import save_float_checkpoint
    from picogpt_jax.int8.convert import float_arrays

    source = load_float()
    checkpoint = FloatCheckpoint(
        model=source.config,
        tensors=float_arrays(source.config, source.params),
        iter_num=source.step,
        best_val_loss=source.val_loss if source.val_loss is not None else float("inf"),
        config=source.run.to_dict() if source.run else {},
        vocabulary=source.vocabulary,
    )
    save_float_checkpoint(checkpoint, OUTPUT.value)
    print(f"wrote {OUTPUT.value}: nanoGPT's float checkpoint of step {source.step:,}")


def load_mixed() -> Int8Model:
    """The int8 model, for a format that knows no functions of integers."""
    model = sources.load_int8(INPUT.value)
    if isinstance(model, IntegerModel):
        print("the codes are those of the integer model; the functions between the products are float in this format")
    return model.mixed()


def to_torch_int8() -> None:
    from picogpt_jax.formats.torch_int8_checkpoint import save_int8_checkpoint
    from picogpt_jax.int8.int8_model import requantize_per_tensor

    model = load_mixed()
    written = requantize_per_tensor(model) if REQUANTIZE.value else model
    save_int8_checkpoint(written, OUTPUT.value)
    print(f"wrote {OUTPUT.value}: picoGPT's int8 checkpoint")
    if REQUANTIZE.value:
        if DATA.value is None:
            print("one scale per matrix costs some loss; --data=DIR measures how much")
            return
        before, after = (loss(candidate) for candidate in (model, written))
        granularity = model.quantization.weight_granularity
        print(f"loss {granularity} {before:.6f}, per_tensor {after:.6f} nats: {after - before:+.6f}")


def to_huggingface() -> None:
    from picogpt_jax.formats.huggingface import dequantized, save_huggingface

    if sources.recognise(INPUT.value) in ("int8", "torch-int8"):
        model = load_mixed()
        save_huggingface(model.model, dequantized(model), model.vocabulary, OUTPUT.value)
        what = "the dequantized int8 weights"
    else:
        from picogpt_jax.int8.convert import float_arrays

        source = load_float()
        arrays = float_arrays(source.config, source.params)
        save_huggingface(source.config, arrays, source.vocabulary, OUTPUT.value)
        what = f"the float parameters of step {source.step:,}"
        if source.qat:
            what += ", trained with quantization: give --input=INT8_FOLDER for the weights that it serves"
    print(f"wrote {OUTPUT.value}: a GPT2LMHeadModel with {what}")


def to_gguf() -> None:
    from picogpt_jax.formats.gguf_export import save_gguf

    cost = save_gguf(load_mixed(), OUTPUT.value)
    print(f"wrote {OUTPUT.value}: {Path(OUTPUT.value).stat().st_size:,} bytes, Q8_0 for llama.cpp")
    if cost:
        print(cost)


def to_onnx() -> None:
    model = sources.load_int8(INPUT.value)
    from picogpt_jax.formats.onnx_export import save_onnx

    save_onnx(model, OUTPUT.value)
    size = (Path(OUTPUT.value) / sources.ONNX_FILE).stat().st_size
    print(f"wrote {OUTPUT.value}: {sources.ONNX_FILE} of {size:,} bytes, int8, with its tokenizer")


def to_c() -> None:
    from picogpt_jax.formats.c_export import save_c

    files = save_c(load_integer(), OUTPUT.value)
    size = (Path(OUTPUT.value) / files[-1]).stat().st_size
    print(f"wrote {OUTPUT.value}: a program in C with its model in {files[-1]} of {size:,} bytes; build it with: make")


def to_web() -> None:
    from picogpt_jax.formats.web_export import save_web

    size = save_web(load_integer(), OUTPUT.value)
    print(f"wrote {OUTPUT.value}: a page of {size:,} bytes with the model in it; open it in a browser")


def load_integer() -> IntegerModel:
    """The int8 model, for what computes as C does."""
    model = sources.load_int8(INPUT.value)
    if isinstance(model, IntegerModel):
        return model
    make = command("scripts/quantize.py", workdir="WORKDIR", arithmetic="integer", output="INT8_FOLDER")
    raise UserError(f"{INPUT.value} computes in floats between its products, and C in integers; make one with: {make}")


def loss(model: Int8Model) -> float:
    from picogpt_jax.runtimes.torch_model import Int8GPT
    from picogpt_jax.text.batches import Tokens

    config = model.model
    if not model.vocabulary.fits(vocabulary_of_data(DATA.value, model.vocabulary.size)):
        raise UserError(f"--data={DATA.value} has another vocabulary than --input={INPUT.value}; give its own data")
    tokens = Tokens.open(DATA.value, "val", config.block_size, config.vocab_size)
    return Int8GPT(model).evaluate(tokens.ids, config.block_size)


FORMATS = {
    "torch": to_torch,
    "torch-int8": to_torch_int8,
    "huggingface": to_huggingface,
    "gguf": to_gguf,
    "onnx": to_onnx,
    "c": to_c,
    "web": to_web,
    "checkpoint": to_checkpoint,
}

if __name__ == "__main__":
    cli.run(main)
