"""GPT-2's parameters in other people's files: one rule for names, prefixes, types, tied heads and ignored buffers.

A reader lists what a file stores; every entry of it becomes a parameter under nanoGPT's name, or is a buffer that
`IGNORED` names, or is refused. Messages call tensors what the file calls them. Wrappers leave words in the names, which
are taken out; a model saved without its head lacks `transformer.` before each, which is put there. The head is tied to
the embedding: either may be stored, or both where they are equal. float16 and bfloat16 become float32, which is exact.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from picogpt_jax.config import ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.int8.layout import Stored, check_depth, float_layout, read_as, shortened
from picogpt_jax.text.vocabulary import Vocabulary

TABLE, POSITIONS, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
HIDDEN = "transformer.h.0.mlp.c_fc.weight"

# What torch.compile, DistributedDataParallel, FSDP and activation checkpointing leave in a name, anywhere.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
TRUNK = re.compile(r"(wte|wpe|ln_f|h\.\d+)\.")
LAYER = re.compile(r"transformer\.h\.(\d{1,7})\.")
IGNORED = re.compile(
    # The causal mask, buffers of older releases of nanoGPT and transformers.
    r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"
    # torch.ao's QAT: the fake quantization of a layer's weight or output, and the observer inside it. The parameters
    # beside them are the float ones that it trained; its grids (one scale for all tokens) are not ours.
    r"|(\w+\.)+(weight_fake_quant|activation_post_process)\."
    r"(scale|zero_point|fake_quant_enabled|observer_enabled|activation_post_process\.(eps|min_val|max_val))"
)


@dataclasses.dataclass(frozen=True, eq=False)
class FloatCheckpoint:
    """What another program's file tells of a float model.

    Attributes:
        tensors: float32, nanoGPT's names, matrices [out, in], without the tied head.
        iter_num: optimizer steps made.
        best_val_loss: nats per token.
        config: the training configuration, as it was stored.
        vocabulary: None where the file has none.
    """

    model: ModelConfig
    tensors: dict[str, np.ndarray]
    iter_num: int = 0
    best_val_loss: float = math.inf
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    vocabulary: Vocabulary | None = None


def our_name(name: str) -> str:
    """nanoGPT's name of a tensor that other programs have saved; that of an unknown one is left alone."""
    bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return f"transformer.{bare}" if TRUNK.match(bare) else bare


def is_buffer(name: Any) -> bool:
    """Whether a tensor of this name is none of the parameters, and left out on purpose."""
    return isinstance(name, str) and IGNORED.fullmatch(our_name(name)) is not None


def renamed(*files: Mapping[str, Stored]) -> dict[str, Stored]:
    """What the files store, under nanoGPT's names and without buffers; a head alone is the table.

    Raises:
        UserError: a tensor occurs twice.
    """
    found: dict[str, Stored] = {}
    for tensor in (x for file in files for x in file.values() if not is_buffer(x.name)):
        other = found.setdefault(our_name(tensor.name), tensor)
        if other is not tensor:
            raise UserError(f"{other.name} and {tensor.name} are one tensor, stored twice; expected it once")
    if HEAD in found and TABLE not in found:
        found[TABLE] = found.pop(HEAD)
    return found


def sizes_of(found: Mapping[str, Stored]) -> dict[str, Any]:
    """All of the architecture that the tensors show: neither the number of heads nor the activation.

    Args:
        found: by nanoGPT's names; `<name>_int8` will do.

    Raises:
        UserError: these are no tensors of a GPT-2.
    """
    shapes = []
    for name in (TABLE, POSITIONS, HIDDEN):
        tensor = found.get(name) or found.get(f"{name}_int8")
        if tensor is None or len(tensor.layout[1]) != 2:
            names = shortened(sorted(other.name for other in found.values()))
            raise UserError(f"there is no matrix {name}, which every GPT-2 has; the tensors are: {names}")
        shapes.append(tensor.layout[1])
    (vocab_size, width), (block_size, _), (hidden, _) = shapes
    if not width or hidden % width:
        raise UserError(f"{HIDDEN} is of shape {list(shapes[2])}; expected [a multiple of {width}, {width}]")
    layers = [int(match[1]) for match in map(LAYER.match, found) if match]
    return {
        **{"n_layer": max(layers) + 1, "n_embd": width, "block_size": block_size, "vocab_size": vocab_size},
        **{"mlp_ratio": hidden // width, "bias": any(name.endswith(".bias") for name in found)},
    }


def linear_weights(model: ModelConfig) -> set[str]:
    """The matrices of linear layers, which transformers' `Conv1D` stores as [in, out]."""
    return {f"{name}.weight" for name in model.matrix_shapes() if LAYER.match(name)}


def read_parameters(model: ModelConfig, found: Mapping[str, Stored], in_by_out: bool = False) -> dict[str, np.ndarray]:
    """Reads the parameters of a float model.

    Args:
        in_by_out: `linear_weights` are stored as [in, out].

    Returns:
        float32, nanoGPT's names, matrices [out, in], without the tied head.

    Raises:
        UserError: see `read_as`; or the head is not tied.
    """
    check_depth(model, found)
    layout = float_layout(model)
    turned = linear_weights(model) if in_by_out else set()
    expected = {name: (dtype, shape[::-1] if name in turned else shape) for name, (dtype, shape) in layout.items()}
    arrays = read_as(expected | ({HEAD: layout[TABLE]} if HEAD in found else {}), found)
    if not np.array_equal(arrays.pop(HEAD, arrays[TABLE]), arrays[TABLE]):
        raise UserError(f"{found[HEAD].name} differs from {found[TABLE].name}; expected a head tied to the embedding")
    return {name: np.ascontiguousarray(arrays[name].T) if name in turned else arrays[name] for name in layout}
