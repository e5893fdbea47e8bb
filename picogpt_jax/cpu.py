"""What processor this is (standard library only)."""

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
VNNI = {"avx_vnni", "avx512_vnni"}  # either way to add up products of bytes without an intermediate that saturates
BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # products of bfloat16 numbers, added up in float32


def cpu() -> tuple[str, set[str]]:
    """The processor's name and the flags of its features; Linux tells both, other systems the name only."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    fields = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("features", "")).split()
    return fields.get("model name") or platform.processor() or platform.machine(), set(flags)


def has_vnni() -> bool:
    """Whether the processor is known to have instructions for int8 dot products on x86."""
    return not VNNI.isdisjoint(cpu()[1])


def has_bfloat16() -> bool:
    """Whether the processor is known to multiply bfloat16 faster than float32 (x86)."""
    return not BFLOAT16.isdisjoint(cpu()[1])
