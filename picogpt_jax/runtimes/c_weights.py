"""C: the integer model as `picogpt.h` holds it: the tensors of all layers one after the other, as arrays or a file."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt_jax.int8.integer_model import IntegerModel

SOURCES = Path(__file__).resolve().parent / "c"
MAGIC = 0x54504770
MATRICES = {
    "wte": "transformer.wte",
    "wpe": "transformer.wpe",
    "c_attn": "transformer.h.{}.attn.c_attn",
    "attn_c_proj": "transformer.h.{}.attn.c_proj",
    "c_fc": "transformer.h.{}.mlp.c_fc",
    "mlp_c_proj": "transformer.h.{}.mlp.c_proj",
}
NORMS = {"ln_1": "transformer.h.{}.ln_1", "ln_2": "transformer.h.{}.ln_2", "ln_f": "transformer.ln_f"}
PARTS = ("biases", "sums", "mantissas", "exponents", "codes")  # in the order of a file: int32, int16, int8
ALIGNMENT = 64  # bytes, of the codes in a file


def sizes(model: IntegerModel) -> dict[str, int]:
    """The first members of a `picogpt_model`, by name."""
    config = model.model
    return {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_hidden": config.n_hidden,
        "block_size": config.block_size,
        "vocab_size": config.vocab_size,
        "is_relu": int(config.activation == "relu"),
        "is_per_channel": int(model.weight_granularity == "per_channel"),
    }


def arrays(model: IntegerModel) -> dict[str, npt.NDArray[Any]]:
    """Every member of a `picogpt_model` that is an array, such as c_attn.codes, in the order of a file: flat arrays."""
    found = {}
    for name, modules in (NORMS | MATRICES).items():
        kind = "mantissas" if name in NORMS else "codes"
        names = {kind: "weight", "exponents": "weight_exponent", "biases": "bias"}
        layers = range(model.model.n_layer if "{}" in modules else 1)
        for part, suffix in names.items():
            tensors = [f"{modules.format(layer)}.{suffix}" for layer in layers]
            if tensors[0] in model.tensors:
                found[name, part] = np.concatenate([model.tensors[tensor].ravel() for tensor in tensors])
        if name in MATRICES and name != "wpe":  # whose rows are looked up alone
            found[name, "sums"] = np.concatenate(
                [model.tensors[f"{modules.format(layer)}.weight"].sum(1, dtype=np.int32) for layer in layers]
            )
    order = sorted(found, key=lambda key: (PARTS.index(key[1]), *_place(key)))
    return {".".join(key): found[key] for key in order}


def _place(key: tuple[str, str]) -> tuple[bool, int]:
    """Of biases the matrices come first, of all else the LayerNorms."""
    name, part = key
    is_norm = name in NORMS
    return is_norm == (part == "biases"), list(NORMS if is_norm else MATRICES).index(name)


def packed(model: IntegerModel, digest: int) -> bytes:
    """What `picogpt_open` reads: a header of 12 words, then the arrays, little-endian.

    Args:
        digest: what `picogpt_digest` gives.
    """
    header = [MAGIC, *sizes(model).values(), int(model.model.bias), digest, 0]
    content = np.array(header, "<u4").tobytes()
    codes = b""
    for name, array in arrays(model).items():
        piece = array.astype(array.dtype.newbyteorder("<")).tobytes()
        if name.endswith(".codes"):
            codes += piece
        else:
            content += piece
    return content + bytes(-len(content) % ALIGNMENT) + codes
