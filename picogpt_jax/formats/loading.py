"""A model from whatever holds one, in whatever runs it: `load` and what it returns.

Runtimes are imported when they are chosen, so that each starts without the others.

Shapes: B streams, T time, V vocabulary, N tokens of a piece.
"""

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from picogpt_jax.config import MeshConfig, ModelConfig
from picogpt_jax.devices.accelerators import Device, has_accelerator
from picogpt_jax.errors import UserError, command
from picogpt_jax.formats import sources
from picogpt_jax.int8.folder import stored_version
from picogpt_jax.int8.int8_model import Int8Model
from picogpt_jax.int8.integer_model import INTEGER_VERSION, IntegerModel
from picogpt_jax.runtimes import c_library
from picogpt_jax.runtimes.engine import Engine, Overflow, Sampling, checked_tokens
from picogpt_jax.runtimes.loop import Loop
from picogpt_jax.text.vocabulary import Vocabulary

Runtime = Literal["auto", "jax", "torch", "onnx", "numpy", "c", "llama.cpp"]
Forward = Literal["float", "trained"]

# What another library than JAX and NumPy computes: runtime -> (the module that it needs, how to install it).
EXTRAS = {
    "torch": ("torch", "picogpt_jax[torch]"),
    "onnx": ("onnxruntime", "picogpt_jax[onnx]"),
    "c": ("ziglang", "picogpt_jax[c]"),  # where there is no other C compiler
    "llama.cpp": ("llama_cpp", "picogpt_jax[llama-cpp]"),
}
EXPORTS: dict[sources.Kind, Runtime] = {"onnx": "onnx", "gguf": "llama.cpp"}  # what one runtime alone can run
INT8: tuple[sources.Kind, ...] = ("int8", "torch-int8", *EXPORTS)
CHARACTER_BYTES = 4  # at most, in UTF-8


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model that is loaded: text, logits and losses.

    Attributes:
        config: the architecture.
        vocabulary: text <-> token ids.
        description: one line: parameters, the share of them that is int8, bytes, kind of file, runtime.
        runtime: what computes.
        engine: the same on token ids, for many prompts at once.
        digest: of a model of integer arithmetic, `IntegerModel.digest`; else None.
    """

    config: ModelConfig
    vocabulary: Vocabulary
    description: str
    runtime: Runtime
    engine: Engine
    digest: bytes | None = None

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int | None = None,
        seed: int = 1337,
        overflow: Overflow = "slide",
    ) -> str:
        """The text that follows `prompt`, without the prompt; the defaults are those of scripts/sample.py.

        Args:
            prompt: at least one token.
            max_new_tokens, temperature, top_k, seed, overflow: see `picogpt_jax.runtimes.engine.Sampling`.

        Raises:
            UserError: a character is not in the vocabulary, the prompt is empty, or a setting is out of range.
        """
        return "".join(self.stream(prompt, max_new_tokens, temperature, top_k, seed, overflow))

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int | None = None,
        seed: int = 1337,
        overflow: Overflow = "slide",
    ) -> Iterator[str]:
        """The same in pieces, each as soon as it is drawn; mistakes are raised at once."""
        sampling = Sampling(max_new_tokens, temperature, top_k, seed, overflow)
        prompt_1T = self.vocabulary.encode(prompt, "the prompt")[None]
        return self.texts(piece_1N[0] for piece_1N in self.engine.pieces(prompt_1T, sampling))

    def texts(self, pieces: Iterable[npt.NDArray[np.integer]]) -> Iterator[str]:
        """The text of each piece of ids [N]; where a token ends within a character, the character waits for the next.

        Returns:
            pieces of text, none of them empty.
        """
        waiting: list[int] = []
        for piece_N in pieces:
            waiting.extend(piece_N.tolist())
            sizes = range(len(waiting), max(len(waiting) - CHARACTER_BYTES, -1), -1)
            whole = (size for size in sizes if not self.vocabulary.decode(waiting[:size]).endswith("\ufffd"))
            size = next(whole, len(waiting))  # there may be no such character
            if size:
                yield self.vocabulary.decode(waiting[:size])
                del waiting[:size]
        if waiting:
            yield self.vocabulary.decode(waiting)

    def loss(self, text: str) -> float:
        """Mean loss in nats per token, of every token of `text` but the first, in windows of `block_size`.

        Raises:
            UserError: a character is not in the vocabulary, or there are fewer than two tokens.
        """
        return self.engine.loss(self.vocabulary.encode(text))

    def logits(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Logits of the token after each one of `ids`, float32 [T, V].

        Args:
            ids: token ids [T], 1 to `block_size` of them.

        Raises:
            UserError: fewer or more, or an id outside the vocabulary.
        """
        ids_T, limit = np.asarray(ids), self.config.block_size
        if ids_T.ndim != 1 or ids_T.dtype.kind not in "iu" or not 1 <= len(ids_T) <= limit:
            raise UserError(f"found {ids_T.dtype} {list(ids_T.shape)}; expected 1 to {limit} token ids in a row")
        return self.engine.logits(checked_tokens(ids_T, self.config.vocab_size, "ids")[None])[0]


def load(
    path: str | os.PathLike[str],
    runtime: Runtime = "auto",
    device: Device = "auto",
    tensor: int = 1,
    forward: Forward = "float",
) -> Model:
    """Loads what `path` names: a workdir (its best checkpoint), an int8 folder, a PyTorch file, an export.

    Args:
        runtime: what computes; "auto": see `choose_runtime`.
        device: where JAX computes.
        tensor: JAX devices that split the matrices of an int8 model and its KV cache among them.
        forward: of a workdir: its plain float parameters, or the forward pass that it was trained with.

    Raises:
        UserError: nothing that is known lies there, it is damaged, or the runtime does not take it.
        ImportError: the runtime is not installed; the message names the extra.
    """
    kind = sources.recognise(path)
    if runtime == "auto":
        is_integer = kind == "int8" and stored_version(path) == INTEGER_VERSION
        runtime = choose_runtime(kind, device, tensor, is_integer)
    if runtime == "jax":
        loaded = _load_jax(path, kind, device, tensor, forward)
    else:
        if device not in ("auto", "cpu"):
            raise UserError(f"--device={device} is JAX's; --runtime={runtime} computes on the CPU: leave --device out")
        if tensor > 1:
            raise UserError(f"--tensor={tensor} is JAX's; --runtime={runtime} splits no model: leave --tensor out")
        loaded = LOADERS[runtime](path)
    description = _describe(loaded, kind, runtime)
    return Model(loaded.config, loaded.vocabulary, description, runtime, loaded.engine, loaded.digest)


def is_installed(runtime: str) -> bool:
    """Whether what the runtime needs is there."""
    if runtime == "c":
        return c_library.is_available()
    return runtime not in EXTRAS or find_spec(EXTRAS[runtime][0]) is not None


def choose_runtime(kind: sources.Kind, device: Device = "auto", tensor: int = 1, is_integer: bool = False) -> Runtime:
    """An export's own runtime; JAX for float parameters, for other devices than the CPU and for several.

    Else what answers first: NumPy needs a sixth of PyTorch's time to the first token, and a tenth of JAX's; C, for an
    int8 folder of integer arithmetic (`is_integer`) and where there is a compiler, is as quick to answer and far faster
    after that. A PyTorch file takes PyTorch to be read.
    """
    if kind in EXPORTS:
        return EXPORTS[kind]
    if kind not in INT8 or tensor > 1 or device in ("gpu", "tpu") or (device == "auto" and has_accelerator()):
        return "jax"
    if kind == "torch-int8":
        return "torch"
    return "c" if is_integer and is_installed("c") else "numpy"


class _Loaded(NamedTuple):
    engine: Engine
    config: ModelConfig
    vocabulary: Vocabulary
    n_bytes: int
    digest: bytes | None = None


def _describe(loaded: _Loaded, kind: sources.Kind, runtime: Runtime) -> str:
    count, n_bytes = loaded.config.n_parameters, loaded.n_bytes
    share = loaded.config.int8_share if kind in INT8 else 0.0
    smaller = f" ({4 * count / n_bytes:.2f}x smaller than float32)" if share else " of float32"
    return f"{count:,} parameters, {100 * share:.2f}% int8, {n_bytes:,} bytes{smaller}; {kind}, runtime {runtime}"


def _load_jax(
    path: str | os.PathLike[str], kind: sources.Kind, device: Device, tensor: int, forward: Forward
) -> _Loaded:
    if device != "auto" or "jax" not in sys.modules:  # what a program has set up by itself stays as it is
        from picogpt_jax.devices.setup import set_up_jax

        set_up_jax(device)
    from picogpt_jax.devices.sharding import make_mesh
    from picogpt_jax.model.gpt import GPT
    from picogpt_jax.model.numerics import Numerics
    from picogpt_jax.runtimes.jax_model import JaxGPT

    if kind in INT8:
        model = sources.load_int8(path)
        mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=tensor), 1) if tensor > 1 else None
        return _int8(JaxGPT.from_int8(model, mesh), model)
    if tensor > 1:
        raise UserError("--tensor splits int8 models; give --model=INT8_FOLDER, or leave --tensor out")
    source = sources.load_float(path)
    if forward == "trained" and source.qat and kind == "workdir":
        engine = JaxGPT(GPT(source.config, Numerics(source.quant, "train")), {"params": source.params})
    else:
        engine = JaxGPT.from_params(source.config, source.params)
    return _Loaded(engine, source.config, source.vocabulary, 4 * source.config.n_parameters)


def _int8(engine: Engine, model: Int8Model | IntegerModel) -> _Loaded:
    digest = model.digest if isinstance(model, IntegerModel) else None
    return _Loaded(engine, model.model, model.vocabulary, model.n_bytes, digest)


def _load_torch(path: str | os.PathLike[str]) -> _Loaded:
    from picogpt_jax.runtimes import torch_model

    model = sources.load_int8(path)
    if isinstance(model, IntegerModel):
        from picogpt_jax.runtimes.torch_integer import TorchIntegerGPT

        return _int8(Loop(TorchIntegerGPT(model)), model)
    return _int8(Loop(torch_model.TorchGPT(torch_model.Int8GPT(model))), model)


def _load_numpy(path: str | os.PathLike[str]) -> _Loaded:
    runtime, _ = sources.load_numpy(path)
    return _int8(Loop(runtime), sources.load_int8(path))


def _load_c(path: str | os.PathLike[str]) -> _Loaded:
    from picogpt_jax.runtimes.c_model import CGPT

    model = sources.load_int8(path)
    if not isinstance(model, IntegerModel):
        make = command("scripts/quantize.py", workdir="WORKDIR", arithmetic="integer", output="INT8_FOLDER")
        raise UserError(f"{path} is of version 1; --runtime=c computes version 2, integers alone; make it with: {make}")
    return _int8(CGPT(model), model)


def _load_onnx(path: str | os.PathLike[str]) -> _Loaded:
    runtime, file = sources.load_onnx(path), Path(path) / sources.ONNX_FILE
    return _Loaded(Loop(runtime), runtime.config, runtime.vocabulary, file.stat().st_size, runtime.digest)


def _load_llama_cpp(path: str | os.PathLike[str]) -> _Loaded:
    runtime = sources.load_gguf(path)
    return _Loaded(Loop(runtime), runtime.config, runtime.vocabulary, Path(path).stat().st_size)


LOADERS = {
    "torch": _load_torch,
    "numpy": _load_numpy,
    "c": _load_c,
    "onnx": _load_onnx,
    "llama.cpp": _load_llama_cpp,
}
