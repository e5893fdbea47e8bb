"""What accelerators can do, as their vendors state it: the one table behind MFU and the plan of a run.

Figures are for a whole chip, dense (no sparsity). Vendors give the interconnect as the sum of both directions of all
links; `link_bandwidth` here is one direction of one link.
"""

import dataclasses
import re
from typing import Any

TERA, GIGA, GIB = 1e12, 1e9, 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Published figures of one chip.

    Attributes:
        device_kind: a pattern for what JAX calls it (`jax.Device.device_kind`).
        devices: JAX devices a chip: 2 where each of its two cores is one.
        bfloat16_flops: FLOP/s of matrix products in bfloat16, the peak that MFU refers to.
        int8_ops: operations/s of int8 products; None where the vendor publishes none.
        memory_bytes, memory_bandwidth: of the high-bandwidth memory; bytes, bytes/s.
        links: to other chips.
        link_bandwidth: bytes/s of one link in one direction.
        torus_multiple: a dimension of a slice whose length is a multiple of this closes to a ring; 0: no torus.
        network_bandwidth: bytes/s a chip in one direction to other hosts, where the links end at a switch of the host's
            chips; None: the links make one torus of all chips.
        topology: what a plan calls it, the part before the colon of `v5e:16x16` or `h100:8`; None: no plans for it.
        cores: how the compiler is to see a chip's cores, where it is not as JAX does on the chip itself: `megacore`
            makes one device of the two of a TPU v4.
        example: a slice of it; of GPUs, the number in a host.
    """

    name: str
    device_kind: str
    devices: int = 1
    bfloat16_flops: float
    int8_ops: float | None
    memory_bytes: float
    memory_bandwidth: float
    links: int
    link_bandwidth: float
    torus_multiple: int = 0
    network_bandwidth: float | None = None
    topology: str | None = None
    cores: str | None = None
    example: str = ""


def _chip(
    name: str,
    device_kind: str,
    bfloat16_teraflops: float,
    int8_teraops: float | None,
    memory_bytes: float,
    memory_gigabytes_per_second: float,
    links: int,
    link_gigabytes_per_second: float,
    torus_multiple: int = 0,
    a_slice: str = "",
    network_gigabytes_per_second: float | None = None,
    **others: Any,
) -> Chip:
    """A row of the table, in the vendors' units; `a_slice`: topology and example; `others` of `Chip`'s attributes."""
    topology, _, example = a_slice.partition(":")
    return Chip(
        name=name,
        device_kind=device_kind,
        bfloat16_flops=bfloat16_teraflops * TERA,
        int8_ops=None if int8_teraops is None else int8_teraops * TERA,
        memory_bytes=memory_bytes,
        memory_bandwidth=memory_gigabytes_per_second * GIGA,
        links=links,
        link_bandwidth=link_gigabytes_per_second * GIGA,
        torus_multiple=torus_multiple,
        network_bandwidth=None if network_gigabytes_per_second is None else network_gigabytes_per_second * GIGA,
        topology=topology or None,
        example=example,
        **others,
    )


CHIPS = (
    # name, device_kind, bfloat16 TFLOP/s, int8 TOP/s, memory, its GB/s, links, GB/s of one, torus_multiple, a slice,
    # GB/s of a chip's share of the network
    # cloud.google.com/tpu/docs/v4 and so on; interconnect of v4 (2,400 Gbit/s a chip, one direction) and int8 of v5p:
    # Google Cloud's announcement of TPU v5p, December 2023; the others' interconnect: GB/s a chip, both directions.
    _chip("TPU v4", r"TPU v4", 275, 275, 32 * GIB, 1200, 6, 50, 4, "v4:4x4x8", cores="megacore"),
    _chip("TPU v5e", r"TPU v5( lite|e)", 197, 393, 16 * GIB, 819, 4, 50, 16, "v5e:16x16"),
    _chip("TPU v5p", r"TPU v5p?", 459, 918, 95 * GIB, 2765, 6, 100, 4, "v5p:4x4x8"),
    _chip("TPU v6e", r"TPU v6( lite|e)", 918, 1836, 32 * GIB, 1638, 4, 100, 16, "v6e:16x16"),
    _chip("TPU7x", r"TPU7x", 2307, None, 192 * GIB, 7380, 6, 100, 4, "tpu7x:4x4x4", devices=2),
    # NVIDIA's data sheets: A100 Tensor Core GPU; H100 and H200 Tensor Core GPU (SXM), halved, as they state figures
    # with sparsity; DGX B200, an eighth, and half of what it states with sparsity. Network: the data sheets of DGX A100
    # (8 ConnectX-6 of 200 Gbit/s for 8 GPUs), DGX H100, H200 and B200 (8 ConnectX-7 of 400 Gbit/s). CUDA finds a little
    # more memory than the data sheet's number of decimal GB; CUDA and NCCL need some for themselves.
    _chip("NVIDIA A100 40GB", r"NVIDIA A100-(SXM4|PCIE)-40GB", 312, 624, 40 * GIGA, 1555, 12, 25, 0, "", 25),
    _chip(
        "NVIDIA A100 80GB", r"NVIDIA A100(-SXM4-80GB| 80GB PCIe)", 312, 624, 80 * GIGA, 2039, 12, 25, 0, "a100:8", 25
    ),
    _chip("NVIDIA H100", r"NVIDIA H100 80GB HBM3", 989, 1979, 80 * GIGA, 3350, 18, 25, 0, "h100:8", 50),
    _chip("NVIDIA H200", r"NVIDIA H200", 989, 1979, 141 * GIGA, 4800, 18, 25, 0, "h200:8", 50),
    _chip("NVIDIA B200", r"NVIDIA B200", 2250, 4500, 180 * GIGA, 8000, 18, 50, 0, "b200:8", 50),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, or None for one that is not in the table."""
    return next((chip for chip in CHIPS if re.fullmatch(chip.device_kind, device_kind)), None)


def model_flops_utilization(flops_per_second: float, device_kind: str, devices: int) -> float | None:
    """MFU: the model's FLOP/s (`ModelConfig.flops_per_token`) as a part of the devices' bfloat16 peak.

    None where the table has no such device. int8 products are counted against the bfloat16 peak too: with them, a step
    can be faster than an MFU of 1 would be.
    """
    chip = chip_of(device_kind)
    return None if chip is None else flops_per_second * chip.devices / (chip.bfloat16_flops * devices)
