"""The int8 model as an ONNX graph (extra: onnx).

    input_ids, position_ids int64 [B, T], attention_mask int64 [B, S],
    past_key_values.{i}.key/value float32 [B, H, P, D]                          S = P + T, and P may be 0
    -> logits float32 [B, T, V], present.{i}.key/value float32 [B, H, S, D]

An `attention_mask` with n + 1 in the place of a one asks for the logits of the n last positions alone. The id behind
all others pads a batch where none is free: it is looked up as id 0, which the mask hides, and has no logit.

Standard operators alone: an activation x becomes the unsigned byte Round(x / scale) + 128, and MatMulInteger takes the
128 off again: ONNX Runtime's fast kernel. The rest is float32, in one node each where there is an operator.

Shapes: B batch, T time (query), P past, S time (key), C width, H heads, D head size, V vocabulary.
"""

from typing import Literal

import numpy as np

try:
    import onnx
    from onnx import TensorProto, helper
except ImportError as error:
    raise ImportError("this needs onnx; install it with: pip install 'picogpt_jax[onnx]'") from error

from picogpt_jax.formats.hf_documents import padding
from picogpt_jax.formats.onnx_nodes import TO_THE_END, Nodes
from picogpt_jax.int8.int8_model import MAX_CODE, Int8Model

ZERO_POINT = np.uint8(128)
SMALL_TABLE = 4096  # rows: a vocabulary of characters, or the positions
NARROW = 512  # outputs of a product
WHOLE = slice(None)
HIDDEN = np.finfo(np.float32).min  # not infinity: a row of padding sees nothing, and its softmax must be a number

Weights = Literal["int8", "float"]


class GraphBuilder(Nodes):
    """The graph, block by block."""

    def __init__(self, model: Int8Model, weights: Weights) -> None:
        self.model, self.config, self.is_float = model, model.model, weights == "float"
        super().__init__()
        self.computed_one = ""  # computed where it is first needed, as the zero points are
        self.zero_points = ""  # of the tokens that are still computed

    def build(self) -> onnx.GraphProto:
        """The whole model."""
        config = self.config
        inputs, outputs = self.signature()
        first_kept = self.add("Sub", self.integers(1), self.add("ReduceMax", "attention_mask", keepdims=0))
        ids, (_, pad) = "input_ids", padding(self.model.vocabulary)
        if pad == config.vocab_size:
            ids = self.add("Where", self.add("Equal", ids, self.integers(pad)), self.integers(0), ids)
        x_BTC = self.add("Add", self.lookup("wte", ids), self.lookup("wpe", "position_ids"))
        mask_B1TS = self.mask()
        for layer in range(config.n_layer):
            is_last = layer == config.n_layer - 1
            x_BTC = self.block(x_BTC, mask_B1TS, layer, first_kept if is_last else None)
        self.matmul(self.layer_norm(x_BTC, "transformer.ln_f"), "transformer.wte", output="logits")
        return helper.make_graph(self.nodes, "picogpt", inputs, outputs, list(self.initializers.values()))

    def signature(self) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        """The inputs and outputs, as Optimum names them."""
        config, info = self.config, helper.make_tensor_value_info
        time, total = ["batch_size", "sequence_length"], "past_sequence_length + sequence_length"
        past: list[str | int | None] = ["batch_size", config.n_head, "past_sequence_length", config.head_size]
        present = [*past[:2], total, config.head_size]
        inputs = [
            info("input_ids", TensorProto.INT64, time),
            info("attention_mask", TensorProto.INT64, ["batch_size", total]),
            info("position_ids", TensorProto.INT64, time),
        ]
        outputs = [info("logits", TensorProto.FLOAT, ["batch_size", "kept_sequence_length", config.vocab_size])]
        for layer in range(config.n_layer):
            for part in ("key", "value"):
                inputs.append(info(f"past_key_values.{layer}.{part}", TensorProto.FLOAT, past))
                outputs.append(info(f"present.{layer}.{part}", TensorProto.FLOAT, present))
        return inputs, outputs

    def lookup(self, table: Literal["wte", "wpe"], ids: str) -> str:
        """The rows `ids` of an embedding, float32."""
        name, matrix = f"transformer.{table}", self.model.matrices[f"transformer.{table}"]
        if self.is_float:
            return self.add("Gather", self.constant(f"{name}.weight", matrix.dequantize()), ids)
        # A small table is dequantized as a whole, which ONNX Runtime does once, when it loads the model.
        is_small = len(matrix.codes) <= SMALL_TABLE
        codes, scale = self.constant(f"{name}.weight", matrix.codes), self.scale(name)
        if not is_small:
            codes = self.add("Gather", codes, ids)
            scale = self.add("Gather", scale, ids) if len(matrix.scale) > 1 else scale
        if len(matrix.scale) > 1:
            scale = self.add("Unsqueeze", scale, self.integers(-1))
        rows = self.add("Mul", self.cast(codes, TensorProto.FLOAT), scale)
        return self.add("Gather", rows, ids) if is_small else rows

    def scale(self, name: str, part: slice = WHOLE, label: str = "") -> str:
        """The scales of a matrix, [out] or [1]."""
        scale = self.model.matrices[name].scale[:, 0]
        return self.constant(f"{name}.weight_scale{label}", scale[part] if len(scale) > 1 else scale)

    def matmul(self, x: str, name: str, output: str | None = None) -> str:
        """float32 [..., in] -> [..., out]: x times the matrix `name`, plus its bias."""
        return self.product(self.operand(x, name), name, output=output)

    def operand(self, x: str, name: str) -> tuple[str, ...]:
        """What is multiplied by the matrix `name`: codes and scales, or `x` itself."""
        if self.is_float or self.model.quantization.activation_bits is None:
            return (x,)
        return self.quantize(x, self.model.matrices[name].codes.shape[1])

    def product(
        self, operand: tuple[str, ...], name: str, part: slice = WHOLE, label: str = "", output: str | None = None
    ) -> str:
        """The operand times a part of the outputs of the matrix `name`, which gets a label, plus its bias."""
        matrix, bias = self.model.matrices[name], self.model.vectors.get(f"{name}.bias")
        if name == "transformer.wte":  # stored for the lookup; ONNX Runtime turns it once, when it loads the model
            weight = self.add("Transpose", f"{name}.weight", perm=[1, 0])
        else:
            values = matrix.dequantize() if self.is_float else matrix.codes
            weight = self.constant(f"{name}.weight{label}", values[part].T)
        last = None if bias is not None else output
        if self.is_float:
            y = self.add("MatMul", *operand, weight, output=last)
        elif len(operand) == 1:
            product = self.add("MatMul", *operand, self.add("Cast", weight, to=TensorProto.FLOAT))
            y = self.add("Mul", product, self.scale(name, part, label), output=last)
        else:
            codes, scale = operand
            product = self.add("MatMulInteger", codes, weight, self.constant("zero_point", ZERO_POINT))
            product, weight_scale = self.cast(product, TensorProto.FLOAT), self.scale(name, part, label)
            # ONNX Runtime would take a bias into the product, and add it before the scales.
            is_one_node = len(matrix.codes[part]) <= NARROW and bias is None
            if is_one_node:  # of ONNX Runtime, product and scales
                y = self.add("Mul", product, self.add("Mul", scale, weight_scale), output=last)
            else:  # without the tokens' scales
                fused = self.add("Mul", product, self.add("Mul", self.one(), weight_scale))
                y = self.add("Mul", fused, scale, output=last)
        if bias is None:
            return y
        return self.add("Add", y, self.constant(f"{name}.bias{label}", bias[part]), output=output)

    def one(self) -> str:
        """A 1 that no optimizer knows.

        ONNX Runtime fuses a product with a computed scale of the activations only. That could be the tokens' scales,
        but by those it multiplies in a single thread, which takes longer than another node where rows are wide.
        """
        if not self.computed_one:
            batch = self.add("Shape", "input_ids", start=0, end=1)
            self.computed_one = self.cast(self.add("GreaterOrEqual", batch, self.integers(0)), TensorProto.FLOAT)
        return self.computed_one

    def quantize(self, x: str, width: int) -> tuple[str, str]:
        """One scale a token: the codes as uint8 [B, T, in] with zero point 128, and the scales [B, T, 1].

        A token of zeros has the scale 0: whatever its codes are, their product is 0.
        """
        absmax = self.add("ReduceMax", self.add("Abs", x), self.integers(-1))
        scale = self.add("Mul", absmax, self.constant("step", np.float32(1 / MAX_CODE)))
        self.zero_points = self.zero_points or self.each_token(ZERO_POINT)
        return self.add("QuantizeLinear", x, scale, self.zero_points, axis=-1, block_size=width), scale

    def each_token(self, value: np.generic) -> str:
        """`value` for each token, [B, T, 1]."""
        return self.filled(self.add("Shape", self.add("Unsqueeze", "input_ids", self.integers(-1))), value.reshape(1))

    def layer_norm(self, x: str, name: str) -> str:
        """LayerNorm over the last dimension."""
        vectors, epsilon = self.model.vectors, self.config.layer_norm_epsilon
        names = [name for name in (f"{name}.weight", f"{name}.bias") if name in vectors]
        weight, *bias = (self.constant(name, vectors[name]) for name in names)
        return self.add("LayerNormalization", x, weight, *bias, axis=-1, epsilon=epsilon)

    def mask(self) -> str:
        """What is added to the scores, [B, 1, T, S]: 0 where a query sees a key, else `HIDDEN`.

        Query i of T stands at index P + i of the S keys and sees those up to itself that `attention_mask` admits.
        """
        hidden = np.array([HIDDEN])
        # Of a full window, 4 bytes a pair of positions: ONNX Runtime computes it once, when it loads the model.
        # Its last rows and columns are the mask of fewer positions among themselves; they see all of the past.
        everywhere = self.filled(self.integers(*[self.config.block_size] * 2), hidden)
        full = self.add("Trilu", everywhere, self.constant("one", np.int64(1)), upper=1)
        queries = self.add("Shape", "input_ids", start=1, end=2)
        starts = self.add("Neg", self.add("Concat", queries, queries, axis=0))
        causal_TT = self.add("Slice", full, starts, self.integers(TO_THE_END, TO_THE_END))
        past = self.add("Shape", "past_key_values.0.key", start=2, end=3)
        causal_TS = self.add("Pad", causal_TT, self.add("Concat", self.integers(0), past, self.integers(0, 0), axis=0))
        admitted_BS = self.add("Cast", "attention_mask", to=TensorProto.BOOL)
        visible = self.constant("visible", np.zeros_like(hidden))
        padding_BS = self.add("Where", admitted_BS, visible, self.constant("hidden", hidden))
        return self.add("Min", causal_TS, self.add("Unsqueeze", padding_BS, self.integers(1, 2)))

    def block(self, x_BTC: str, mask_B1TS: str, layer: int, first_kept: str | None) -> str:
        """A pre-LayerNorm transformer block; from `first_kept` on (a negative index) where one is given."""
        name = f"transformer.h.{layer}"
        y_BTC, mask_B1TS = self.layer_norm(x_BTC, f"{name}.ln_1"), self.kept(mask_B1TS, 2, first_kept)
        y_BTC = self.attention(y_BTC, mask_B1TS, layer, first_kept)
        if self.zero_points:
            self.zero_points = self.kept(self.zero_points, 1, first_kept)
        x_BTC = self.add("Add", self.kept(x_BTC, 1, first_kept), self.matmul(y_BTC, f"{name}.attn.c_proj"))
        hidden = self.activation(self.matmul(self.layer_norm(x_BTC, f"{name}.ln_2"), f"{name}.mlp.c_fc"))
        return self.add("Add", x_BTC, self.matmul(hidden, f"{name}.mlp.c_proj"))

    def activation(self, x: str) -> str:
        """What stands between the two products of the multilayer perceptron."""
        if self.config.activation == "relu":
            return self.add("Relu", x)
        return self.add("Gelu", x, approximate="tanh" if self.config.activation == "gelu_tanh" else "none")

    def attention(self, x_BTC: str, mask_B1TS: str, layer: int, first_kept: str | None) -> str:
        """Self-attention as one node, without its output projection, [B, T, C]."""
        config, past, present = self.config, f"past_key_values.{layer}", f"present.{layer}"
        name, width = f"transformer.h.{layer}.attn.c_attn", config.n_embd
        operand = self.operand(x_BTC, name)
        queries, *keys_and_values = (
            self.product(
                tuple(self.kept(value, 1, first_kept) for value in operand) if kind == "q" else operand,
                name,
                slice(index * width, (index + 1) * width),
                f".{kind}",
            )
            for index, kind in enumerate("qkv")
        )
        inputs = [queries, *keys_and_values, mask_B1TS, f"{past}.key", f"{past}.value"]
        outputs = [f"Attention_{layer}", f"{present}.key", f"{present}.value"]
        node = helper.make_node(
            "Attention", inputs, outputs, outputs[0], q_num_heads=config.n_head, kv_num_heads=config.n_head
        )
        self.nodes.append(node)
        return outputs[0]
