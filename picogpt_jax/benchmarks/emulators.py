"""Where a program of another processor runs: unicorn emulates processors, wasmtime runs WebAssembly.

The programs are `target.c` with a model. A machine reads and writes their arrays by name, runs them, and counts.
"""

import collections
import ctypes
import dataclasses
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

try:
    import unicorn
    import wasmtime
except ImportError as error:
    raise ImportError(
        "this needs unicorn and wasmtime; install them with: pip install 'picogpt_jax[targets]'"
    ) from error

STACK_BYTES, PAINT = 1 << 16, b"\xa5"
CONSTANT = (".text", ".rodata", ".data.rel.ro")  # sections that flash holds
FUEL = 1 << 62  # more than any program burns


@dataclasses.dataclass(frozen=True)
class Processor:
    """What unicorn emulates.

    Attributes:
        architecture, mode, model: unicorn's constants; model None: its choice.
        stack: the register that is the stack pointer.
        length: the first bytes of an instruction -> its length in bytes; None: not easily told.
    """

    architecture: int
    mode: int
    model: int | None
    stack: int
    length: Callable[[bytes], int] | None = lambda _: 4


class Machine(ABC):
    """A program that is loaded.

    Attributes:
        compiled, linked: the options that such a program is compiled and linked with.
    """

    compiled: ClassVar[tuple[str, ...]] = ()
    linked: ClassVar[tuple[str, ...]]

    @abstractmethod
    def write(self, name: str, values: Sequence[int]) -> None:
        """Puts numbers into an array of int32."""

    @abstractmethod
    def read(self, name: str, count: int) -> list[int]:
        """The first numbers of an array of int32."""

    @abstractmethod
    def run(self) -> None:
        """Runs the program's function `run`."""

    def count(self) -> int | None:
        """The same; returns the instructions that it took, where they can be counted."""
        self.run()
        return None

    def sizes(self) -> dict[str, int]:
        """Bytes of the code with all constants, and of the stack that was used so far, where they can be told."""
        return {}


class Native(Machine):
    """A library of this process."""

    compiled, linked = ("-fPIC",), ("-shared",)

    def __init__(self, program: Path) -> None:
        self._library = ctypes.CDLL(str(program))

    def _array(self, name: str, count: int) -> Any:
        return (ctypes.c_int32 * count).in_dll(self._library, name)

    def write(self, name: str, values: Sequence[int]) -> None:
        self._array(name, len(values))[:] = values

    def read(self, name: str, count: int) -> list[int]:
        return list(self._array(name, count))

    def run(self) -> None:
        self._library.run()


class Wasm(Machine):
    """A module in wasmtime. Of the stack only the part in memory is seen: values without an address are not there."""

    linked = (
        *("-Wl,--no-entry", f"-Wl,-z,stack-size={STACK_BYTES}"),
        *(f"-Wl,--export={name}" for name in ("run", "request", "answer", "text", "__stack_pointer")),
    )

    def __init__(self, program: Path) -> None:
        config = wasmtime.Config()
        config.consume_fuel = True
        self._content, engine = program.read_bytes(), wasmtime.Engine(config)
        self._store: Any = wasmtime.Store(engine)
        instance = wasmtime.Instance(self._store, wasmtime.Module(engine, self._content), [])
        self._exports: Any = instance.exports(self._store)
        self._memory: Any = self._exports["memory"]
        self._stack = self._address("__stack_pointer") - STACK_BYTES
        self._memory.write(self._store, PAINT * STACK_BYTES, self._stack)  # type: ignore[union-attr]

    def _address(self, name: str) -> int:
        return int(self._exports[name].value(self._store))

    def write(self, name: str, values: Sequence[int]) -> None:
        self._memory.write(self._store, struct.pack(f"<{len(values)}i", *values), self._address(name))

    def read(self, name: str, count: int) -> list[int]:
        first = self._address(name)
        return list(struct.unpack(f"<{count}i", self._memory.read(self._store, first, first + 4 * count)))

    def run(self) -> None:
        self.count()

    def count(self) -> int:
        self._store.set_fuel(FUEL)  # a unit an instruction, none for the marks of blocks
        self._exports["run"](self._store)
        return FUEL - int(self._store.get_fuel())

    def sizes(self) -> dict[str, int]:
        sections, at = {}, 8
        while at < len(self._content):
            kind, size, shift, byte = self._content[at], 0, 0, 128
            while byte >= 128:  # LEB128
                at += 1
                byte = self._content[at]
                size |= (byte & 127) << shift
                shift += 7
            at += 1 + size
            sections[kind] = size
        stack = self._memory.read(self._store, self._stack, self._stack + STACK_BYTES)
        return {"flash_bytes": sections[10] + sections[11], "stack_bytes": len(stack.lstrip(PAINT))}  # code, data


class Emulated(Machine):
    """A program that a processor of unicorn starts with, without anything around it."""

    compiled, linked = ("-fno-pic", "-DBARE"), ("-static", "-Wl,-e,_start")

    def __init__(self, program: Path, processor: Processor) -> None:
        self._elf, self._processor = Elf(program.read_bytes()), processor
        first = min(at for at, _, _ in self._elf.segments) & -4096
        self._stack = (max(at + size for at, size, _ in self._elf.segments) + 4095) & -4096
        self._unicorn: Any = unicorn.Uc(processor.architecture, processor.mode)  # type: ignore[attr-defined]
        if processor.model is not None:
            self._unicorn.ctl_set_cpu_model(processor.model)
        self._unicorn.mem_map(first, self._stack + STACK_BYTES - first)
        for at, _, content in self._elf.segments:
            self._unicorn.mem_write(at, content)
        self._unicorn.mem_write(self._stack, PAINT * STACK_BYTES)

    def _address(self, name: str) -> int:
        return self._elf.symbols[name][0]

    def write(self, name: str, values: Sequence[int]) -> None:
        self._unicorn.mem_write(self._address(name), struct.pack(f"{self._elf.order}{len(values)}i", *values))

    def read(self, name: str, count: int) -> list[int]:
        found = self._unicorn.mem_read(self._address(name), 4 * count)
        return list(struct.unpack(f"{self._elf.order}{count}i", found))

    def run(self) -> None:
        self._unicorn.reg_write(self._processor.stack, self._stack + STACK_BYTES - 64)
        self._unicorn.emu_start(self._address("_start"), self._address("stop") & -2)  # -2: Thumb's are odd

    def count(self) -> int:
        """The same. Of a block all are counted, also what a condition (Thumb's IT) skips."""
        seen: collections.Counter[tuple[int, int]] = collections.Counter()

        def see(_: object, address: int, size: int, __: object) -> None:
            seen[address, size] += 1

        length = self._processor.length
        hook = self._unicorn.hook_add(unicorn.UC_HOOK_BLOCK if length else unicorn.UC_HOOK_CODE, see)
        self._unicorn.ctl_flush_tb()  # what was translated before does not call it
        self.run()
        self._unicorn.hook_del(hook)
        self._unicorn.ctl_flush_tb()
        return sum(times * (self._instructions(length, *block) if length else 1) for block, times in seen.items())

    def _instructions(self, length: Callable[[bytes], int], address: int, size: int) -> int:
        code, at, found = bytes(self._unicorn.mem_read(address, size)), 0, 0
        while at < size:
            at += length(code[at:])
            found += 1
        return found

    def sizes(self) -> dict[str, int]:
        flash = sum(size for name, size in self._elf.sections.items() if name.startswith(CONSTANT))
        stack = bytes(self._unicorn.mem_read(self._stack, STACK_BYTES - 64))
        return {"flash_bytes": flash, "stack_bytes": len(stack.lstrip(PAINT))}


class Elf:
    """An ELF file of 32 bits: an object, or a program.

    Attributes:
        order: of bytes, as `struct` has it.
        segments: (address, length, content), from which a program is loaded.
        sections: name -> size, of those in memory.
        symbols: name -> (address, whether it is defined).
    """

    def __init__(self, content: bytes) -> None:
        self._content, self.order = content, "<" if content[5] == 1 else ">"
        program, table = self._unpack("II", 28)
        size, count, section_size, section_count, names = self._unpack("5H", 42)
        segments = [self._unpack("6I", program + i * size) for i in range(count)]
        self.segments = [
            (at, length, content[first : first + stored])
            for kind, first, at, _, stored, length in segments
            if kind == 1
        ]
        sections = [self._unpack("7I", table + i * section_size) for i in range(section_count)]
        first_name = sections[names][4]
        self.sections = {self._name(first_name + name): size for name, _, flags, _, _, size, _ in sections if flags & 2}
        self.symbols = {}
        for _, kind, _, _, first, size, strings in sections:
            for at in range(first, first + size, 16) if kind == 2 else ():
                name, value, _, _, section = self._unpack("IIIHH", at)
                self.symbols[self._name(sections[strings][4] + name)] = (value, section != 0)
        self.symbols.pop("", None)

    def _unpack(self, form: str, at: int) -> tuple[int, ...]:
        return struct.unpack_from(self.order + form, self._content, at)

    def _name(self, at: int) -> str:
        return self._content[at : self._content.index(0, at)].decode()
