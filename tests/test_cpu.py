from pathlib import Path

import pytest

from picogpt_jax import cpu


@pytest.mark.parametrize(
    ("text", "vnni", "bfloat16"),
    [
        ("model name : A\nflags : fpu avx512_vnni avx512_bf16\n", True, True),
        ("model name : B\nflags : fpu avx2 avx_vnni\n", True, False),
        ("model name : C\nflags : fpu avx2 avx512f\n", False, False),
        ("model name : D\nflags : fpu amx_bf16 amx_int8\n", False, True),
        (None, False, False),
    ],
)
def test_features_are_read_from_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, vnni: bool, bfloat16: bool
) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    assert (cpu.has_vnni(), cpu.has_bfloat16()) == (vnni, bfloat16)
