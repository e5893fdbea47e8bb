"""What `--model` and `--input` name: a workdir, an int8 folder, a PyTorch file, a Hugging Face folder, or an export.

JAX and PyTorch are imported by the loaders that need them, so that each runtime starts without the others.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from picogpt_jax.config import Config, ModelConfig, QuantConfig
from picogpt_jax.errors import UserError, command, errors_in
from picogpt_jax.formats.gpt2_tensors import FloatCheckpoint
from picogpt_jax.formats.import_huggingface import is_huggingface_folder, load_huggingface
from picogpt_jax.int8.folder import VOCABULARY_FILE, is_int8_folder, load_int8_model, stored_version
from picogpt_jax.int8.int8_model import Int8Model
from picogpt_jax.int8.integer_model import INTEGER_VERSION, IntegerModel
from picogpt_jax.text.batches import Tokens
from picogpt_jax.text.reading import load_vocabulary, vocabulary_from_json, vocabulary_of_data
from picogpt_jax.text.tokenizer import has_tokenizer, read_tokenizer
from picogpt_jax.text.vocabulary import TokenIds, Vocabulary

if TYPE_CHECKING:
    from picogpt_jax.runtimes.llama_cpp_model import LlamaCppGPT
    from picogpt_jax.runtimes.numpy_integer import NumpyIntegerGPT
    from picogpt_jax.runtimes.numpy_model import NumpyGPT
    from picogpt_jax.runtimes.onnx_model import OnnxGPT
    from picogpt_jax.training.trainer import Trainer

Kind = Literal["workdir", "int8", "torch-int8", "torch-float", "picogpt-int8", "huggingface", "onnx", "gguf"]
ONNX_FILE = "model.onnx"
GGUF_MAGIC = b"GGUF"
EXAMPLE_TOKENS = 1024  # whose products are compared
EXPORTS = {"onnx": ("an ONNX folder", "--runtime=onnx"), "gguf": ("a GGUF file", "--runtime=llama.cpp")}


@dataclasses.dataclass(frozen=True)
class FloatModel:
    """Float parameters and what belongs to them.

    Attributes:
        config: the model; `run` is the whole configuration where the source is a training of ours.
        quant: how the training quantized, or how quantization after the training does it.
        params: the parameter tree of `GPT`, float32.
        step: optimizer steps made, before and after an import.
        qat: whether these parameters were trained with our quantization in the forward pass.
        left_out: rows of the token table beyond the vocabulary, which pad it in training alone.
    """

    config: ModelConfig
    run: Config | None
    quant: QuantConfig
    params: Any
    vocabulary: Vocabulary
    step: int
    val_loss: float | None
    qat: bool
    left_out: int = 0


def recognise(path: str | os.PathLike[str]) -> Kind:
    """What lies at `path`.

    Raises:
        UserError: nothing does, or nothing that is known.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path} does not exist; expected a workdir, an int8 folder or a PyTorch .pt file, or a Hugging Face folder"
        )
    if is_int8_folder(path):
        return "int8"
    if (path / ONNX_FILE).is_file():
        return "onnx"
    if (path / "checkpoints").is_dir():
        return "workdir"
    if _is_gguf(path):
        return "gguf"
    if path.is_file():
        from picogpt_jax.formats.torch_file import checkpoint_kind, is_torch_checkpoint, load_content

        if is_torch_checkpoint(path):
            return checkpoint_kind(load_content(path), path)
    if is_huggingface_folder(path):
        return "huggingface"
    raise UserError(
        f"{path} is not a model: expected a workdir of scripts/train.py (with checkpoints/), an int8 folder of "
        "scripts/quantize.py (with model.safetensors and config.json), a PyTorch .pt file, a Hugging Face folder, an "
        "ONNX folder or a GGUF file"
    )


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def load_int8(path: str | os.PathLike[str]) -> Int8Model | IntegerModel:
    """The int8 model of an int8 folder or a PyTorch int8 file, as it is; `mixed()` of it has float functions."""
    kind = recognise(path)
    if kind == "int8":
        return load_int8_model(path)
    if kind == "torch-int8":
        from picogpt_jax.formats.torch_int8_checkpoint import load_int8_checkpoint

        return load_int8_checkpoint(path)
    _refuse_export(path, kind)
    if kind in ("torch-float", "picogpt-int8"):  # quantize.py needs their vocabulary
        raise UserError(f"{path} holds float parameters; quantize a workdir of it: {_make_workdir(path)}")
    make = command("scripts/quantize.py", workdir=path, output="INT8_FOLDER")
    raise UserError(f"{path} holds float parameters; make an int8 model of it with: {make}")


def _make_workdir(path: str | os.PathLike[str]) -> str:
    make = command("scripts/convert.py", input=path, to="checkpoint", data="DATA", output="WORKDIR")
    return f"make one of it, DATA being the folder of its data, with: {make}"


def load_float(path: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None) -> FloatModel:
    """The float parameters of a workdir (its best checkpoint), a `ckpt.pt`, picoGPT's int8 file or a GPT-2 folder.

    Args:
        data_dir: has the vocabulary (meta.json, nanoGPT's meta.pkl or tokenizer.json) where the model has none.

    Raises:
        UserError: it is damaged or of another kind, has no vocabulary, or `data_dir` has another one.
    """
    kind = recognise(path)
    if kind == "workdir":
        source = _load_workdir(path)
    elif kind in ("torch-float", "picogpt-int8", "huggingface"):
        source = _load_foreign(path, kind, data_dir)
    else:
        _refuse_export(path, kind)
        raise UserError(f"{path} is an int8 model; its float parameters are gone: give the workdir it was made from")
    check_vocabulary(source.vocabulary, source.config, path, data_dir)
    size = source.vocabulary.size
    return dataclasses.replace(
        source,
        config=dataclasses.replace(source.config, vocab_size=size),
        params={**source.params, "wte": {"embedding": source.params["wte"]["embedding"][:size]}},
        left_out=source.config.vocab_size - size,
    )


def check_vocabulary(
    vocabulary: Vocabulary,
    model: ModelConfig,
    path: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None,
) -> None:
    """Raises a UserError if the vocabulary is larger than the model's table, or not that of `data_dir`."""
    if vocabulary.size > model.vocab_size:
        raise UserError(
            f"{path} is a model of {model.vocab_size} tokens, its vocabulary has {vocabulary.size}; give --data the "
            "folder of the data that it was trained on"
        )
    if data_dir is not None and not vocabulary.fits(vocabulary_of_data(data_dir, vocabulary.size)):
        raise UserError(f"{path} has another vocabulary than --data={data_dir}; leave --data out")


def load_onnx(path: str | os.PathLike[str]) -> "OnnxGPT":
    """The model of an ONNX folder, ready to run."""
    _check_export(path, "onnx", "FOLDER")
    from picogpt_jax.runtimes.onnx_model import OnnxGPT

    return OnnxGPT.load(path)


def load_gguf(path: str | os.PathLike[str]) -> "LlamaCppGPT":
    """The model of a GGUF file in llama.cpp."""
    _check_export(path, "gguf", "FILE.gguf")
    from picogpt_jax.runtimes.llama_cpp_model import LlamaCppGPT

    return LlamaCppGPT(path)


def _check_export(path: str | os.PathLike[str], expected: Kind, output: str) -> None:
    kind, (what, runtime) = recognise(path), EXPORTS[expected]
    if kind != expected:
        source = path if kind in ("int8", "torch-int8") else "INT8_FOLDER"
        make = command("scripts/convert.py", input=source, to=expected, output=output)
        raise UserError(f"{runtime} takes {what}, not {path} ({kind}); make one with: {make}")


def _refuse_export(path: str | os.PathLike[str], kind: Kind) -> None:
    """What an exporter wrote is for one runtime alone."""
    if kind in EXPORTS:
        what, runtime = EXPORTS[kind]
        raise UserError(f"{path} is {what}, which {runtime} runs; here, give the int8 folder that it was made from")


def load_numpy(path: str | os.PathLike[str]) -> tuple["NumpyGPT | NumpyIntegerGPT", Vocabulary]:
    """The model of an int8 folder, read by the NumPy runtime itself, and the folder's vocabulary."""
    kind = recognise(path)
    if kind != "int8":
        make = command("scripts/quantize.py", workdir=path if kind == "workdir" else "WORKDIR", output="FOLDER")
        raise UserError(f"--runtime=numpy takes an int8 folder, not {path} ({kind}); make one with: {make}")
    from picogpt_jax.runtimes.numpy_integer import NumpyIntegerGPT
    from picogpt_jax.runtimes.numpy_model import NumpyGPT

    reader = NumpyIntegerGPT if stored_version(path) == INTEGER_VERSION else NumpyGPT
    model: NumpyGPT | NumpyIntegerGPT = reader.load(path)
    vocabulary = load_vocabulary(Path(path) / VOCABULARY_FILE)
    if vocabulary.size != model.vocab_size:
        raise UserError(
            f"{path}: the vocabulary has {vocabulary.size} entries, but model.vocab_size={model.vocab_size}; make the "
            "folder again with scripts/quantize.py"
        )
    return model, vocabulary


def one_device_trainer(run: Config) -> "Trainer":
    """The trainer of a run whatever devices it was made for: on the first one, without the kernels of others."""
    import jax

    from picogpt_jax.training.trainer import Trainer

    mesh = dataclasses.replace(run.mesh, data=1, fsdp=1, tensor=1)
    plain = dataclasses.replace(run.train, attention="plain")
    return Trainer(dataclasses.replace(run, mesh=mesh, train=plain), devices=jax.devices()[:1])


def _load_workdir(path: str | os.PathLike[str]) -> FloatModel:
    from picogpt_jax.model import layers
    from picogpt_jax.training.checkpoint import IMPORTED, restore_best

    restored = restore_best(path, lambda meta: one_device_trainer(Config.from_dict(meta["config"])).abstract_state)
    if restored is None:
        raise UserError(f"{path} holds no finished checkpoint yet; train until the first evaluation")
    step, meta, run = restored.step, restored.meta, Config.from_dict(restored.meta["config"])
    imported = meta.get(IMPORTED)
    vocabulary = vocabulary_from_json(meta["vocab"], f"the checkpoint of {path}")
    if isinstance(vocabulary, TokenIds) and has_tokenizer(path):
        vocabulary = read_tokenizer(path)
    return FloatModel(
        config=run.model,
        run=run,
        quant=run.quant,
        params=layers.unstack(restored.state.params),
        vocabulary=vocabulary,
        step=imported["step"] if imported else step,
        val_loss=meta["val_loss"],
        qat=imported["quantization_aware"] if imported else _is_qat(run, step),
    )


def _is_qat(run: Config, step: int) -> bool:
    return run.quant.mode == "int8" and step > run.quant.start_step


def _load_foreign(path: str | os.PathLike[str], kind: Kind, data_dir: str | os.PathLike[str] | None) -> FloatModel:
    from picogpt_jax.int8.convert import FLOAT, params_from_arrays

    if kind == "huggingface":
        loaded = FloatCheckpoint(*load_huggingface(path))
    elif kind == "picogpt-int8":
        from picogpt_jax.formats.torch_int8_checkpoint import load_picogpt_int8

        loaded = load_picogpt_int8(path)
    else:
        from picogpt_jax.formats.torch_checkpoint import load_float_checkpoint

        loaded = load_float_checkpoint(path)
    with errors_in(path):  # ours carries our configuration; nanoGPT's has no such sections
        run = Config.from_dict(loaded.config) if "quant" in loaded.config else None
    vocabulary = loaded.vocabulary
    if has_tokenizer(path):
        vocabulary = read_tokenizer(path)
    elif vocabulary is None and data_dir is not None:
        vocabulary = vocabulary_of_data(data_dir, loaded.model.vocab_size, token_ids=False)
    if vocabulary is None:
        raise UserError(f"{path} holds no vocabulary; a workdir has one: {_make_workdir(path)}")
    return FloatModel(
        config=loaded.model,
        run=run,
        quant=run.quant if run else FLOAT,
        params=params_from_arrays(loaded.model, loaded.tensors),
        vocabulary=vocabulary,
        step=loaded.iter_num,
        val_loss=loaded.best_val_loss if math.isfinite(loaded.best_val_loss) else None,
        qat=run is not None and _is_qat(run, loaded.iter_num),
    )


def validation_ids(source: FloatModel) -> npt.NDArray[np.uint16] | None:
    """The run's validation text, or None where it is not at hand, such as of a run that was trained elsewhere."""
    if source.run is None:
        return None
    try:
        if not source.vocabulary.fits(vocabulary_of_data(source.run.data.dir, source.vocabulary.size)):
            return None
        return Tokens.open(source.run.data.dir, "val", source.config.block_size, source.vocabulary.size).ids
    except UserError:
        return None


def example(source: FloatModel, ids: npt.NDArray[np.uint16] | None) -> tuple[npt.NDArray[np.integer], str]:
    """Tokens [B, T] whose products are compared, and what they are."""
    time = source.config.block_size
    shape = (max(EXAMPLE_TOKENS // time, 1), time)
    if ids is None:
        return np.random.default_rng(0).integers(0, source.vocabulary.size, shape), "tokens drawn at random"
    starts = np.linspace(0, len(ids) - time, shape[0]).astype(np.int64)
    return Tokens(ids=ids, path=Path()).windows(starts, time), "tokens of the validation text"
