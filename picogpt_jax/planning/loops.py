"""How often each instruction of a compiled program runs in a step.

A loop's body is printed once. XLA's own cost analysis counts it once, too; here every instruction is counted as often
as the loops around it run.
"""

import dataclasses
import re
from collections.abc import Iterator

from picogpt_jax.planning.hlo import Computation, Instruction, Module

COPIES = ("copy", "bitcast", "copy-start", "copy-done")

_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction that the schedule runs `times` times in a step, and the computation it stands in."""

    instruction: Instruction
    computation: Computation
    times: int


def executed(module: Module) -> tuple[list[Executed], list[str]]:
    """What runs, loops unfolded into counts; and the loops whose count could not be read, taken to run once."""
    unknown: list[str] = []
    return list(_walk(module, module.entry, 1, unknown)), unknown


def _walk(module: Module, computation: Computation, times: int, unknown: list[str]) -> Iterator[Executed]:
    for instruction in computation.instructions:
        if instruction.opcode == "while":
            count = trip_count(module, instruction, computation)
            if count is None:
                unknown.append(instruction.name)
            turns = times * (1 if count is None else count)
            yield from _walk(module, module.called(instruction, "body"), turns, unknown)
        elif instruction.opcode == "call":
            yield from _walk(module, module.called(instruction, "to_apply"), times, unknown)
        elif instruction.opcode == "conditional":
            for name in _branches(instruction):  # which one is taken is not known: all of them count
                yield from _walk(module, module.computations[name], times, unknown)
        else:
            yield Executed(instruction, computation, times)


def _branches(instruction: Instruction) -> list[str]:
    names = [instruction.called(kind) for kind in ("true_computation", "false_computation")]
    found = _BRANCHES.search(instruction.attributes)
    return [name for name in names if name] + (re.findall(r"%([\w.\-]+)", found[1]) if found else [])


def trip_count(module: Module, loop: Instruction, around: Computation) -> int | None:
    """How often the body of a counted loop runs: as the compiler notes it, else from `counter < bound`.

    The counter need not grow by ones: the compiler unrolls the rings in which products and transfers alternate, and
    one turn then does the work of two. None where the count cannot be read.
    """
    noted = re.search(r'known_trip_count"?[:=]\s*\{\s*"?n"?[:=]\s*"?(\d+)', loop.attributes)
    if noted:
        return int(noted[1])
    condition = _Scope(module, module.called(loop, "condition"))
    compare, scope = condition.find(condition.computation.root.name)
    if compare.opcode != "compare" or compare.attribute("direction") != "LT":
        return None
    counter, bound = (_start_and_step(scope.find(name), loop, _Scope(module, around)) for name in compare.operands)
    if counter is None or bound is None or counter[1] <= 0 or bound[1] != 0:
        return None
    return len(range(counter[0], bound[0], counter[1]))


@dataclasses.dataclass(frozen=True)
class _Scope:
    """Names of a computation; of a fused one, also what stands for its parameters: names in the scope around it."""

    module: Module
    computation: Computation
    arguments: tuple[str, ...] = ()
    around: "_Scope | None" = None

    def find(self, name: str) -> "_Value":
        """The instruction that computes a value, behind copies, fusions and tuples on the way to it."""
        instruction = self.computation.by_name[name]
        if instruction.opcode in COPIES:
            return self.find(instruction.operands[0])
        if instruction.opcode == "parameter" and self.around is not None:
            return self.around.find(self.arguments[int(instruction.arguments)])
        if instruction.opcode == "fusion":
            inner = self.module.called(instruction)
            return _Scope(self.module, inner, instruction.operands, self).find(inner.root.name)
        if instruction.opcode == "get-tuple-element":
            whole, scope = self.find(instruction.operands[0])
            if whole.opcode == "tuple":
                return scope.find(whole.operands[_index(instruction)])
        return instruction, self


_Value = tuple[Instruction, _Scope]


def _start_and_step(value: _Value, loop: Instruction, around: _Scope) -> tuple[int, int] | None:
    """Of an integer in a loop's condition: what it is before the first turn, and what each turn adds to it."""
    constant = _constant(value)
    if constant is not None:
        return constant, 0
    if not _is_state(value):
        return None
    index = _index(value[0])
    start = _constant(_element(around.find(loop.operands[0]), index))
    step = _step(_Scope(around.module, around.module.called(loop, "body")), index)
    return None if start is None or step is None else (start, step)


def _step(body: _Scope, index: int) -> int | None:
    """What a turn adds to an element of the loop's state: a constant; 0 where it is handed on unchanged."""
    after = _element(body.find(body.computation.root.name), index)
    if after is None:
        return None
    if _is_state(after, index):
        return 0
    instruction, scope = after
    terms = [scope.find(name) for name in instruction.operands] if instruction.opcode == "add" else []
    if not any(_is_state(term, index) for term in terms):
        return None
    return next((number for term in terms if (number := _constant(term)) is not None), None)


def _element(value: _Value, index: int) -> "_Value | None":
    whole, scope = value
    return scope.find(whole.operands[index]) if whole.opcode == "tuple" else None


def _is_state(value: _Value, index: int | None = None) -> bool:
    """Whether this is an element (the one at `index`) of what a loop carries, its body's or condition's parameter."""
    instruction, scope = value
    if instruction.opcode != "get-tuple-element" or index not in (None, _index(instruction)):
        return False
    return scope.around is None and scope.computation.by_name[instruction.operands[0]].opcode == "parameter"


def _index(element: Instruction) -> int:
    return int(element.attribute("index") or 0)


def _constant(value: _Value | None) -> int | None:
    if value is None or value[0].opcode != "constant" or not re.fullmatch(r"-?\d+", value[0].arguments):
        return None
    return int(value[0].arguments)
