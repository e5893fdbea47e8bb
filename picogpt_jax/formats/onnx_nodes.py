"""The nodes and initializers of an ONNX graph while it is built (extra: onnx)."""

from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import onnx
    from onnx import helper, numpy_helper
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
