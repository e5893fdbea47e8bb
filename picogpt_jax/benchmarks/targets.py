"""The C model on other processors: `picogpt.c` compiled without a library, its results compared with NumPy's.

Everything comes from PyPI (extra: targets); ziglang compiles for any processor. Bytes and instructions are counts, no
timings: they are the same on every machine.
"""

import dataclasses
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from picogpt_jax.benchmarks.emulators import Elf, Emulated, Machine, Native, Processor, Wasm
from picogpt_jax.benchmarks.report import Figures, make_report
from picogpt_jax.errors import UserError, reason
from picogpt_jax.formats.c_export import LARGEST_HEADER, logits_digest, save_c
from picogpt_jax.int8.integer_model import IntegerModel, integer_config_to_json
from picogpt_jax.runtimes import draws, loop
from picogpt_jax.runtimes.c_weights import SOURCES, arrays
from picogpt_jax.runtimes.numpy_integer import NumpyIntegerGPT

try:
    import unicorn
    import wasmtime
    import ziglang  # noqa: F401
    from unicorn import arm_const, mips_const, ppc_const, riscv_const, x86_const
except ImportError as error:
    raise ImportError("this needs ziglang; install it with: pip install 'picogpt_jax[targets]'") from error

TEXT_TOKENS = 40
DIGEST, TEXT, TOKEN = range(3)  # what target.c is asked
SAMPLINGS = ((0.0, 0, 0), (0.8, 5, 1337))  # temperature, top_k, seed
PICOGPT_C, TARGET_C = SOURCES / "picogpt.c", Path(__file__).with_name("target.c")
ZIG = (sys.executable, "-m", "ziglang", "cc")
OPTIONS = ("-std=c99", "-ffreestanding", "-fno-unwind-tables", "-fno-asynchronous-unwind-tables", "-ffunction-sections")
# What a compiler may call: products and divisions of 32 bits, products and shifts of 64. No 64-bit division, no float.
HELPERS = {
    *("memcpy", "memset", "__aeabi_memcpy", "__aeabi_memcpy4", "__aeabi_memset", "__aeabi_memclr", "__aeabi_memclr4"),
    *("__aeabi_idiv", "__aeabi_idivmod", "__aeabi_uidiv", "__aeabi_uidivmod", "__aeabi_lmul", "__aeabi_llsl"),
    *("__aeabi_llsr", "__mulsi3", "__muldi3", "__divsi3", "__modsi3", "__udivsi3", "__umodsi3", "__ashldi3"),
    "__lshrdi3",
}
FLOATS = re.compile(r"\b(?:half|bfloat|float|double|fp128|x86_fp80|ppc_fp128)\b")  # LLVM's types
IN_WASM_OBJECTS = {"__linear_memory", "__stack_pointer", "__indirect_function_table"}


@dataclasses.dataclass(frozen=True)
class Target:
    """What the model is compiled for.

    Attributes:
        name: in the table.
        options: of the compiler.
        machine: where the program runs; `processor`: what is emulated there.
    """

    name: str
    options: tuple[str, ...]
    machine: type[Machine] = Emulated
    processor: Processor | None = None
    compiler: tuple[str, ...] = ZIG


@dataclasses.dataclass(frozen=True)
class Results:
    """What a model computes, equal everywhere: the digest, and a text for each of `SAMPLINGS`."""

    digest: int
    texts: list[list[int]]


def targets() -> list[Target]:
    """All of them; gcc's where it is installed."""
    mode, stack = unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS, arm_const.UC_ARM_REG_SP
    m0, m3, m33 = (
        Processor(unicorn.UC_ARCH_ARM, mode, model, stack, _thumb_length)
        for model in (arm_const.UC_CPU_ARM_CORTEX_M0, arm_const.UC_CPU_ARM_CORTEX_M3, arm_const.UC_CPU_ARM_CORTEX_M33)
    )
    arm = "thumb-freestanding-eabi"
    found = [  # an M0+ has the instructions of an M0; -g: Zig leaves the names out of small programs
        _emulated("ARM Cortex-M0+, -Os", arm, m0, "-mcpu=cortex_m0plus", "-Os", "-g"),
        _emulated("ARM Cortex-M0+", arm, m0, "-mcpu=cortex_m0plus"),
        _emulated("ARM Cortex-M3", arm, m3, "-mcpu=cortex_m3"),
        _emulated("ARM Cortex-M33", arm, m33, "-mcpu=cortex_m33"),
    ]
    risc_v = Processor(unicorn.UC_ARCH_RISCV, unicorn.UC_MODE_RISCV32, None, riscv_const.UC_RISCV_REG_SP)
    for cpu, option in (("rv32im", "generic_rv32+m"), ("rv32i", "generic_rv32")):
        found.append(_emulated(f"RISC-V {cpu}", "riscv32-freestanding-none", risc_v, f"-mcpu={option}"))
    big = unicorn.UC_MODE_BIG_ENDIAN
    power = Processor(unicorn.UC_ARCH_PPC, unicorn.UC_MODE_PPC32 | big, None, ppc_const.UC_PPC_REG_1)
    found.append(_emulated("PowerPC, big-endian", "powerpc-freestanding-eabi", power))
    mips = Processor(unicorn.UC_ARCH_MIPS, unicorn.UC_MODE_MIPS32 | big, None, mips_const.UC_MIPS_REG_SP)
    found.append(_emulated("MIPS32, big-endian", "mips-freestanding-eabi", mips))
    pc = Processor(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32, None, x86_const.UC_X86_REG_ESP, None)
    found.append(_emulated("x86, 32 bits", "x86-freestanding-none", pc))
    for name, option in (("WebAssembly", "-mno-simd128"), ("WebAssembly, simd128", "-msimd128")):
        found.append(Target(name, ("-target", "wasm32-freestanding", "-O2", option), Wasm))
    compilers = {"clang": ZIG} | ({"gcc": ("gcc",)} if shutil.which("gcc") else {})
    for name, compiler in compilers.items():
        for options in (["-O0"], ["-O3", "-march=native"]):
            found.append(
                Target(f"{platform.machine()}, {name} {options[0]}", tuple(options), Native, compiler=compiler)
            )
    return found


def _emulated(name: str, triple: str, processor: Processor, *options: str) -> Target:
    return Target(name, ("-target", triple, "-O2", *options), processor=processor)


def _thumb_length(code: bytes) -> int:
    return 4 if code[1] >> 3 >= 0b11101 else 2


def compile_model(target: Target, folder: Path, source: Path = PICOGPT_C) -> list[str]:
    """Compiles the model to `picogpt.o` in the folder.

    Returns:
        the compiler's own functions that it calls; none are told of a native target.

    Raises:
        UserError: it calls others, or computes with floats.
    """
    code, compiled = folder / "picogpt.ll", folder / "picogpt.o"
    _compile(target, "-c", source, output=compiled)
    if target.machine is Native:
        return []
    _compile(target, "-S", "-emit-llvm", source, output=code)
    floats = FLOATS.findall(re.sub(r'"[^"]*"', "", code.read_text(encoding="utf-8")))
    if floats:
        raise UserError(f"{source} computes with {floats[0]} for {target.name}; expected integers alone")
    if target.machine is Wasm:
        imports = wasmtime.Module(wasmtime.Engine(), compiled.read_bytes()).imports
        called = {item.name or "" for item in imports} - IN_WASM_OBJECTS
    else:
        called = {name for name, (_, is_defined) in Elf(compiled.read_bytes()).symbols.items() if not is_defined}
    if not called <= HELPERS:
        others = ", ".join(sorted(called - HELPERS))
        raise UserError(f"{source} calls {others} for {target.name}; expected no such function")
    return sorted(called)


def _compile(target: Target, *arguments: object, output: Path) -> None:
    options = [*OPTIONS, *target.machine.compiled, *target.options, f"-I{SOURCES}", *map(str, arguments)]
    if target.compiler == ZIG:
        options += ["-fno-sanitize=undefined"]  # Zig's checks of what is not optimized call functions of its own
    words = [*target.compiler, *options, "-o", str(output)]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise UserError(f"{target.name}: the compiler fails ({reason(ValueError(done.stderr))})")


def by_numpy(model: IntegerModel) -> Results:
    """What every target must compute."""
    numpy = NumpyIntegerGPT(integer_config_to_json(model), model.tensors)
    prompt = np.zeros((1, 1), np.int64)
    texts = [loop.generate(numpy, prompt, TEXT_TOKENS, *sampling, "refill")[0].tolist() for sampling in SAMPLINGS]
    return Results(logits_digest(model), texts)


def measure(
    target: Target, model: IntegerModel, folder: Path, object_folder: Path, called: Sequence[str]
) -> tuple[Results, Figures]:
    """Runs the model on the target.

    Args:
        folder: what `save_c` wrote.
        object_folder: of `compile_model`; the program is written to a new folder there.
        called: what that returned.

    Returns:
        the results, and the figures that can be told.
    """
    half = model.model.block_size // 2
    program = Path(tempfile.mkdtemp(dir=object_folder)) / "program"  # a new path: a library that is loaded stays
    options = ["-Wl,--gc-sections", *target.machine.linked, *([] if called else ["-nostdlib"])]
    sizes = (f"-I{folder}", f"-DTEXT_SIZE={max(TEXT_TOKENS, half) + 1}")
    _compile(target, *options, *sizes, TARGET_C, object_folder / "picogpt.o", output=program)
    machine = target.machine(*([program] if target.processor is None else [program, target.processor]))

    def ask(what: int, count: int, sampling: tuple[float, int, int]) -> None:
        temperature, top_k, seed = sampling
        multiplier = draws.Scale.of(temperature).multiplier if temperature else 0
        machine.write("request", [what, count, temperature == 0, int(multiplier), top_k, seed])

    def text(count: int, sampling: tuple[float, int, int]) -> list[int]:
        machine.write("text", [0])
        ask(TEXT, count, sampling)
        machine.run()
        return machine.read("text", count + 1)

    ask(DIGEST, 0, SAMPLINGS[0])
    machine.run()
    digest, ram_bytes = machine.read("answer", 2)
    results = Results(digest & 0xFFFFFFFF, [text(TEXT_TOKENS, sampling) for sampling in SAMPLINGS])
    text(half, SAMPLINGS[1])
    ask(TOKEN, half, SAMPLINGS[1])
    instructions, found = machine.count(), machine.sizes()
    figures: Figures = {"ram_bytes": ram_bytes}
    if found:
        weights = sum(array.nbytes for array in arrays(model).values())
        figures |= {"code_bytes": found["flash_bytes"] - weights, "weight_bytes": weights}
        figures["stack_bytes"] = found["stack_bytes"]
    return results, figures | ({} if instructions is None else {"instructions_per_token": instructions})


def benchmark_targets(model: Any) -> dict[str, Any]:
    """Every target's figures, after its results were compared.

    Raises:
        UserError: a model in mixed arithmetic or too large to be a header, or a target computes something else.
    """
    if not isinstance(model, IntegerModel):
        raise UserError("the model is in mixed arithmetic; C computes integers: quantize.py --arithmetic=integer")
    if model.n_bytes > LARGEST_HEADER:
        raise UserError(
            f"the model has {model.n_bytes:,} bytes; at most {LARGEST_HEADER:,} are compiled into a program"
        )
    expected, figures = by_numpy(model), {}
    settings: dict[str, Any] = {"parameters": model.model.n_parameters, "tokens before": model.model.block_size // 2}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "c"
        save_c(model, folder)
        for target in targets():
            called = compile_model(target, Path(temporary))
            results, figures[target.name] = measure(target, model, folder, Path(temporary), called)
            if results != expected:
                raise UserError(
                    f"{target.name} computes something else than NumPy; the compiler or the emulator is at fault"
                )
            if called:
                settings[f"{target.name} calls"] = " ".join(called)
    report = make_report("targets", settings, figures, {}, ())
    report["versions"] |= {package: metadata.version(package) for package in ("ziglang", "unicorn", "wasmtime")}
    return report
