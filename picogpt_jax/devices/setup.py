"""JAX set-up of a program: which platform, how many CPU devices, the compilation cache, XLA's options."""

import importlib.util
import os
from pathlib import Path

import jax

from picogpt_jax.devices.accelerators import Device, has_gpu, has_plugin, has_tpu
from picogpt_jax.devices.cpu import cores
from picogpt_jax.errors import UserError

# By default XLA may leave out the rounding to bfloat16 between two operations, and where it does depends on the code
# around them: training and serving would not give the same bits.
COMPILER_OPTIONS: dict[str, str | bool | int] = {"xla_allow_excess_precision": False}
# On TPUs XLA may multiply the shares of a split weight one after another, as they arrive. Then it adds up the products
# of int8 codes in bfloat16, and takes longer where weights are small beside the activations (GPT-2 XL on v5e:4x4, by
# the plan: 60% in int8, 19% in bfloat16; on v5e:2x2, of fewer activations, 5% less). So shares are gathered first.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1 << 20}
# XLA's pass that adds up more than 32 terms in two stages on CPU, for precision, in slow loops of their own.
TWO_STAGE_SUM_PASS = "tree_reduction_rewriter"
# Its pass that takes barriers out before it decides what to fuse: then every loop that reads a value computes it anew,
# back to the first layer. A training step in integer arithmetic takes 1.8 times as long with it.
BARRIER_PASS = "cse_barrier_expander"
SHORT_SUM = 1 << 20  # terms: so many squares of normal numbers, added up in one float32 loop, are wrong by 1e-5


def set_up_jax(device: Device = "auto", cpu_devices: int | None = None) -> None:
    """Selects the platform; must run before anything else touches JAX.

    Args:
        device: "auto" takes an accelerator where JAX finds one.
        cpu_devices: XLA devices on CPU; None: JAX_NUM_CPU_DEVICES, else one per core, because every device runs its
            share of the batch, element-wise work included, on a core of its own.

    Raises:
        UserError: JAX finds no such device.
    """
    if not has_gpu():  # the plug-in, installed for its compiler alone, would print that cuDNN is missing
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if device == "auto" and _only_cpu():
        device = "cpu"
    if device != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda", "cpu": "cpu", "tpu": "tpu"}[device])
    if cpu_devices is None and "JAX_NUM_CPU_DEVICES" not in os.environ:
        cpu_devices = cores()
    if cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "picogpt_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second where no driver of a GPU is installed
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise UserError(f"--device={device}: JAX finds none here{reason}; use --device=cpu or --device=auto") from None


def _only_cpu() -> bool:
    """Whether libtpu or CUDA's plug-in are installed for their compilers alone: they would complain at length."""
    has_libtpu, has_cuda = (importlib.util.find_spec(name) is not None for name in ("libtpu", "jax_cuda13_plugin"))
    if "JAX_PLATFORMS" in os.environ or not (has_libtpu or has_cuda):
        return False
    if has_tpu() or (has_cuda and has_gpu()):
        return False
    return has_cuda or not has_plugin()  # another plug-in has devices of its own


def compiler_options(platform: str | None = None, longest_sum: int | None = None) -> dict[str, str | bool | int]:
    """Options for `jax.jit`.

    Args:
        platform: of the devices; None: the one at hand.
        longest_sum: terms of the longest sum in the program; None: it may be long. On CPU short ones are added up in
            one loop, without which a training step takes 13% longer.
    """
    platform = platform or jax.default_backend()
    if platform != "cpu":
        return COMPILER_OPTIONS | (TPU_OPTIONS if platform == "tpu" else {})
    is_short = longest_sum is not None and longest_sum <= SHORT_SUM
    left_out = [BARRIER_PASS, TWO_STAGE_SUM_PASS] if is_short else [BARRIER_PASS]
    return COMPILER_OPTIONS | {"xla_disable_hlo_passes": ",".join(left_out)}
