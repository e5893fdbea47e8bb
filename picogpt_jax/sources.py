"""What `--model` and `--input` name: a workdir, an int8 folder, a PyTorch checkpoint or an export; and loading it.

JAX and PyTorch are imported by the loaders that need them, so that each runtime starts without the others.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from picogpt_jax.config import Config, ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.int8_model import VOCABULARY_FILE, Int8Model, is_int8_folder, load_int8_model
from picogpt_jax.vocabulary import Vocabulary

if TYPE_CHECKING:
    from picogpt_jax.llama_cpp_model import LlamaCppGPT
    from picogpt_jax.numpy_model import NumpyGPT
    from picogpt_jax.onnx_model import OnnxGPT

Kind = Literal["workdir", "int8", "torch-int8", "torch-float", "onnx", "gguf"]
ONNX_FILE = "model.onnx"
GGUF_MAGIC = b"GGUF"


@dataclasses.dataclass(frozen=True)
class FloatModel:
    """Float parameters and what belongs to them.

    Attributes:
        config: the model; `run` is the whole configuration where the source is a workdir.
        params: the parameter tree of `GPT`, float32.
        qat: whether these parameters were trained with quantization in the forward pass.
    """

    config: ModelConfig
    run: Config | None
    params: Any
    vocabulary: Vocabulary
    step: int
    val_loss: float | None
    qat: bool


def recognise(path: str | os.PathLike[str]) -> Kind:
    """What lies at `path`.

    Raises:
        UserError: nothing does, or nothing that is known.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a workdir, an int8 folder or a PyTorch .pt file")
    if is_int8_folder(path):
        return "int8"
    if (path / ONNX_FILE).is_file():
        return "onnx"
    if (path / "checkpoints").is_dir():
        return "workdir"
    if _is_gguf(path):
        return "gguf"
    if path.is_file():
        from picogpt_jax.torch_checkpoint import checkpoint_kind, is_torch_checkpoint

        if is_torch_checkpoint(path):
            return "torch-int8" if checkpoint_kind(path) == "int8" else "torch-float"
    raise UserError(
        f"{path} is not a model: expected a workdir of scripts/train.py (with checkpoints/), an int8 folder of "
        "scripts/quantize.py (with model.safetensors and config.json), an ONNX folder, a GGUF or a PyTorch .pt file"
    )


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def load_int8(path: str | os.PathLike[str]) -> Int8Model:
    """The int8 model of an int8 folder or a PyTorch int8 file."""
    kind = recognise(path)
    if kind == "int8":
        return load_int8_model(path)
    if kind == "torch-int8":
        from picogpt_jax.torch_checkpoint import load_int8_checkpoint

        return load_int8_checkpoint(path)
    _refuse_export(path, kind)
    raise UserError(f"{path} holds float parameters; an int8 model is needed: make one with scripts/quantize.py")


def load_float(path: str | os.PathLike[str]) -> FloatModel:
    """The float parameters of a workdir (its best checkpoint) or of a nanoGPT/picoGPT `ckpt.pt`."""
    kind = recognise(path)
    if kind == "workdir":
        return _load_workdir(path)
    if kind == "torch-float":
        return _load_ckpt(path)
    _refuse_export(path, kind)
    raise UserError(f"{path} is an int8 model; its float parameters are gone: give the workdir it was made from")


def load_onnx(path: str | os.PathLike[str]) -> "OnnxGPT":
    """The model of an ONNX folder, ready to run."""
    kind = recognise(path)
    if kind != "onnx":
        source = path if kind in ("int8", "torch-int8") else "INT8_FOLDER"
        command = f"python scripts/convert.py --input={source} --to=onnx --output=FOLDER"
        raise UserError(f"--runtime=onnx takes an ONNX folder, not {path} ({kind}); make one with: {command}")
    from picogpt_jax.onnx_model import OnnxGPT

    return OnnxGPT.load(path)


def load_gguf(path: str | os.PathLike[str]) -> "LlamaCppGPT":
    """The model of a GGUF file in llama.cpp."""
    kind = recognise(path)
    if kind != "gguf":
        source = path if kind in ("int8", "torch-int8") else "INT8_FOLDER"
        command = f"python scripts/convert.py --input={source} --to=gguf --output=FILE.gguf"
        raise UserError(f"--runtime=llama.cpp takes a GGUF file, not {path} ({kind}); make one with: {command}")
    from picogpt_jax.llama_cpp_model import LlamaCppGPT

    return LlamaCppGPT(path)


def _refuse_export(path: str | os.PathLike[str], kind: Kind) -> None:
    """What an exporter wrote is for one runtime alone."""
    exports = {"onnx": "an ONNX folder, which --runtime=onnx", "gguf": "a GGUF file, which --runtime=llama.cpp"}
    if kind in exports:
        raise UserError(f"{path} is {exports[kind]} runs; here, give the int8 folder that it was made from")


def load_numpy(path: str | os.PathLike[str]) -> tuple["NumpyGPT", Vocabulary]:
    """The model of an int8 folder, read by the NumPy runtime itself, and the folder's vocabulary."""
    kind = recognise(path)
    if kind != "int8":
        raise UserError(
            f"--runtime=numpy takes an int8 folder, not {path} ({kind}); make one with: "
            "python scripts/quantize.py --workdir=WORKDIR --output=FOLDER"
        )
    from picogpt_jax.numpy_model import NumpyGPT

    model, vocabulary = NumpyGPT.load(path), Vocabulary.load(Path(path) / VOCABULARY_FILE)
    if vocabulary.size != model.vocab_size:
        raise UserError(
            f"{path}: the vocabulary has {vocabulary.size} entries, but model.vocab_size={model.vocab_size}"
        )
    return model, vocabulary


def _load_workdir(path: str | os.PathLike[str]) -> FloatModel:
    import jax

    from picogpt_jax.checkpoint import Checkpoints
    from picogpt_jax.train import Trainer

    with Checkpoints(path) as checkpoints:
        step = checkpoints.best_step()
        if step is None:
            raise UserError(f"{path} holds no finished checkpoint yet; train until the first evaluation")
        meta = checkpoints.meta(step)
        run = Config.from_dict(meta["config"])
        mesh = dataclasses.replace(run.mesh, data=1, fsdp=1, tensor=1)
        trainer = Trainer(dataclasses.replace(run, mesh=mesh), devices=jax.devices()[:1])
        state = checkpoints.restore(trainer.abstract_state, step).state
    return FloatModel(
        config=run.model,
        run=run,
        params=state.params,
        vocabulary=Vocabulary.from_json(meta["vocab"], f"the checkpoint of {path}"),
        step=step,
        val_loss=meta["val_loss"],
        qat=run.quant.mode == "int8" and step > run.quant.start_step,
    )


def _load_ckpt(path: str | os.PathLike[str]) -> FloatModel:
    from picogpt_jax.convert import params_from_arrays
    from picogpt_jax.torch_checkpoint import load_float_checkpoint

    loaded = load_float_checkpoint(path)
    if loaded.vocabulary is None:
        raise UserError(f"{path} holds no vocabulary; convert it again with scripts/convert.py --to=torch")
    return FloatModel(
        config=loaded.model,
        run=None,
        params=params_from_arrays(loaded.model, loaded.tensors),
        vocabulary=loaded.vocabulary,
        step=loaded.iter_num,
        val_loss=loaded.best_val_loss if math.isfinite(loaded.best_val_loss) else None,
        qat=False,
    )
