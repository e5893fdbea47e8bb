"""How often each instruction of a compiled program runs in a step.

XLA's own cost analysis counts a loop's body once; here an instruction counts as often as the loops around it run.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from picogpt_jax.planning.hlo import Computation, Instruction, Module

COPIES = ("copy", "bitcast", "copy-start", "copy-done")
MOST_TURNS = 1 << 16  # of a loop that is followed turn by turn

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
    """How often the body of a loop runs: as the compiler notes it, else by following its counter turn by turn.

    The compiler unrolls the rings in which products and transfers alternate, and notes no count there. None where
    the counter or its bound follows from anything but constants, `add` and `LT`, or the loop would not end.
    """
    noted = re.search(r'known_trip_count"?[:=]\s*\{\s*"?n"?[:=]\s*"?(\d+)', loop.attributes)
    if noted:
        return int(noted[1])
    condition, body = (module.called(loop, kind) for kind in ("condition", "body"))
    state = _value(module, around, loop.operands[0], None)
    for turn in range(MOST_TURNS):
        goes_on = _value(module, condition, condition.root.name, [state])
        if not goes_on:
            return None if goes_on is None else turn
        before, state = state, _value(module, body, body.root.name, [state])
        if state == before:
            return None
    return None


def _value(module: Module, computation: Computation, name: str, arguments: Sequence[Any] | None) -> Any:
    """What an instruction computes: a number, a bool or a tuple of values; None for what is not followed.

    Args:
        arguments: the values of the computation's parameters; None: they are not known.
    """
    instruction = computation.by_name[name]
    opcode = instruction.opcode
    if opcode == "parameter":
        return arguments[int(instruction.arguments)] if arguments else None
    if opcode == "constant":
        return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None
    if opcode not in ("tuple", "get-tuple-element", "fusion", "add", "compare", *COPIES):
        return None
    if opcode != "tuple" and instruction.result[0].dims:
        return None  # an array
    operands = [_value(module, computation, operand, arguments) for operand in instruction.operands]
    if opcode == "tuple":
        return operands
    if opcode in COPIES:
        return operands[0]
    if opcode == "get-tuple-element":
        return operands[0][int(instruction.attribute("index") or 0)] if operands[0] else None
    if opcode == "fusion":
        inner = module.called(instruction)
        return _value(module, inner, inner.root.name, operands)
    if None in operands:
        return None
    if opcode == "add":
        return sum(operands)
    return operands[0] < operands[1] if instruction.attribute("direction") == "LT" else None
