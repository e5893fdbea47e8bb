from pathlib import Path

import numpy as np
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


@pytest.mark.skipif(not cpu.can_flush_denormals(), reason="not Linux on x86-64")
def test_denormals_are_zero_inside_the_block_only() -> None:
    small, denormal = np.float32(2e-38), np.float32(1e-39)

    def products() -> tuple[float, float]:
        return float(small * np.float32(0.01)), float(denormal * np.float32(1000))

    with pytest.raises(KeyError), cpu.denormals_flushed():
        assert products() == (0, 0)
        with cpu.denormals_flushed():
            assert products() == (0, 0)
        assert products() == (0, 0)
        assert small * np.float32(10) > 1e-37
        raise KeyError
    assert min(products()) > 0


def test_where_the_float_environment_is_not_known_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_libm", lambda: None)
    assert not cpu.can_flush_denormals()
    with cpu.denormals_flushed():
        assert np.float32(2e-38) * np.float32(0.01) > 0
