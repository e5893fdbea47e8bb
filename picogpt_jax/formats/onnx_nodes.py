"""The nodes and initializers of an ONNX graph while it is built (extra: onnx)."""

from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError as error:
    raise ImportError("this needs onnx; install it with: pip install 'picogpt_jax[onnx]'") from error

TO_THE_END = np.iinfo(np.int64).max


class Nodes:
    """Adds nodes in the order of computation; every method takes and returns names of values."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        """An initializer, stored once under its name."""
        if name not in self.initializers:
            array = np.asarray(value)
            self.initializers[name] = numpy_helper.from_array(array.copy(order="C"), name)
        return name

    def integers(self, *values: int) -> str:
        """An int64 initializer [n]."""
        return self.constant("integers_" + "_".join(map(str, values)), np.array(values, np.int64))

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """A node with one output; returns its name."""
        name = output or f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def cast(self, x: str, dtype: int) -> str:
        """`x` in another type."""
        return self.add("Cast", x, to=dtype)

    def filled(self, shape: str, value: npt.NDArray[Any]) -> str:
        """A tensor of this shape, all `value` [1]."""
        return self.add("ConstantOfShape", shape, value=numpy_helper.from_array(value))

    def kept(self, value: str, axis: int, first_kept: str | None) -> str:
        """`value` from the index `first_kept` on; all of it without one."""
        if first_kept is None:
            return value
        return self.add("Slice", value, first_kept, self.integers(TO_THE_END), self.integers(axis))


class IntegerNodes(Nodes):
    """Functions of integers in float32, which holds them exactly; see `onnx_integer`."""

    def number(self, value: float) -> str:
        """A float32 initializer []."""
        return self.constant(f"number_{value!r}", np.float32(value))

    def times(self, x: str, factor: float, output: str | None = None) -> str:
        """`x` times a constant."""
        return self.add("Mul", x, self.number(factor), output=output)

    def rounded(self, x: str) -> str:
        """To the nearest integer, halves up."""
        return self.add("Floor", self.add("Add", x, self.number(0.5)))

    def saturated(self, x: str, limit: int) -> str:
        """Within +-limit."""
        return self.add("Clip", x, self.number(-limit), self.number(limit))

    def below(self, a: str, factor: float = 1.0) -> str:
        """The largest power of two that is at most `a`, times `factor` (a power of two as well); 0 for 0."""
        q = self.times(a, factor * (2**23 + 1))
        return self.add("Sub", q, self.times(q, 1 - 2.0**-24))

    def largest(self, low: str, high: str) -> str:
        """The largest magnitude of what lies from `low` to `high`."""
        return self.add("Max", high, self.add("Neg", low))

    def ends(self, x: str) -> tuple[str, str]:
        """The smallest and the largest of each vector, [..., 1]."""
        return tuple(self.add(f"Reduce{end}", x, self.integers(-1)) for end in ("Min", "Max"))  # type: ignore[return-value]

    def fit(self, a: str, smallest: str) -> str:
        """2^fit(a), a up to 2^23; at least `smallest`."""
        # 127.5 * 2^t > a is 2^(t + 7) > a * 256 / 255: twice the power of two below that.
        q = self.times(a, float(np.float32(256 / 255)) * (2**23 + 1) / 64)
        return self.add("Max", self.add("Sub", q, self.times(q, 1 - 2.0**-24)), smallest)

    def byte(self, codes: str) -> str:
        """Codes as unsigned bytes, which ONNX Runtime multiplies fast."""
        return self.add("QuantizeLinear", codes, self.number(1.0), self.constant("zero_point", np.uint8(128)))

    def looked_up(self, index: str, table: str) -> str:
        """The entries of a table. ONNX Runtime's Gather takes ten times as long for single numbers."""
        flat = self.add("Reshape", self.cast(index, TensorProto.INT32), self.integers(-1))
        return self.add("Reshape", self.add("GatherElements", table, flat), self.add("Shape", index))
