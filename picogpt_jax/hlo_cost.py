"""What a compiled program does on one device: FLOPs by type, bytes of memory traffic, collectives.

FLOPs are those of matrix products (HLO's dot and convolution); element-wise work is not counted. Memory traffic is what
each scheduled instruction reads from and writes to main memory; what the compiler keeps in on-chip memory is free.
"""

import dataclasses
import functools
import math
import re
from typing import Literal

from picogpt_jax.hlo import Computation, Executed, HloArray, Instruction, Module, replica_groups

PRODUCTS = ("dot", "convolution")
COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"}
COLLECTIVES |= {"collective-broadcast"}
# These move no bytes of main memory: names for parts of buffers, constants, the ends of what was started before.
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
FREE |= {"opt-barrier", "add-dependency", "domain", "get-dimension-size", "send", "recv"}

Precision = Literal["int8", "bfloat16", "float32"]


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product: its FLOPs (2 a multiply-add) and the type of its operands."""

    flops: float
    precision: Precision


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation as one device sees it.

    Attributes:
        kind: all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute.
        n_bytes: the whole array of a group: what an all-gather ends with, and a reduce-scatter begins with; for an
            all-to-all and a permute, what one device holds.
        dtype: of the largest operand.
        groups: the devices, by their number in the mesh, of each group; of a permute: pairs.
        overlapped: started and finished by different instructions, so that others run meanwhile.
        times: how often it runs in a step.
        source: the op_name of the model's code that it comes from.
    """

    kind: str
    n_bytes: int
    dtype: str
    groups: list[list[int]]
    overlapped: bool
    times: int
    source: str


@dataclasses.dataclass(frozen=True)
class Work:
    """A scheduled instruction: its products, the bytes it moves, and whether it runs beside others (a prefetch)."""

    products: list[Product]
    n_bytes: int
    asynchronous: bool
    times: int
    instruction: Instruction


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does in a step.

    Attributes:
        uncounted: what could not be read: loops without a known count, kernels that do not tell their FLOPs.
    """

    work: list[Work]
    collectives: list[Collective]
    uncounted: list[str]

    def flops(self, precision: Precision) -> float:
        return sum(
            item.flops * work.times for work in self.work for item in work.products if item.precision == precision
        )

    def products(self, precision: Precision) -> int:
        return sum(work.times for work in self.work for item in work.products if item.precision == precision)

    @property
    def n_bytes(self) -> int:
        return sum(work.n_bytes * work.times for work in self.work)


def cost_of(module: Module, devices: int) -> Cost:
    """Counts a compiled module.

    Args:
        devices: number of devices that run it.
    """
    executed, unknown_loops = module.executed()
    uncounted = [f"loop {name}: counted once" for name in unknown_loops]
    work: list[Work] = []
    collectives: dict[tuple[str, str], Collective] = {}
    for item in executed:
        found = _collectives(module, item, devices)
        collectives = found | collectives  # the first part says how it began
        products = _products(module, item)
        kernel = _kernel(item.instruction)
        if kernel is not None:
            products += [Product(kernel, "bfloat16")] if kernel else []
            uncounted += [] if kernel else [f"kernel {item.instruction.name}: its FLOPs are not stated"]
        n_bytes = 0 if found else _memory_bytes(module, item)
        if products or n_bytes:
            asynchronous = item.instruction.opcode.endswith("-start")
            work.append(Work(products, n_bytes, asynchronous, item.times, item.instruction))
    return Cost(work, list(collectives.values()), uncounted)


# --- products -----------------------------------------------------------------------------------------------------


def _products(module: Module, item: Executed) -> list[Product]:
    candidates = [(item.instruction, item.computation), *module.inside(item.instruction)]
    return [
        Product(_flops(instruction, computation), _precision(instruction, computation))
        for instruction, computation in candidates
        if instruction.opcode in PRODUCTS
    ]


def _precision(instruction: Instruction, computation: Computation) -> Precision:
    dtypes = {computation.by_name[name].result[0].dtype for name in instruction.operands[:2]}
    if dtypes <= {"s8", "u8"}:
        return "int8"
    return "float32" if dtypes == {"f32"} else "bfloat16"


def _flops(instruction: Instruction, computation: Computation) -> float:
    left, right = (computation.by_name[name].result[0].dims for name in instruction.operands[:2])
    result = instruction.result[0].dims
    if instruction.opcode == "dot":
        contracted = instruction.attribute("lhs_contracting_dims") or ""
        return 2.0 * math.prod(result) * math.prod(left[int(dim)] for dim in re.findall(r"\d+", contracted))
    return convolution_flops(left, right, result, instruction.attributes)


def convolution_flops(left: tuple[int, ...], right: tuple[int, ...], result: tuple[int, ...], attributes: str) -> float:
    """FLOPs of a convolution, counting only the window positions that lie on an element of the input.

    The TPU compiler writes every matrix product as a convolution, a batched one with the batch as a dilated window of
    which one position a row is not padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels, attributes
    lhs, rhs, out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    spatial = sorted(label for label in lhs if label.isdigit())

    def field(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    positions = 1
    for index, label in enumerate(spatial):
        low = int(field("pad", "0_0")[index].split("_")[0])
        numbers = (int(field(name, "1")[index]) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        sizes = (left[lhs.index(label)], right[rhs.index(label)], result[out.index(label)])
        positions *= _window_positions(*sizes, low, *numbers)
    return 2.0 * result[out.index("b")] * result[out.index("f")] * right[rhs.index("i")] * positions


@functools.cache
def _window_positions(size: int, window: int, outputs: int, low: int, stride: int, dilation: int, step: int) -> int:
    """Pairs of an output and a window position that meet an input element, along one dimension."""
    if stride == dilation == step == 1 and low == 0 and size == outputs + window - 1:
        return outputs * window  # nothing is padded
    starts = ((output * stride - low + position * step) for output in range(outputs) for position in range(window))
    return sum(1 for start in starts if start % dilation == 0 and 0 <= start // dilation < size)


def _kernel(instruction: Instruction) -> float | None:
    """FLOPs that a Pallas kernel states in its cost estimate, 0 where it states none; None if this is no kernel."""
    if instruction.opcode != "custom-call" or 'custom_call_target="tpu_custom_call"' not in instruction.attributes:
        return None
    stated = re.search(r'\\?"flops\\?":\s*\\?"?(\d+)', instruction.attributes)
    return float(stated[1]) if stated else 0.0


# --- collectives --------------------------------------------------------------------------------------------------


def _collectives(module: Module, item: Executed, devices: int) -> dict[tuple[str, str], Collective]:
    """Collectives that an instruction is, or that are fused into it.

    One whose parts are spread over several instructions (started, fused with a product, finished) has the same channel
    in all of them: it is the key, with the computation, so that it counts once.
    """
    found = {}
    for instruction, computation in [(item.instruction, item.computation), *module.inside(item.instruction)]:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        channel = instruction.attribute("channel_id") or instruction.name
        groups = _groups(instruction, devices)
        operands = [array for name in instruction.operands for array in computation.by_name[name].result]
        n_bytes = sum(array.n_bytes for array in operands) * (len(groups[0]) if kind == "all-gather" else 1)
        fused = item.instruction.called("calls") or ""
        if kind == "all-reduce" and "all-reduce-scatter" in fused:
            kind = "reduce-scatter"  # the TPU compiler's name of an all-reduce fused with the slice that is kept
        # Started apart from its end: as an instruction of its own, or inside a fusion, which then holds a marker.
        overlapped = "-start" in instruction.opcode + item.instruction.opcode or "async" in fused
        overlapped = overlapped or any(
            "AsyncCollective" in inner.attributes for inner, _ in module.inside(item.instruction)
        )
        dtype = max(operands, key=lambda array: array.n_bytes).dtype
        name = re.search(r'op_name="([^"]*)"', item.instruction.attributes + instruction.attributes)
        source = name[1] if name else ""
        found[item.computation.name, channel] = Collective(kind, n_bytes, dtype, groups, overlapped, item.times, source)
    return found


def _groups(instruction: Instruction, devices: int) -> list[list[int]]:
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes)
    if pairs:
        return [[int(number) for number in pair] for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
    return replica_groups(instruction.attributes, devices)


# --- memory -------------------------------------------------------------------------------------------------------


def _memory_bytes(module: Module, item: Executed) -> int:
    """Bytes of main memory that a scheduled instruction reads and writes."""
    instruction, computation = item.instruction, item.computation
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith(("-done", "-update")):
        return 0
    if opcode == "custom-call" and _kernel(instruction) is None:
        return 0  # the TPU compiler's own markers, such as AllocateBuffer
    arrays = {name: computation.by_name[name].result for name in instruction.operands}
    if opcode.endswith(
        "-start"
    ):  # a copy or slice to or from on-chip memory; the result is (to, from, ...) or a wrapper
        moved = instruction.result[: 2 if opcode == "copy-start" else None]
        smallest = min((array.n_bytes for array in moved if array.n_bytes > 8), default=0)
        sides = (*moved[:1], *(part for parts in arrays.values() for part in parts[:1]))
        return smallest * sum(array.memory_space == 0 for array in sides)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return _main(instruction.result) + _main(instruction.result)
    if opcode == "dynamic-update-slice":
        return 2 * _main(arrays[instruction.operands[1]])
    if opcode == "fusion" and instruction.called("calls"):
        inner = module.called(instruction)
        read = 0
        for parameter, name in zip(inner.parameters, instruction.operands, strict=True):
            if _main(arrays[name]):
                read += _bytes_read(module, inner, parameter)
        return read + _bytes_written(module, inner, instruction.result)
    return sum(map(_main, arrays.values())) + _main(instruction.result)


def _main(arrays: tuple[HloArray, ...]) -> int:
    return sum(array.n_bytes for array in arrays if array.memory_space == 0)


def _bytes_read(module: Module, computation: Computation, value: Instruction) -> int:
    """Bytes of `value` that a fusion reads: parts only, where all that use it take slices, or update one in place."""
    whole = sum(array.n_bytes for array in value.result)
    total = 0
    for user in computation.users[value.name]:
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
            total += sum(array.n_bytes for array in user.result)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        elif user.opcode == "bitcast":
            total += _bytes_read(module, computation, user)
        elif user.opcode == "fusion" and user.called("calls"):
            inner = module.called(user)
            places = [place for place, name in enumerate(user.operands) if name == value.name]
            total += sum(_bytes_read(module, inner, inner.parameters[place]) for place in places)
        else:
            return whole
    return min(total, whole)


def _bytes_written(module: Module, computation: Computation, result: tuple[HloArray, ...]) -> int:
    """Bytes that a fusion writes: of an update in place, the part that is updated."""
    root = computation.root
    outputs = [computation.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(outputs) != len(result):
        return _main(result)
    return sum(
        _written(module, computation, output)
        for output, array in zip(outputs, result, strict=True)
        if not array.memory_space
    )


def _written(module: Module, computation: Computation, output: Instruction) -> int:
    while output.opcode == "bitcast":
        output = computation.by_name[output.operands[0]]
    if output.opcode == "dynamic-update-slice":
        return sum(array.n_bytes for array in computation.by_name[output.operands[1]].result)
    if output.opcode == "fusion" and output.called("calls") and len(output.result) == 1:
        inner = module.called(output)
        return _written(module, inner, inner.root)
    return sum(array.n_bytes for array in output.result)
