"""The integer model as an ONNX graph (extra: onnx): version 2 of the int8 folder, with the same bits of every logit.

    input_ids, position_ids int64 [B, T], attention_mask int64 [B, S],
    past_key_values.{i}.key/value int8 [B, H, P, D], past_key_values.{i}.key_scale/value_scale float32 [B, H, P, 1]
    -> logits float32 [B, T, V], and present.{i}.* with S = P + T positions; P may be 0

A key or a value is its codes times its scale, a power of two. An `attention_mask` with n + 1 in the place of a one asks
for the logits of the n last positions alone, and the id that pads is looked up as id 0, as in `onnx_graph`.

Standard operators alone, and float32: every value is an integer within 2^24 times a power of two, which float32 holds
exactly, so that `shift(x, s)` is Floor(x * 2^-s + 0.5) in any runtime, with any number of threads. What the
specification (`picogpt_jax/int8/README.md`, whose names are used here) writes as exponents are powers of two here:
`2^bits(a)` comes from rounding errors (S. M. Rump, "Fast interval matrix multiplication", 2012), three small nodes.

Shapes: B batch, T time (query), P past, S time (key), C width, H heads, D head size, F hidden, V vocabulary.
"""

import math

import numpy as np
import numpy.typing as npt

try:
    import onnx
    from onnx import TensorProto, helper
except ImportError as error:
    raise ImportError("this needs onnx; install it with: pip install 'picogpt_jax[onnx]'") from error

from picogpt_jax.formats.hf_documents import padding
from picogpt_jax.formats.onnx_nodes import TO_THE_END, IntegerNodes
from picogpt_jax.int8.integer_model import HEAD_BITS, HIDDEN_BITS, NORM_BITS, RESIDUAL_BITS, IntegerModel

LIMIT = 1 << 22  # of a fixed-point value
LARGEST = (1 << 23) - 1  # of the residual stream
EXACT_INPUTS = 2**24 // 127**2  # as many products of two codes sum up within 2^24
EXACT_HEAD = 2**23 // 127**2  # features of a head whose scores have room for a half
NARROW = 512  # outputs of a product whose tokens' scales ONNX Runtime multiplies by in the same node
SMALL_TABLE = 4096  # rows of an embedding that is looked up in fixed point
FURTHEST = 15 * 256  # from the largest score, where a weight is 0
HIDDEN = np.float32(-(2.0**40))  # of a score
LARGEST_HIDDEN, FLAT = 32767, 1024  # of a GELU: the largest input, and where it is the identity or 0
TIE = np.float32(1 + 2.0**-14)  # moves halves up and nothing else, of numbers of 13 bits


class IntegerGraph(IntegerNodes):
    """The graph, function by function of the specification."""

    def __init__(self, model: IntegerModel) -> None:
        super().__init__()
        self.model, self.config = model, model.model
        self.computed_one = ""  # computed where it is first needed

    def build(self) -> onnx.GraphProto:
        """The whole model."""
        config = self.config
        inputs, outputs = self.signature()
        first_kept = self.add("Sub", self.integers(1), self.add("ReduceMax", "attention_mask", keepdims=0))
        ids, (_, pad) = "input_ids", padding(self.model.vocabulary)
        if pad == config.vocab_size:
            ids = self.add("Where", self.add("Equal", ids, self.integers(pad)), self.integers(0), ids)
        x_BTC = self.add("Add", self.lookup("transformer.wte", ids), self.lookup("transformer.wpe", "position_ids"))
        mask_B1TS = self.mask()
        for layer in range(config.n_layer):
            name, first = f"transformer.h.{layer}", first_kept if layer == config.n_layer - 1 else None
            heads = self.attention(self.norm(x_BTC, f"{name}.ln_1"), self.kept(mask_B1TS, 2, first), layer, first)
            y_BTC = self.linear(heads, f"{name}.attn.c_proj", RESIDUAL_BITS)
            x_BTC = self.saturated(self.add("Add", self.kept(x_BTC, 1, first), y_BTC), LARGEST)
            hidden = self.activation(self.norm(x_BTC, f"{name}.ln_2"), f"{name}.mlp.c_fc")
            x_BTC = self.add("Add", x_BTC, self.linear(hidden, f"{name}.mlp.c_proj", RESIDUAL_BITS))
            x_BTC = self.saturated(x_BTC, LARGEST)
        logits = self.linear(self.norm(x_BTC, "transformer.ln_f"), "transformer.wte", RESIDUAL_BITS)
        self.times(logits, 2.0**-RESIDUAL_BITS, output="logits")
        return helper.make_graph(self.nodes, "picogpt", inputs, outputs, list(self.initializers.values()))

    def signature(self) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        """The inputs and outputs, named as Optimum names them; the scales' names are ours.

        Optimum's `generate` begins with no positions of D features for each of them, the scales, too; so a scale that
        comes in may have any width.
        """
        config, info = self.config, helper.make_tensor_value_info
        time, total = ["batch_size", "sequence_length"], "past_sequence_length + sequence_length"
        inputs = [
            info("input_ids", TensorProto.INT64, time),
            info("attention_mask", TensorProto.INT64, ["batch_size", total]),
            info("position_ids", TensorProto.INT64, time),
        ]
        outputs = [info("logits", TensorProto.FLOAT, ["batch_size", "kept_sequence_length", config.vocab_size])]
        for layer in range(config.n_layer):
            for kind in ("key", "value"):
                codes = (kind, TensorProto.INT8, config.head_size, config.head_size)
                for part, dtype, width, size in (codes, (f"{kind}_scale", TensorProto.FLOAT, "scale_width", 1)):
                    past: list[str | int | None] = ["batch_size", config.n_head, "past_sequence_length", width]
                    inputs.append(info(f"past_key_values.{layer}.{part}", dtype, past))
                    outputs.append(info(f"present.{layer}.{part}", dtype, [*past[:2], total, size]))
        return inputs, outputs

    def quantize(self, u: str, scale: str) -> str:
        """The codes shift(u, t), as unsigned bytes with the zero point 128; `scale` is 2^t."""
        return self.byte(self.rounded(self.add("Div", u, scale)))

    def lookup(self, name: str, ids: str) -> str:
        """The rows `ids` of an embedding, with the fraction bits of the residual stream."""
        codes, exponent = self.model.tensors[f"{name}.weight"], self.model.tensors[f"{name}.weight_exponent"][:, 0]
        # A small table is turned into fixed point as a whole, which ONNX Runtime does once, when it loads the model.
        is_small = len(codes) <= SMALL_TABLE
        rows = self.constant(f"{name}.weight", codes)
        scale = self.constant(f"{name}.row_scale", np.ldexp(np.float32(1), exponent.astype(np.int32) + RESIDUAL_BITS))
        if not is_small:
            rows = self.add("Gather", rows, ids)
            scale = self.add("Gather", scale, ids) if len(exponent) > 1 else scale
        if len(exponent) > 1:
            scale = self.add("Unsqueeze", scale, self.integers(-1))
        rows = self.saturated(self.rounded(self.add("Mul", self.cast(rows, TensorProto.FLOAT), scale)), LIMIT)
        return self.add("Gather", rows, ids) if is_small else rows

    def one(self) -> str:
        """A 1 that no optimizer knows: ONNX Runtime fuses a product with a computed scale of the activations only."""
        if not self.computed_one:
            batch = self.add("Shape", "input_ids", start=0, end=1)
            self.computed_one = self.cast(self.add("GreaterOrEqual", batch, self.integers(0)), TensorProto.FLOAT)
        return self.computed_one

    def linear(self, operand: tuple[str, str], name: str, fraction_bits: int) -> str:
        """Codes and their scales times the matrix `name`, plus its bias: integers with these fraction bits."""
        codes, scale = operand
        weight_OI, exponent = (self.model.tensors[f"{name}.weight{end}"] for end in ("", "_exponent"))
        if name == "transformer.wte":  # stored for the lookup; ONNX Runtime turns it once, when it loads the model
            weight = self.add("Transpose", f"{name}.weight", perm=[1, 0])
        else:
            weight = self.constant(f"{name}.weight", weight_OI.T)
        factor = np.ldexp(np.float32(1), exponent[:, 0].astype(np.int32) + fraction_bits)
        factor_O = self.constant(f"{name}.factor", factor)
        acc = self.add("MatMulInteger", codes, weight, self.constant("zero_point", np.uint8(128)))
        if weight_OI.shape[1] > EXACT_INPUTS:
            y = self.of_wide_sums(acc, self.add("Mul", scale, factor_O))
        elif len(weight_OI) <= NARROW:
            y = self.add("Mul", self.cast(acc, TensorProto.FLOAT), self.add("Mul", scale, factor_O))
            y = self.rounded(y)
        else:
            fused = self.add("Mul", self.cast(acc, TensorProto.FLOAT), self.add("Mul", self.one(), factor_O))
            y = self.rounded(self.add("Mul", fused, scale))
        y = self.saturated(y, LIMIT)
        bias = self.model.tensors.get(f"{name}.bias")
        if bias is None:
            return y
        return self.add("Add", y, self.constant(f"{name}.bias", bias.astype(np.float32)))

    def of_wide_sums(self, acc: str, factor: str) -> str:
        """round(acc * factor) of int32 sums that float32 does not hold; exact within 2^24, which is all that counts.

        The last 12 bits are rounded apart from the others: one of the two results is a whole number before that.
        """
        low = self.add("Mod", acc, self.constant("low_bits", np.int32(4096)))
        parts = (
            self.add("Mul", self.cast(part, TensorProto.FLOAT), factor) for part in (self.add("Sub", acc, low), low)
        )
        return self.add("Add", *map(self.rounded, parts))

    def norm(self, x: str, name: str) -> tuple[str, str]:
        """LayerNorm, quantized: codes [B, T, C] and their scales [B, T, 1]."""
        width = self.config.n_embd
        m, (exponent,) = (self.model.tensors[f"{name}.weight{end}"] for end in ("", "_exponent"))
        bias = self.model.tensors.get(f"{name}.bias")
        v = 5 if width <= 1024 else 6 if width <= 4096 else 7
        k = (40 - width.bit_length()) >> 1
        low, high = self.ends(x)
        # 2^n: bits(a) - 11 is 10 below the exponent of `below`. A vector of zeros needs any number but 0.
        size = self.add("Max", self.below(self.largest(low, high), 2.0**-10), self.number(2.0**-11))
        x, low, high = (self.rounded(self.add("Div", value, size)) for value in (x, low, high))
        total = self.add("ReduceSum", x, self.integers(-1))
        absolute = self.add("Add", self.add("Abs", total), self.number(width >> 1))
        mean = self.add("Floor", self.add("Div", absolute, self.number(width)))
        mean = self.add("Mul", self.add("Sign", total), mean)
        low, high = (self.add("Sub", value, mean) for value in (low, high))
        is_plain = bias is None and (m == 4096).all()
        # Where d * R is rounded next: times R, 2^7 to 2^9, the 2^-11 more round halves up and change nothing else.
        d = self.add("Sub", x, self.add("Sub", mean, self.number(2.0**-11)) if is_plain else mean)
        small = self.rounded(self.times(d, 2.0**-v))
        squares = self.add("ReduceSum", self.add("Mul", small, small), self.integers(-1))
        squares = self.add("Max", squares, self.number(1))
        # 4^j is the largest power of 4 up to 2^(24 - bits(squares)).
        room = self.add("Div", self.number(2.0**23), self.below(squares))
        step = self.below(self.add("Sqrt", room))  # 2^j
        q = self.add("Floor", self.add("Mul", self.add("Sqrt", squares), step))
        half = self.add("Floor", self.times(q, 0.5))
        dividend = self.add("Add", half, self.number(math.isqrt(width << (2 * k))))
        r = self.add("Floor", self.add("Div", dividend, q))
        e = self.times(step, 2.0 ** (int(exponent) + 12 - k - v))  # 2^e
        if (m != 4096).any():
            d = self.rounded(self.add("Mul", d, self.constant(f"{name}.weight", m.astype(np.float32) / 4096)))
            low, high = self.ends(d)
        if bias is None:
            factor, low, high = r, self.add("Mul", low, r), self.add("Mul", high, r)
            u, power = d, self.fit(self.largest(low, high), self.number(1))
            u = self.add("Mul", u, self.add("Div", factor, power))
            return self.byte(u if is_plain else self.rounded(u)), self.add("Mul", power, e)
        u = self.rounded(self.add("Mul", d, self.add("Mul", r, self.times(e, 2.0**NORM_BITS))))
        u = self.add("Add", self.saturated(u, LIMIT), self.constant(f"{name}.bias", bias.astype(np.float32)))
        power = self.fit(self.largest(*self.ends(u)), self.number(1))
        return self.quantize(u, power), self.times(power, 2.0**-NORM_BITS)

    def activation(self, operand: tuple[str, str], name: str) -> tuple[str, str]:
        """The hidden units after their activation, quantized."""
        u = self.linear(operand, name, HIDDEN_BITS[self.config.activation])
        if self.config.activation == "relu":
            g = self.add("Relu", u)
            a = self.add("ReduceMax", g, self.integers(-1))
        else:
            u = self.add("Clip", u, self.number(-FLAT), self.number(LARGEST_HIDDEN))
            index = self.add("Add", u, self.number(FLAT))
            g = self.looked_up(index, self.constant("gelu", gelu_table()))
            a = self.rounded(self.largest(*self.ends(g)))
        power = self.fit(a, self.number(1))
        scale = self.times(power, 2.0**-RESIDUAL_BITS)
        if self.config.activation == "relu":
            return self.quantize(g, power), scale
        zero = self.add("Mul", power, self.number(0.0))
        zero_points = self.cast(self.add("Add", zero, self.number(128)), TensorProto.UINT8)
        codes = self.add("QuantizeLinear", g, power, zero_points, axis=-1, block_size=self.config.n_hidden)
        return codes, scale

    def mask(self) -> str:
        """What is added to the scores, [B, 1, T, S]: a half, to round them, where a query sees a key; else `HIDDEN`.

        Query i of T stands at index P + i of the S keys and sees those up to itself that `attention_mask` admits.
        """
        half = np.array([0.5], np.float32)
        # Of a full window: ONNX Runtime computes it once, when it loads the model. Its last rows and columns are the
        # mask of fewer positions among themselves; they see all of the past.
        everywhere = self.filled(self.integers(*[self.config.block_size] * 2), np.array([HIDDEN], np.float32))
        hidden = self.add("Trilu", everywhere, self.constant("one", np.int64(1)), upper=1)
        full = self.add("Add", hidden, self.number(0.5))
        queries = self.add("Shape", "input_ids", start=1, end=2)
        starts = self.add("Neg", self.add("Concat", queries, queries, axis=0))
        causal_TT = self.add("Slice", full, starts, self.integers(TO_THE_END, TO_THE_END))
        past = self.add("Shape", "past_key_values.0.key", start=2, end=3)
        pads = self.add("Concat", self.integers(0), past, self.integers(0, 0), axis=0)
        causal_TS = self.add("Pad", causal_TT, pads, self.number(0.5))
        admitted_BS = self.cast("attention_mask", TensorProto.BOOL)
        padding_BS = self.add("Where", admitted_BS, self.constant("half", half), self.constant("hidden", HIDDEN))
        return self.add("Min", causal_TS, self.add("Unsqueeze", padding_BS, self.integers(1, 2)))

    def heads(self, operand: tuple[str, str], layer: int) -> tuple[list[str], list[str]]:
        """q, k, v, each quantized per position and head: codes int8 [B, H, T, D], scales [B, H, T, 1]."""
        config = self.config
        qkv = self.linear(operand, f"transformer.h.{layer}.attn.c_attn", HEAD_BITS)
        qkv = self.add("Reshape", qkv, self.integers(0, 0, 3 * config.n_head, config.head_size))
        power = self.fit(self.largest(*self.ends(qkv)), self.number(1))
        codes = self.cast(self.rounded(self.add("Div", qkv, power)), TensorProto.INT8)
        values = []
        for value, label in ((codes, "codes"), (self.times(power, 2.0**-HEAD_BITS), "scale")):
            parts = [f"{kind}_{label}_{layer}" for kind in "qkv"]
            turned = self.add("Transpose", value, perm=[0, 2, 1, 3])
            self.nodes.append(
                helper.make_node("Split", [turned], parts, name=f"Split_{label}_{layer}", axis=1, num_outputs=3)
            )
            values.append(parts)
        return values[0], values[1]

    def attention(
        self, operand: tuple[str, str], mask_B1TS: str, layer: int, first_kept: str | None
    ) -> tuple[str, str]:
        """Causal attention: codes [B, T, C] and their scales [B, T, 1]."""
        config, last = self.config, self.integers(-1)
        (q, *codes), (q_scale, *scales) = self.heads(operand, layer)
        present = []
        for kind, code, scale in zip(("key", "value"), codes, scales, strict=True):
            for part, new in ((kind, code), (f"{kind}_scale", scale)):
                past, output = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
                if part != kind:
                    past = self.add("Gather", past, self.integers(0), axis=3)
                present.append(self.add("Concat", past, new, axis=2, output=output))
        k, k_scale, v, v_scale = present
        q, q_scale = (self.kept(value, 2, first_kept) for value in (q, q_scale))
        # Scores with 8 fraction bits: eq + ek is 8 more than the exponents of the scales, up to 2 cap.
        cap = (24 - (127 * 127 * config.head_size).bit_length()) >> 1
        q_factor = self.add("Min", self.times(q_scale, 16), self.number(2.0**cap))
        k_factor = self.add("Min", self.times(k_scale, 16), self.number(2.0**cap))
        q = self.add("Mul", self.cast(q, TensorProto.FLOAT), q_factor)
        k = self.add("Mul", self.cast(k, TensorProto.FLOAT), k_factor)
        scores = self.add("MatMul", q, self.add("Transpose", k, perm=[0, 1, 3, 2]))
        if config.head_size > EXACT_HEAD:  # a half may not fit beside a score; beside its fraction it does
            whole = self.add("Floor", scores)
            scores = self.add("Add", whole, self.rounded(self.add("Sub", scores, whole)))
            mask_B1TS = self.add("Floor", mask_B1TS)
        z = self.add("Floor", self.add("Add", scores, mask_B1TS))
        d = self.add("Min", self.add("Sub", self.add("ReduceMax", z, last), z), self.number(FURTHEST))
        p = self.looked_up(d, self.constant("powers", power_table()))
        total = self.add("ReduceSum", p, last)
        # 2^(tv - 12) in the place of 2^tv, in the weights and in their largest.
        weights = self.add("Mul", p, self.add("Transpose", v_scale, perm=[0, 1, 3, 2]))
        weight_bits = 8 - max((config.block_size - 1) // 512, 0).bit_length()
        top = self.below(self.add("ReduceMax", weights, last), 2.0 ** (1 - weight_bits))
        weights = self.add("Mul", weights, self.add("Div", self.number(float(TIE)), top))
        weights = self.add("QuantizeLinear", weights, self.number(1.0), self.constant("no_zero_point", np.uint8(0)))
        if weight_bits < 8:
            weights = self.add("Min", weights, self.constant("largest_weight", np.uint8(2**weight_bits - 1)))
        o = self.cast(self.add("MatMulInteger", weights, v), TensorProto.FLOAT)
        return self.heads_together(o, total, top)

    def heads_together(self, o: str, total: str, top: str) -> tuple[str, str]:
        """Of weighted sums [B, H, T, D], divided by the sums of weights: codes [B, T, C] and scales [B, T, 1]."""
        low, high = self.ends(o)
        n = self.add("Max", self.below(self.largest(low, high), 2.0**-14), self.number(1))
        o, low, high = (self.rounded(self.add("Div", value, n)) for value in (o, low, high))
        dt = self.below(total, 2.0**-7)
        narrow = self.rounded(self.add("Div", total, dt))
        half = self.add("Floor", self.times(narrow, 0.5))
        r = self.add("Floor", self.add("Div", self.add("Add", half, self.number(2.0**15)), narrow))
        e = self.times(self.add("Div", self.add("Mul", top, n), dt), 2.0**-15)
        a = self.add("Mul", self.largest(low, high), r)
        power = self.add("Mul", self.fit(a, self.add("Min", a, self.number(1))), e)  # 0 of a head of zeros
        power = self.add("ReduceMax", power, self.integers(1))
        power = self.add("Max", power, self.number(2.0**-60))  # where all are: their codes are 0 with any scale
        factor = self.add("Div", self.add("Mul", r, e), power)
        codes = self.byte(self.rounded(self.add("Mul", o, factor)))
        codes = self.add("Reshape", self.add("Transpose", codes, perm=[0, 2, 1, 3]), self.integers(0, 0, -1))
        return codes, self.add("Squeeze", power, self.integers(1))


def power_table() -> npt.NDArray[np.float32]:
    """4096 * 2^(-d / 256) of d from 0 to 15 * 256."""
    d = np.arange(FURTHEST + 1)
    f = d & 255
    return ((4096 - ((f * (2753 - ((705 * f) >> 8))) >> 8)) >> (d >> 8)).astype(np.float32)


def gelu_table() -> npt.NDArray[np.float32]:
    """GELU from 8 fraction bits to 10, of -1024 to 32767, and a quarter: it rounds halves of a quotient up."""
    h = np.arange(-FLAT, LARGEST_HIDDEN + 1)
    a = np.minimum(np.abs(h), FLAT)
    p = 4096 - ((a * (3276 + ((a * (4220 - ((a * 3908) >> 10))) >> 10))) >> 10)
    square = (p * p) >> 12
    below = (a * ((square * square) >> 12) + 1024) >> 11
    return (4 * np.maximum(h, 0) - below).astype(np.float32) + np.float32(0.25)
