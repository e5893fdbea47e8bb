"""Reads the text of a compiled program (XLA's optimized HLO): its computations and their instructions."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64}
BITS |= {"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class HloArray:
    """One array of an instruction's result; `memory_space` 0 is the device's main memory, others lie on the chip."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int = 0

    @property
    def n_bytes(self) -> int:
        bits = BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0)  # tokens and opaque values have none
        return (math.prod(self.dims) * bits + 7) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`%name = result opcode(%operands), attributes`; `arguments` is the text between the parentheses."""

    name: str
    result: tuple[HloArray, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def target(self) -> str | None:
        """Of a custom call: the name of what it calls, such as a Pallas kernel or a function of a library."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes) if self.opcode == "custom-call" else None
        return found and found[1]

    def called(self, kind: str) -> str | None:
        """The computation named by the attribute `kind`, such as calls= or body=."""
        return next((name for found, name in _CALLED.findall(self.attributes) if found == kind), None)

    def attribute(self, name: str) -> str | None:
        """The value of `name=value`, up to a comma or space; in braces, all of it."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found and found[1]


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {name: [] for name in self.by_name}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        numbered = [item for item in self.instructions if item.opcode == "parameter"]
        return sorted(numbered, key=lambda item: int(item.arguments))

    @property
    def root(self) -> Instruction:
        return next(item for item in reversed(self.instructions) if item.is_root or item is self.instructions[-1])


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: Computation

    def called(self, instruction: Instruction, kind: str = "calls") -> Computation:
        name = instruction.called(kind)
        assert name is not None, f"{instruction.name} names no {kind}="
        return self.computations[name]

    def inside(self, instruction: Instruction) -> Iterator[tuple[Instruction, Computation]]:
        """The instructions fused or wrapped into this one, at every depth, each with its computation."""
        if instruction.opcode in ("fusion", "async-start") and instruction.called("calls"):
            computation = self.called(instruction)
            for inner in computation.instructions:
                yield inner, computation
                yield from self.inside(inner)


def parse_module(text: str) -> Module:
    """Parses `compiled.as_text()`.

    Raises:
        ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry: str | None = None
    name, lines = "", list[str]()
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{\s*$", line)
        if header:
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, tuple(filter(None, map(_parse_instruction, lines))))
        else:
            lines.append(line)
    if entry is None:
        raise ValueError("the text has no ENTRY computation: it is not a compiled HLO module")
    return Module(computations, computations[entry])


def _parse_instruction(line: str) -> Instruction | None:
    found = re.match(r"\s*(ROOT )?%([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    result, rest = _parentheses(rest) if rest.startswith("(") else rest.partition(" ")[::2]
    opcode, _, rest = rest.strip().partition("(")
    arguments, attributes = _parentheses("(" + rest)
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(found[2], parse_arrays(result), opcode, operands, arguments[1:-1], attributes, bool(found[1]))


def parse_arrays(text: str) -> tuple[HloArray, ...]:
    """The arrays of a result type such as `(f32[2,3]{1,0:T(8,128)S(1)}, s8[4])`, nested tuples flattened."""
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        arrays.append(HloArray(dtype, sizes, int(space[1]) if space else 0))
    return tuple(arrays)


def _parentheses(text: str) -> tuple[str, str]:
    """Splits after the parenthesis that closes the first one."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: position + 1], text[position + 1 :]
    return text, ""


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of devices that a collective works in, in any of HLO's three notations.

    `{{0,1},{2,3}}`; `[2,2]<=[2,2]T(1,0)`, an iota reshaped, transposed and reshaped again; and a mesh with the axes
    that a group spans, `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}`. Without groups all devices are one.
    """
    listed = re.search(r"replica_groups=\{(\{[\d,{}\s]*\})\}", attributes)
    if listed:
        return [
            [int(number) for number in re.findall(r"\d+", group)] for group in re.findall(r"\{([\d,\s]*)\}", listed[1])
        ]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _iota(iota[2]).reshape(integers(iota[1])).tolist()
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{([^}]*)\}", attributes
    )
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        order = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(sizes.values()))
        return _axis_groups(order.reshape(-1), sizes, mesh[3])
    return [list(range(devices))]


def _axis_groups(order: np.ndarray, sizes: dict[str, int], axes: str) -> list[list[int]]:
    """Groups along `axes`, such as `'a','b':(2)4`: axis b is split into three parts, the middle one of size 4."""
    shape: list[int] = []
    spanned: list[int] = []
    parts = {name: (pre, size) for name, pre, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)}
    for name, size in sizes.items():
        if name in parts and parts[name][1]:
            before, part = (int(number) for number in parts[name])
            spanned.append(len(shape) + 1)
            shape += [before, part, size // (before * part)]
        else:
            spanned += [len(shape)] if name in parts else []
            shape.append(size)
    others = [dim for dim in range(len(shape)) if dim not in spanned]
    return (
        order.reshape(shape).transpose(*others, *spanned).reshape(-1, math.prod(shape[dim] for dim in spanned)).tolist()
    )


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: 0, 1, 2, ... as an array of that shape, transposed."""
    shape, _, permutation = text.partition("T")
    numbers = np.arange(math.prod(integers(shape))).reshape(integers(shape))
    return numbers.transpose(integers(permutation)) if permutation else numbers


def integers(text: str) -> list[int]:
    """The numbers of a list such as `2,4`, `[2,4]` or `"2", "4"`."""
    return [int(number) for number in re.findall(r"\d+", text)]
