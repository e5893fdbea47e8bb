"""NVIDIA GPUs as their compiler sees them: descriptions of devices that are not here.

Extra `gpu-plan`: JAX's CUDA plug-in, which compiles, and NVIDIA's assembler `ptxas`. A driver, cuBLAS and cuDNN are not
needed. What cannot be had without a device is the tuning: it chooses the tiles of a product, or a library for it.
"""

import contextlib
import dataclasses
import importlib.metadata
import re
from collections.abc import Iterator

import jax

from picogpt_jax.devices.chips import Chip
from picogpt_jax.errors import UserError

PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm")
MOST_PER_HOST = 8  # GPUs that the switch of a DGX or HGX joins


@dataclasses.dataclass(frozen=True)
class Target:
    """What the compiler asks of a GPU, beside its memory: from NVIDIA's CUDA programming guide and white papers.

    Attributes:
        name: what CUDA calls the GPU.
        capability: the major number of its compute capability; the minor one is 0.
        cores: streaming multiprocessors; `units` of float32 in each.
        shared_memory, cache: bytes: a core's shared memory, and the second-level cache.
        clock_ghz: the highest.
    """

    name: str
    capability: int
    cores: int
    units: int
    shared_memory: int
    cache: int
    clock_ghz: float


TARGETS = {
    "a100": Target("NVIDIA A100-SXM4-80GB", 8, 108, 64, 164 << 10, 40 << 20, 1.41),
    "h100": Target("NVIDIA H100 80GB HBM3", 9, 132, 128, 228 << 10, 50 << 20, 1.98),
    "h200": Target("NVIDIA H200", 9, 132, 128, 228 << 10, 50 << 20, 1.98),
    "b200": Target("NVIDIA B200", 10, 148, 128, 228 << 10, 126 << 20, 1.965),
}


def gpu_devices(chip: Chip, shape: str) -> list[jax.Device]:
    """The GPUs of one or several hosts, as the GPU compiler describes them.

    Args:
        shape: GPUs of a host, such as 8; or hosts x GPUs of each, such as 2x8.

    Raises:
        UserError: the compiler is not installed, or there is no such shape.
    """
    missing = [name for name in PACKAGES if not _is_installed(name)]
    if missing:
        raise UserError(
            f"a plan for GPUs needs their compiler, which is not installed (missing: {', '.join(missing)}); "
            "pip install 'picogpt_jax[gpu-plan]'"
        )
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", shape)
    if found is None or int(found[2]) > MOST_PER_HOST:
        raise UserError(
            f"--topology={chip.topology}:{shape} is neither a number of GPUs in a host, up to {MOST_PER_HOST}, nor "
            f"hosts x GPUs of each; give {chip.topology}:8, or {chip.topology}:2x8 for two hosts"
        )
    from jax.experimental import topologies

    assert chip.topology is not None
    grid = f"1x{found[1] or 1}x{found[2]}"  # slices x hosts x GPUs of a host
    target = _target_config(TARGETS[chip.topology], chip)
    return list(topologies.get_topology_desc(platform="cuda", target_config=target, topology=grid).devices)


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _target_config(target: Target, chip: Chip) -> str:
    """XLA's GpuTargetConfigProto as text, with those fields only that every release of the compiler knows."""
    extension = "ACCELERATED_FEATURES" if target.capability >= 9 else "NONE"  # the instructions of sm_90a and sm_100a
    reserved = 1 << 10  # bytes of a core's shared memory that a block cannot have
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      core_count: {target.cores} fpus_per_core: {target.units} clock_rate_ghz: {target.clock_ghz}
      shared_memory_per_block: {48 << 10} shared_memory_per_block_optin: {target.shared_memory - reserved}
      shared_memory_per_core: {target.shared_memory} l2_cache_size: {target.cache}
      memory_bandwidth: {chip.memory_bandwidth:.0f} device_memory_size: {chip.memory_bytes:.0f}
      cuda_compute_capability {{ major: {target.capability} feature_extension: {extension} }}
    }}
    platform_name: "CUDA" device_description_str: "{target.name}"
    """


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """Lets JAX trace cuDNN's attention where the library is not installed.

    JAX asks the library for its version. The compiler does not need it, so the answer is the version that the plug-in
    was built for.
    """
    from jax_cuda13_plugin import _versions

    asked = _versions.cudnn_get_version
    _versions.cudnn_get_version = _versions.cudnn_build_version
    try:
        yield
    finally:
        _versions.cudnn_get_version = asked
