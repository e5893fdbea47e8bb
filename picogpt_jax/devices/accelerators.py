"""Whether JAX would find an accelerator, told without importing it (standard library only)."""

import importlib.util
import os
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "gpu", "tpu"]

GPU_NODES = ("nvidia[0-9]*", "kfd", "dxg")  # in /dev: NVIDIA's, AMD's, and Windows' for its Linux


def has_accelerator() -> bool:
    """Whether there is one that JAX, as it is installed and set up, computes on."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms.split(",")[0] != "cpu"
    return (has_plugin() and has_gpu()) or (importlib.util.find_spec("libtpu") is not None and has_tpu())


def has_plugin() -> bool:
    """Whether a plug-in of JAX is installed, as for CUDA."""
    return importlib.util.find_spec("jax_plugins") is not None


def has_gpu() -> bool:
    """Whether the system shows a GPU."""
    return any(any(Path("/dev").glob(pattern)) for pattern in GPU_NODES)


def has_tpu() -> bool:
    """Whether the system shows what may be a TPU."""
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("*"))
