"""Turns trained parameters into the portable int8 model, and that into the variables of JAX's serving pass."""

import dataclasses
import functools
import math
import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from picogpt_jax.config import ModelConfig, QuantConfig
from picogpt_jax.devices import sharding
from picogpt_jax.errors import UserError
from picogpt_jax.int8.int8_model import EMBEDDINGS, Int8Model, Int8Tensor, Quantization
from picogpt_jax.int8.integer_model import IntegerModel, integer_model
from picogpt_jax.int8.layout import float_layout
from picogpt_jax.model.gpt import GPT
from picogpt_jax.model.numerics import Numerics
from picogpt_jax.model.quantization import INT8_COLLECTION, QuantizedTensor, converted, int8_dot, quantize
from picogpt_jax.text.vocabulary import Vocabulary

FOLDABLE = ("attn.c_attn", "mlp.c_fc")  # what a LayerNorm precedes
FLOAT = QuantConfig(mode="none", weight_granularity="per_channel", activation_bits=8, backward_bits=None, start_step=0)


def module_path(name: str) -> tuple[str, ...]:
    """nanoGPT's module name as a path in the parameter tree: transformer.h.0.attn.c_proj -> h_0, attn, c_proj."""
    parts = name.removeprefix("transformer.").split(".")
    return (f"h_{parts[1]}", *parts[2:]) if parts[0] == "h" else tuple(parts)


def leaf_path(name: str) -> tuple[str, ...]:
    """The same of a tensor: transformer.h.0.attn.c_proj.weight -> h_0, attn, c_proj, kernel; a kernel is [in, out]."""
    module, kind = name.rsplit(".", 1)
    path = module_path(module)
    if kind == "weight":
        kind = "embedding" if module in EMBEDDINGS else "scale" if path[-1].startswith("ln_") else "kernel"
    return (*path, kind)


def _lookup(tree: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(operator.getitem, path, tree)


def float_array(params: Any, name: str) -> npt.NDArray[np.float32]:
    """The parameter `name`, such as transformer.ln_f.weight; a matrix is [out, in], an embedding [rows, C]."""
    path = leaf_path(name)
    array = np.asarray(_lookup(params, path))
    return array.T if path[-1] == "kernel" else array


def fold_layer_norms(config: ModelConfig, params: Any) -> Any:
    """The same function, each block's LayerNorm weights and biases being part of the matrix that follows them.

    For quantizing what was trained in float: a channel that LayerNorm makes large sets the scale of a token, whose
    other channels lose their codes. As part of the matrix it is one input of each output, which has a scale of its own.
    The last LayerNorm stays as it is: the head that follows is the token embedding, too.
    """
    params = jax.tree.map(np.asarray, params)
    for block in (params[f"h_{layer}"] for layer in range(config.n_layer)):
        for norm, linear in ((block["ln_1"], block["attn"]["c_attn"]), (block["ln_2"], block["mlp"]["c_fc"])):
            if config.bias:
                linear["bias"] = linear["bias"] + norm["bias"] @ linear["kernel"]
                norm["bias"] = np.zeros_like(norm["bias"])
            linear["kernel"] = norm["scale"][:, None] * linear["kernel"]
            norm["scale"] = np.ones_like(norm["scale"])
    return params


def int8_model(
    config: ModelConfig, quant: QuantConfig, params: Any, vocabulary: Vocabulary, training: dict[str, Any]
) -> Int8Model:
    """Quantizes trained parameters with AQT's CONVERT pass: the codes that the QAT forward pass computed.

    Args:
        quant: the grid; where the run's `quant.mode` was "none", this is post-training quantization.
        params: float32 parameters of `GPT`; rows of the token table beyond the vocabulary are left out.
        training: what to note about the run (step, val_loss, dataset, ...).
    """
    quant = dataclasses.replace(quant, mode="int8", arithmetic="mixed", backward_bits=None)
    model = GPT(config, Numerics(quant, "convert"), vocabulary_size=vocabulary.size)
    tokens = jnp.zeros((1, 1), jnp.int32)
    _, collections = jax.jit(lambda params: model.apply({"params": params}, tokens, mutable=["aqt"]))(params)
    wpe = jax.jit(quantize, static_argnums=1)(params["wpe"]["embedding"], quant.weight_granularity)

    matrices = {}
    for name in config.matrix_shapes():
        if name == "transformer.wpe":
            tensor = wpe
        else:
            tensor = converted(_lookup(collections["aqt"], module_path(name)))
            if name not in EMBEDDINGS:  # a kernel is [in, out]
                tensor = QuantizedTensor(codes=tensor.codes.T, scale=tensor.scale.T)
        matrices[name] = Int8Tensor(codes=np.ascontiguousarray(tensor.codes), scale=np.ascontiguousarray(tensor.scale))
    return Int8Model(
        model=config,
        quantization=Quantization(weight_granularity=quant.weight_granularity, activation_bits=quant.activation_bits),
        training=training,
        vocabulary=vocabulary,
        matrices=matrices,
        vectors={name: float_array(params, name) for name in config.vector_shapes()},
    )


def serving_quant(model: Int8Model | IntegerModel) -> QuantConfig:
    """The numerics of an int8 model as the `quant` section of a configuration."""
    if isinstance(model, IntegerModel):
        granularity = model.weight_granularity
        return dataclasses.replace(FLOAT, mode="int8", weight_granularity=granularity, arithmetic="integer")
    return dataclasses.replace(FLOAT, mode="int8", **dataclasses.asdict(model.quantization))


def serving_variables(model: Int8Model | IntegerModel, mesh: Mesh | None = None) -> dict[str, Any]:
    """The variables of `GPT(..., mode="serve")`: int8 codes, their scales and the float vectors; no float matrix.

    Args:
        mesh: splits them by the table of `sharding`, codes [out, in] along the axes of the float kernel [in, out]; a
            vocabulary that does not divide is whole on every device. None: one device holds them.

    Raises:
        UserError: a dimension does not divide over its mesh axis.
    """
    axes: Any = None if mesh is None else sharding.logical_axes(abstract_parameters(model.model))

    def put(array: npt.NDArray[Any], path: tuple[str, ...]) -> jax.Array:
        if mesh is None:
            return jnp.asarray(array)
        names = _lookup(axes, path)[:: -1 if path[-1] == "kernel" else 1]
        # A scale has one entry where the codes have the dimension that is summed over.
        whole = lambda axis, size: size == 1 or (axis == "vocab" and size % mesh.shape["tensor"])  # noqa: E731
        split = [None if whole(axis, size) else axis for axis, size in zip(names, array.shape, strict=True)]
        return jax.device_put(array, sharding.placement(split, "/".join(path), array.shape, mesh))

    def put_matrix(matrix: Int8Tensor, path: tuple[str, ...]) -> QuantizedTensor:
        return QuantizedTensor(codes=put(matrix.codes, path), scale=put(matrix.scale, path))

    codes = {path: put_matrix(x, path) for name, x in model.matrices.items() for path in [leaf_path(f"{name}.weight")]}
    params = {path: put(x, path) for name, x in model.vectors.items() for path in [leaf_path(name)]}
    return {"params": unflatten_dict(params), INT8_COLLECTION: unflatten_dict(codes)}


def abstract_parameters(config: ModelConfig) -> Any:
    """Shapes and logical axes of the float parameters, without computing them."""
    init = GPT(config, Numerics(FLOAT, "float")).init
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def float_arrays(config: ModelConfig, params: Any) -> dict[str, npt.NDArray[np.float32]]:
    """The parameters under nanoGPT's names, matrices [out, in]; without the tied `lm_head.weight`."""
    return {name: np.ascontiguousarray(float_array(params, name)) for name in float_layout(config)}


def params_from_arrays(config: ModelConfig, arrays: dict[str, npt.NDArray[np.float32]]) -> dict[str, Any]:
    """The inverse of `float_arrays`."""
    paths = {name: leaf_path(name) for name in float_layout(config)}
    return unflatten_dict(
        {path: jnp.asarray(arrays[name].T if path[-1] == "kernel" else arrays[name]) for name, path in paths.items()}
    )


BAD_DB = 20.0  # a product whose error is over a tenth of it; the codes alone leave 30 to 40 dB


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """How well one matrix survived quantization.

    Attributes:
        codes_used: distinct codes out of 255.
        sqnr_db: 10 log10(sum w^2 / sum (w - w')^2); the signal-to-quantization-noise ratio of the weights.
        product_db: the same of the products with real activations; None for the positions, which multiply nothing.
        n_bytes: codes and scales.
    """

    name: str
    shape: tuple[int, int]
    scale_range: tuple[float, float]
    codes_used: int
    sqnr_db: float
    product_db: float | None
    n_bytes: int

    @property
    def is_bad(self) -> bool:
        return self.product_db is not None and self.product_db < BAD_DB


def quantized(
    config: ModelConfig,
    quant: QuantConfig,
    params: Any,
    vocabulary: Vocabulary,
    training: dict[str, Any],
    qat: bool,
    tokens_BT: npt.NDArray[np.integer],
    arithmetic: Literal["mixed", "integer"] = "mixed",
) -> tuple[Int8Model | IntegerModel, list[TensorReport]]:
    """The model of whatever was trained, and its report; `training` gets what README.md says of the codes.

    What was trained with quantization (`qat`) is served with the codes of training, unless products are so bad that it
    cannot have been trained with these. In all else LayerNorms are folded first.

    Raises:
        UserError: integers cannot hold this model, or its activations are to stay float.
    """
    if arithmetic == "integer" and quant.activation_bits is None:
        raise UserError("activation_bits=none keeps floats; integer arithmetic has none: give 8, or arithmetic=mixed")
    model: Int8Model | IntegerModel
    rows: list[TensorReport] = []
    for folds in (False, True) if qat else (True,):
        parts = fold_layer_norms(config, params) if folds else params
        notes = training | {"quantization_aware": not folds}
        if arithmetic == "integer":
            arrays = float_arrays(config, parts)
            model = integer_model(config, quant.weight_granularity, arrays, vocabulary, notes)
        else:
            model = int8_model(config, quant, parts, vocabulary, notes)
        rows = report(parts, model, tokens_BT)
        if not any(row.is_bad and row.name.endswith(FOLDABLE) for row in rows):
            break
    errors = {row.name: float(f"{10 ** (-row.sqnr_db / 20):.3g}") for row in rows}
    return dataclasses.replace(model, training=model.training | {"weight_errors": errors}), rows


def report(params: Any, served: Int8Model | IntegerModel, tokens_BT: npt.NDArray[np.integer]) -> list[TensorReport]:
    """Compares every int8 matrix with the float one it was made from.

    Args:
        tokens_BT: a text of the model's; its activations are multiplied.
    """
    model = served.mixed()
    products = _product_db(params, model, tokens_BT)
    scale_bytes = {  # version 2 has an exponent of one byte
        name: matrix.scale.nbytes if isinstance(served, Int8Model) else served.tensors[f"{name}.weight_exponent"].nbytes
        for name, matrix in model.matrices.items()
    }
    return [
        TensorReport(
            name=name,
            shape=tensor.codes.shape,
            scale_range=(float(tensor.scale.min()), float(tensor.scale.max())),
            codes_used=len(np.unique(tensor.codes)),
            sqnr_db=_sqnr_db(float_array(params, f"{name}.weight"), tensor.dequantize()),
            product_db=products.get(name),
            n_bytes=tensor.codes.nbytes + scale_bytes[name],
        )
        for name, tensor in model.matrices.items()
    ]


def _sqnr_db(exact: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    noise = np.square(exact.astype(np.float64) - found).sum()
    return 10.0 * math.log10(np.square(exact, dtype=np.float64).sum() / noise) if noise else math.inf


def _product_db(params: Any, model: Int8Model, tokens_BT: npt.NDArray[np.integer]) -> dict[str, float]:
    """Of every product in the float model's forward pass: int8 operands beside float ones, on the same activations."""
    names = {module_path(name): name for name in model.matrices if name != "transformer.wpe"}
    weights = {name: QuantizedTensor(*map(jnp.asarray, (m.codes, m.scale))) for name, m in model.matrices.items()}

    @jax.jit
    def products(params: Any, weights: dict[str, QuantizedTensor], tokens_BT: jax.Array) -> dict[str, Any]:
        found = {}

        def watch(function: Any, arguments: Any, keywords: Any, context: nn.module.InterceptorContext) -> Any:
            name = names.get(context.module.path)
            if name and context.method_name == ("attend" if name in EMBEDDINGS else "__call__"):
                x = arguments[0]
                found[name] = (x, int8_dot(x, weights[name], model.quantization.activation_bits))
            return function(*arguments, **keywords)

        with nn.intercept_methods(watch):
            GPT(model.model, Numerics(FLOAT, "float")).apply({"params": params}, tokens_BT)
        return found

    found = products(params, weights, jnp.asarray(tokens_BT, jnp.int32))
    weight = {name: float_array(params, f"{name}.weight") for name in found}
    return {name: _sqnr_db(np.asarray(x) @ weight[name].T, np.asarray(y)) for name, (x, y) in found.items()}


def report_table(rows: list[TensorReport]) -> str:
    """`report` as lines of text, and a line of warning where products are bad."""
    head = f"{'layer':32} {'shape':>12} {'scale from':>11} {'to':>9} {'codes':>6} {'SQNR dB':>8}"
    head += f" {'products':>8} {'bytes':>11}"
    lines = [head, "-" * len(head)]
    for row in rows:
        shape = f"{row.shape[0]} x {row.shape[1]}"
        low, high = row.scale_range
        left = f"{row.name:32} {shape:>12} {low:11.2e} {high:9.2e}"
        products = "" if row.product_db is None else f"{row.product_db:.2f}"
        lines.append(f"{left} {row.codes_used:6d} {row.sqnr_db:8.2f} {products:>8} {row.n_bytes:11,}")
    if bad := [row.name for row in rows if row.is_bad]:
        lines.append(
            f"warning: int8 activations are coarse in {len(bad)} of {len(rows)} layers (products below "
            f"{BAD_DB:.0f} dB), such as {bad[0]}; --activation_bits=none keeps them in float"
        )
    return "\n".join(lines)
