"""The traffic of a compiled program's instructions with main memory; what the compiler keeps on the chip is free."""

from picogpt_jax.planning.hlo import Computation, HloArray, Instruction, Module
from picogpt_jax.planning.loops import Executed

# These move no bytes of main memory: names for parts of buffers, constants, the ends of what was started before.
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
FREE |= {"opt-barrier", "add-dependency", "domain", "get-dimension-size", "send", "recv"}
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # they change parts of an array: which operand holds these
# The TPU compiler's markers: custom calls that call nothing.
MARKERS = {"AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "AssumeGatherIndicesInBound"}
MARKERS |= {"GatherScatterIndicesBitpacked", "ConcatBitcast"}
CUBLAS, CUDNN_FORWARD, CUDNN_BACKWARD = "__cublas$lt$matmul", "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
CUBLAS_GEMM = "__cublas$gemm"  # cuBLAS's older function, which the autotuner may take on a real GPU
TRITON = "__gpu$xla.gpu.triton"  # a kernel of Pallas for GPUs; for TPUs it is a `tpu_custom_call`
# The last array of their results is scratch, of unknown traffic.
WITH_WORKSPACE = {CUBLAS, CUBLAS_GEMM, CUDNN_FORWARD, CUDNN_BACKWARD}


def memory_bytes(module: Module, item: Executed) -> int:
    """Bytes of main memory that a scheduled instruction reads and writes."""
    instruction, computation = item.instruction, item.computation
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith(("-done", "-update")):
        return 0
    if instruction.target in MARKERS:
        return 0
    arrays = {name: computation.by_name[name].result for name in instruction.operands}
    if opcode.endswith("-start"):  # to or from on-chip memory; the result is (to, from, ...), or ((from), to, ...)
        target = instruction.result[0 if opcode == "copy-start" else len(instruction.operands)]
        source = arrays[instruction.operands[0]][0]
        return target.n_bytes * ((target.memory_space == 0) + (source.memory_space == 0))
    if opcode in ("dynamic-slice", "slice", "gather"):
        return _main(instruction.result) + _main(instruction.result)
    if opcode in IN_PLACE:
        return 2 * _main(arrays[instruction.operands[IN_PLACE[opcode]]])
    if opcode == "fusion" and instruction.called("calls"):
        inner = module.called(instruction)
        read = 0
        for parameter, name in zip(inner.parameters, instruction.operands, strict=True):
            if _main(arrays[name]):
                read += _bytes_read(module, inner, parameter)
        return read + _bytes_written(module, inner, instruction.result)
    result = instruction.result
    if instruction.target in WITH_WORKSPACE:
        result = result[:-1]
    return sum(map(_main, arrays.values())) + _main(result)


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
        elif user.opcode == "scatter" and user.operands[0] == value.name:  # what is added to is read
            total += sum(array.n_bytes for array in computation.by_name[user.operands[2]].result)
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
    if output.opcode in IN_PLACE:
        changed = [computation.by_name[output.operands[IN_PLACE[output.opcode]]].result, output.result]
        return min(sum(array.n_bytes for array in arrays) for arrays in changed)
    if output.opcode == "fusion" and output.called("calls") and len(output.result) == 1:
        inner = module.called(output)
        return _written(module, inner, inner.root)
    return sum(array.n_bytes for array in output.result)
