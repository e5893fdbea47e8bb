"""What a compiled program does on one device: FLOPs by type, bytes of memory traffic, collectives.

FLOPs are those of matrix products, also of kernels and libraries; element-wise work is not counted. Memory traffic is
what each scheduled instruction reads from and writes to main memory; what the compiler keeps on the chip is free.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from typing import Literal

from picogpt_jax.kernels import integer_attention
from picogpt_jax.kernels.fused_attention import LANES
from picogpt_jax.planning.hlo import Computation, Instruction, Module, integers, replica_groups
from picogpt_jax.planning.loops import Executed, executed
from picogpt_jax.planning.memory import (
    CUBLAS,
    CUBLAS_GEMM,
    CUDNN_BACKWARD,
    CUDNN_FORWARD,
    MARKERS,
    TRITON,
    memory_bytes,
)

PRODUCTS = ("dot", "convolution")
# Products of the splash attention kernels: scores and result; scores again, their gradient and the queries'; both, and
# the keys' and values'.
SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
# Products of cuDNN's attention: scores and result; scores again, gradients of the weights, values, queries and keys.
CUDNN_PRODUCTS = {CUDNN_FORWARD: 2, CUDNN_BACKWARD: 5}
COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"}
COLLECTIVES |= {"collective-broadcast"}

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
        uncounted: what could not be read: loops without a known count, kernels whose FLOPs are not known.
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
    items, unknown_loops = executed(module)
    unknown_calls: Counter[str] = Counter()
    work: list[Work] = []
    collectives: dict[tuple[str, str, str, int], Collective] = {}
    for item in items:
        found = _collectives(module, item, devices)
        for key, collective in found.items():
            collectives.setdefault(key, collective)  # the first part says how it began
        products = _products(module, item)
        for instruction, computation in _calls(module, item):
            called = _called_products(instruction, computation)
            if not called:
                unknown_calls[f"{instruction.target} ({kernel_name(instruction)})"] += item.times
            products += called
        n_bytes = 0 if found else memory_bytes(module, item)
        if products or n_bytes:
            asynchronous = item.instruction.opcode.endswith("-start")
            work.append(Work(products, n_bytes, asynchronous, item.times, item.instruction))
    uncounted = [f"loop {name}: counted once" for name in unknown_loops]
    uncounted += [f"kernel {name}, {times} a step: its FLOPs are not known" for name, times in unknown_calls.items()]
    return Cost(work, list(collectives.values()), uncounted)


# --- products -----------------------------------------------------------------------------------------------------


def _products(module: Module, item: Executed) -> list[Product]:
    candidates = [(item.instruction, item.computation), *module.inside(item.instruction)]
    return [
        Product(_flops(instruction, computation), _precision(instruction, computation))
        for instruction, computation in candidates
        if instruction.opcode in PRODUCTS
    ]


def _calls(module: Module, item: Executed) -> list[tuple[Instruction, Computation]]:
    """What an instruction calls that is no HLO: kernels and functions of libraries."""
    candidates = [(item.instruction, item.computation), *module.inside(item.instruction)]
    return [found for found in candidates if found[0].opcode == "custom-call" and found[0].target not in MARKERS]


def _called_products(instruction: Instruction, computation: Computation) -> list[Product]:
    if instruction.target in (CUBLAS, CUBLAS_GEMM):
        return [Product(_flops(instruction, computation), _precision(instruction, computation))]
    if instruction.target in CUDNN_PRODUCTS:
        return _cudnn_products(instruction, computation)
    if found := re.fullmatch(integer_attention.NAME.format(r"(\d)"), kernel_name(instruction)):
        return _integer_attention_products(instruction, computation, int(found[1]))
    return _kernel_products(instruction, computation) if instruction.target == "tpu_custom_call" else []


def kernel_name(instruction: Instruction) -> str:
    """What a kernel of Pallas is called: Triton's configuration says it, else the instruction."""
    stated = re.search(r'\bname = "(\w+)"', instruction.attributes) if instruction.target == TRITON else None
    return stated[1] if stated else instruction.name.rstrip(".0123456789")


def _integer_attention_products(instruction: Instruction, computation: Computation, count: int) -> list[Product]:
    """By the shape of the queries [.., T, D]; blocks above the diagonal are not computed."""
    *heads, time, head_size = computation.by_name[instruction.operands[0]].result[0].dims
    blocks = time // (integer_attention.GPU_BLOCK if instruction.target == TRITON else LANES)
    flops = 2.0 * math.prod(heads) * time**2 * head_size * (blocks + 1) / (2 * blocks)
    return [Product(flops, "int8")] * count


def _cudnn_products(instruction: Instruction, computation: Computation) -> list[Product]:
    """By the shape of the scores, [B, H, T, T], of which causality leaves what lies on or below the diagonal."""
    stated = re.search(r'"intermediate_tensor_shape":\s*\{[^\]]*"dimensions":\s*\[([^\]]*)\]', instruction.attributes)
    if stated is None:
        return []
    scores = integers(stated[1])
    head_size = computation.by_name[instruction.operands[0]].result[0].dims[-1]
    is_causal = re.search(r'"mask_type":\s*"CAUSAL"', instruction.attributes) is not None
    part = (scores[-1] + 1) / (2 * scores[-1]) if is_causal else 1.0
    flops = 2.0 * math.prod(scores) * head_size * part
    return [Product(flops, "bfloat16")] * CUDNN_PRODUCTS[instruction.target or ""]


def _precision(instruction: Instruction, computation: Computation) -> Precision:
    dtypes = {computation.by_name[name].result[0].dtype for name in instruction.operands[:2]}
    if dtypes <= {"s8", "u8"}:
        return "int8"
    return "float32" if dtypes == {"f32"} else "bfloat16"


def _flops(instruction: Instruction, computation: Computation) -> float:
    left, right = (computation.by_name[name].result[0].dims for name in instruction.operands[:2])
    result = instruction.result[0].dims
    if instruction.opcode != "convolution":
        # Of a dot, {1}; of cuBLASLt's call, ["1"] in its configuration.
        dims = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\s*\[)([^}\]]*)', instruction.attributes)
        return 2.0 * math.prod(result) * math.prod(left[dim] for dim in integers(dims[1] if dims else ""))
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


def _kernel_products(instruction: Instruction, computation: Computation) -> list[Product]:
    """What a kernel multiplies: as its cost estimate states it, or, of attention (which states none), by its shapes."""
    stated = re.search(r'\\?"flops\\?":\s*\\?"?(\d+)', instruction.attributes)
    if stated:
        return [Product(float(stated[1]), "bfloat16")]
    products = next((count for name, count in SPLASH_PRODUCTS.items() if instruction.name.startswith(name)), 0)
    if not products:
        return []
    operands = [computation.by_name[name].result[0] for name in instruction.operands]
    # The queries, [batch, heads, time, head size]; with one sequence a device the compiler drops the first.
    *heads, time, head_size = next(array.dims for array in operands if array.dtype in ("bf16", "f32"))
    blocks = operands[0].dims[-1]  # of the mask, [.., n, n]: above its diagonal they are not computed
    flops = 2.0 * math.prod(heads) * time**2 * head_size * (blocks + 1) / (2 * blocks)
    return [Product(flops, "bfloat16")] * products


# --- collectives --------------------------------------------------------------------------------------------------


def _collectives(module: Module, item: Executed, devices: int) -> dict[tuple[str, str, str, int], Collective]:
    """Collectives that an instruction is, or that are fused into it.

    The key is the computation and the name; of one that is fused, the channel, type and size: its parts can be spread
    over several fusions (started, fused with a product, finished), which have these in common, so that it counts once.
    The channel alone says little: sums that a program asks for by name (`lax.psum`) all have the same.
    """
    found = {}
    for instruction, computation in [(item.instruction, item.computation), *module.inside(item.instruction)]:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        is_fused = instruction is not item.instruction
        key = (is_fused and instruction.attribute("channel_id")) or instruction.name
        groups = _groups(instruction, devices)
        operands = [array for name in instruction.operands for array in computation.by_name[name].result]
        n_bytes = sum(array.n_bytes for array in operands) * (len(groups[0]) if kind == "all-gather" else 1)
        fused = item.instruction.called("calls") or ""
        if kind == "all-reduce" and "all-reduce-scatter" in fused:
            kind = "reduce-scatter"  # the TPU compiler's name of an all-reduce fused with the slice that is kept
        # Started apart from its end: as an instruction of its own, or inside a fusion, which then holds a marker.
        overlapped = "-start" in instruction.opcode + item.instruction.opcode or "async" in fused
        if re.search(r'"is_sync":\s*true', instruction.attributes):
            overlapped = False  # on a GPU: nothing runs between its start and its end
        overlapped = overlapped or any(
            "AsyncCollective" in inner.attributes for inner, _ in module.inside(item.instruction)
        )
        dtype = max(operands, key=lambda array: array.n_bytes).dtype
        name = re.search(r'op_name="([^"]*)"', item.instruction.attributes + instruction.attributes)
        source = name[1] if name else ""
        place = item.computation.name, key, dtype, n_bytes
        found[place] = Collective(kind, n_bytes, dtype, groups, overlapped, item.times, source)
    return found


def _groups(instruction: Instruction, devices: int) -> list[list[int]]:
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes)
    if pairs:
        return [[int(number) for number in pair] for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
    return replica_groups(instruction.attributes, devices)
