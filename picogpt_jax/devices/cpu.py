"""Which processor this is, which instructions it has, how it treats denormal numbers (standard library only)."""

import contextlib
import ctypes
import functools
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
VNNI = {"avx_vnni", "avx512_vnni"}  # either way to add up products of bytes without an intermediate that saturates
BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # products of bfloat16 numbers, added up in float32

SMALL_CALL = 1 << 29  # tokens times bytes of the model: some milliseconds of work

# <fenv.h> on x86-64: fenv_t is eight 32-bit words, the last one the register MXCSR.
FENV_WORDS, MXCSR = 8, 7
FLUSH_TO_ZERO, DENORMALS_ARE_ZERO = 1 << 15, 1 << 6


def cpu() -> tuple[str, set[str]]:
    """The processor's name and the flags of its features; Linux tells both, other systems the name only."""
    return _read(CPUINFO)


@functools.cache
def _read(cpuinfo: Path) -> tuple[str, set[str]]:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    fields = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("features", "")).split()
    return fields.get("model name") or platform.processor() or platform.machine(), set(flags)


def cores() -> int:
    """The processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_small_call(tokens: int, model_bytes: int) -> bool:
    """Whether so much work is faster by one core: several wait for each other at the end of every operation."""
    return tokens * model_bytes <= SMALL_CALL


def has_vnni() -> bool:
    """Whether the processor is known to have instructions for int8 dot products on x86."""
    return not VNNI.isdisjoint(cpu()[1])


def wants_unsigned_int8() -> bool:
    """Whether the processor multiplies unsigned by signed bytes faster than signed ones (x86).

    AVX-512 VNNI has instructions for the former only, AMX for both.
    """
    return "avx512_vnni" in cpu()[1] and not has_amx_int8()


def has_amx_int8() -> bool:
    """Whether the processor is known to have instructions for products of int8 matrices on x86 (AMX)."""
    return "amx_int8" in cpu()[1]


def has_bfloat16() -> bool:
    """Whether the processor is known to multiply bfloat16 faster than float32 (x86)."""
    return not BFLOAT16.isdisjoint(cpu()[1])


@contextlib.contextmanager
def denormals_flushed() -> Iterator[None]:
    """In this thread, numbers below the smallest normal one (1.2e-38 in float32) are zero until the end of the block.

    Intel's processors take over a hundred cycles for an instruction that meets one. On Linux on x86-64; elsewhere
    nothing is changed.
    """
    libm = _libm()
    if libm is None:
        yield
        return
    before = (ctypes.c_uint32 * FENV_WORDS)()
    libm.fegetenv(before)
    flushed = type(before)(*before)
    flushed[MXCSR] |= FLUSH_TO_ZERO | DENORMALS_ARE_ZERO
    libm.fesetenv(flushed)
    try:
        yield
    finally:
        libm.fesetenv(before)


def can_flush_denormals() -> bool:
    """Whether `denormals_flushed` does anything here."""
    return _libm() is not None


@functools.cache
def _libm() -> ctypes.PyDLL | None:
    """The GNU C library's functions of <fenv.h>, where `fenv_t` is known."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    try:
        return ctypes.PyDLL("libm.so.6")
    except OSError:
        return None
