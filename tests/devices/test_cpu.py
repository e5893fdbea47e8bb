from pathlib import Path

import pytest

from picogpt_jax.devices import cpu


@pytest.mark.parametrize(
    ("text", "vnni", "unsigned", "bfloat16"),
    [
        ("model name : A\nflags : fpu avx512_vnni avx512_bf16\n", True, True, True),
        ("model name : B\nflags : fpu avx2 avx_vnni\n", True, False, False),
        ("model name : C\nflags : fpu avx2 avx512f\n", False, False, False),
        ("model name : D\nflags : fpu amx_bf16 amx_int8\n", False, False, True),
        ("flags : avx512_vnni amx_int8 amx_bf16\n", True, False, True),
        (None, False, False, False),
    ],
)
def test_features_are_read_from_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, vnni: bool, unsigned: bool, bfloat16: bool
) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    assert (cpu.has_vnni(), cpu.wants_unsigned_int8(), cpu.has_bfloat16()) == (vnni, unsigned, bfloat16)
