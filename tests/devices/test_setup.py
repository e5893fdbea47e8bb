import importlib.util
import os
from pathlib import Path

import pytest

from picogpt_jax.devices import setup
from picogpt_jax.errors import UserError


@pytest.mark.parametrize(
    ("installed", "nodes", "environment", "expected"),
    [
        ({"libtpu"}, [], None, True),
        ({"libtpu"}, ["accel0"], None, False),
        ({"libtpu", "jax_plugins"}, [], None, False),  # of some other accelerator
        ({"jax_plugins", "jax_cuda13_plugin"}, [], None, True),
        ({"libtpu", "jax_plugins", "jax_cuda13_plugin"}, [], None, True),
        ({"libtpu", "jax_plugins", "jax_cuda13_plugin"}, ["nvidia0"], None, False),
        ({"jax_plugins", "jax_cuda13_plugin"}, [], "cuda", False),
        ({"libtpu"}, [], "tpu", False),
        (set(), [], None, False),
    ],
)
def test_a_compiler_without_its_device_is_not_asked_for_devices(
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
    assert setup._only_cpu() is expected


@pytest.mark.parametrize(
    ("error", "reason"),
    [(AssertionError(), ""), (RuntimeError("Unable to initialize backend\nmore"), " (Unable to initialize backend)")],
)
def test_a_device_that_is_not_there_is_named(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise error

    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "")  # restored afterwards
    monkeypatch.delenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
    monkeypatch.setattr(setup, "has_gpu", lambda: False)
    monkeypatch.setattr(setup.jax, "devices", none)
    monkeypatch.setattr(setup.jax.config, "update", lambda *_: None)
    with pytest.raises(UserError) as caught:
        setup.set_up_jax("gpu")
    assert os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] == "1", "else the plug-in prints that cuDNN is missing"
    assert str(caught.value) == f"--device=gpu: JAX finds none here{reason}; use --device=cpu or --device=auto"
