"""Which kernels compute the products of a program for an NVIDIA GPU, and whether on its tensor cores.

XLA takes a kernel of Triton's or of a library's for each product, on a real GPU the one that its autotuner measured to
be the fastest. The compiled program names it. What Triton generates can be read as well: the PTX code that the compiler
writes out (`xla_dump_to`). The code of a library cannot, so of its kernels only a trace shows the names.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from picogpt_jax.planning.cost import Precision, cost_of, kernel_name
from picogpt_jax.planning.hlo import Instruction, Module
from picogpt_jax.planning.memory import CUBLAS, CUBLAS_GEMM, CUDNN_BACKWARD, CUDNN_FORWARD, TRITON

LIBRARIES = {CUBLAS: "cuBLASLt", CUBLAS_GEMM: "cuBLAS", CUDNN_FORWARD: "cuDNN", CUDNN_BACKWARD: "cuDNN"}
LIBRARIES |= {TRITON: "Triton"}  # a kernel that was written for it
FUSIONS = {"__triton": "Triton", "__cudnn": "cuDNN", "__custom_fusion": "CUTLASS"}  # how a fusion's kind begins
LOOP = "loop"  # of XLA's own, one multiplication after another
# A tensor core's instruction in PTX, up to Ampere, on Hopper and on Blackwell; the types are part of its name.
_TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*")
_INT8 = re.compile(r"\.[su]8\.[su]8|kind::i8")


@dataclasses.dataclass(frozen=True)
class ProductKernels:
    """Products of one type, by kernels of one origin.

    Attributes:
        origin: Triton, cuBLASLt, cuBLAS, cuDNN, CUTLASS, or a loop of XLA's own.
        tensor_cores: whether the code has their instructions for this type; None: there is no code to read, as of a
            library, or of a kernel that is another one's twin and shares its code.
        count: products a step.
        flops: a step, of one device.
    """

    precision: Precision
    origin: str
    tensor_cores: bool | None
    count: int
    flops: float


def product_kernels(module: Module, code: Mapping[str, str]) -> list[ProductKernels]:
    """The kernels of all products of a compiled module, the most FLOPs first.

    Args:
        code: kernel -> its PTX, see `read_ptx`.
    """
    sums: dict[tuple[Precision, str, bool | None], tuple[int, float]] = {}
    for work in cost_of(module, 1).work:
        for product in work.products:
            origin = _origin(work.instruction)
            on_tensor_cores = _on_tensor_cores(work.instruction, product.precision, origin, code)
            key = (product.precision, origin, on_tensor_cores)
            count, flops = sums.get(key, (0, 0.0))
            sums[key] = (count + work.times, flops + product.flops * work.times)
    return sorted((ProductKernels(*key, *value) for key, value in sums.items()), key=lambda row: -row.flops)


def _origin(instruction: Instruction) -> str:
    if instruction.target is not None:
        return LIBRARIES.get(instruction.target, instruction.target)
    kind = re.search(r'"kind":\s*"(\w+)"', instruction.attributes)
    return next((name for begin, name in FUSIONS.items() if kind and kind[1].startswith(begin)), LOOP)


def _on_tensor_cores(
    instruction: Instruction, precision: Precision, origin: str, code: Mapping[str, str]
) -> bool | None:
    if origin == LOOP:
        return False
    name = kernel_name(instruction) if instruction.target == TRITON else re.sub(r"\W", "_", instruction.name)
    ptx = code.get(name) if origin == "Triton" else None
    if ptx is None:
        return None
    return any(precision != "int8" or _INT8.search(name) for name in _TENSOR_CORE.findall(ptx))


def read_ptx(folder: Path) -> dict[str, str]:
    """The PTX code of each kernel in what `xla_dump_to` has written."""
    code: dict[str, str] = {}
    for path in folder.glob("*.ptx"):
        _, *parts = re.split(r"\.entry (\w+)", path.read_text(encoding="utf-8", errors="replace"))
        code |= dict(zip(parts[::2], parts[1::2], strict=True))
    return code
