"""Which processor this is and which instructions it has (standard library only)."""

import functools
import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
VNNI = {"avx_vnni", "avx512_vnni"}  # either way to add up products of bytes without an intermediate that saturates
BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # products of bfloat16 numbers, added up in float32

SMALL_CALL = 1 << 29  # tokens times bytes of the model: some milliseconds of work


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
