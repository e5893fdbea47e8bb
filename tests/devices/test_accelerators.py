import importlib.util
from pathlib import Path

import pytest

from picogpt_jax.devices.accelerators import has_accelerator


@pytest.mark.parametrize(
    ("installed", "nodes", "environment", "expected"),
    [
        (set(), [], None, False),
        ({"jax_plugins"}, ["nvidia0"], None, True),
        ({"jax_plugins"}, [], None, False),  # jax[cuda] on a machine without a GPU
        (set(), ["nvidia0"], None, False),  # a GPU that JAX, as it is installed, does not use
        ({"libtpu"}, ["accel0"], None, True),
        ({"libtpu"}, [], None, False),  # its compiler alone
        ({"jax_plugins"}, ["nvidia0"], "cpu", False),
        (set(), [], "tpu,cpu", True),
        ({"jax_plugins"}, ["nvidia0"], "", True),
    ],
)
def test_an_accelerator_is_what_jax_would_find(
    installed: set[str], nodes: list[str], environment: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if environment is not None:
        monkeypatch.setenv("JAX_PLATFORMS", environment)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    found = {("/dev", node[:5]) for node in nodes}
    monkeypatch.setattr(
        Path, "glob", lambda folder, pattern: (node for node in found if node == (str(folder), pattern[:5]))
    )
    assert has_accelerator() is expected
