"""What accelerators can do, as their vendors state it: the one table behind MFU and the plan of a run.

Figures are for a whole chip, dense (no sparsity). Vendors give the interconnect as the sum of both directions of all
links; `link_bandwidth` here is one direction of one link.
"""

import dataclasses
import re

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
        topology: what the TPU compiler calls it, the part before the colon of `v5e:16x16`; None: no plans for it.
        cores: how the compiler is to see a chip's cores, where it is not as JAX does on the chip itself: `megacore`
            makes one device of the two of a TPU v4.
        example: a slice of it.
        source: where the figures are published.
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
    topology: str | None = None
    cores: str | None = None
    example: str = ""
    source: str


CHIPS = (
    Chip(
        name="TPU v4",
        device_kind=r"TPU v4",
        bfloat16_flops=275 * TERA,
        int8_ops=275 * TERA,
        memory_bytes=32 * GIB,
        memory_bandwidth=1200 * GIGA,
        links=6,
        link_bandwidth=50 * GIGA,  # 2,400 Gbit/s a chip, one direction
        torus_multiple=4,
        topology="v4",
        cores="megacore",
        example="4x4x8",
        source="cloud.google.com/tpu/docs/v4; interconnect: Google Cloud's announcement of TPU v5p, December 2023",
    ),
    Chip(
        name="TPU v5e",
        device_kind=r"TPU v5( lite|e)",
        bfloat16_flops=197 * TERA,
        int8_ops=393 * TERA,
        memory_bytes=16 * GIB,
        memory_bandwidth=819 * GIGA,
        links=4,
        link_bandwidth=50 * GIGA,  # 400 GB/s a chip, both directions
        torus_multiple=16,
        topology="v5e",
        example="16x16",
        source="cloud.google.com/tpu/docs/v5e",
    ),
    Chip(
        name="TPU v5p",
        device_kind=r"TPU v5p?",
        bfloat16_flops=459 * TERA,
        int8_ops=918 * TERA,
        memory_bytes=95 * GIB,
        memory_bandwidth=2765 * GIGA,
        links=6,
        link_bandwidth=100 * GIGA,  # 1,200 GB/s a chip, both directions
        torus_multiple=4,
        topology="v5p",
        example="4x4x8",
        source="cloud.google.com/tpu/docs/v5p; int8: Google Cloud's announcement of TPU v5p, December 2023",
    ),
    Chip(
        name="TPU v6e",
        device_kind=r"TPU v6( lite|e)",
        bfloat16_flops=918 * TERA,
        int8_ops=1836 * TERA,
        memory_bytes=32 * GIB,
        memory_bandwidth=1638 * GIGA,
        links=4,
        link_bandwidth=100 * GIGA,  # 800 GB/s a chip, both directions
        torus_multiple=16,
        topology="v6e",
        example="16x16",
        source="cloud.google.com/tpu/docs/v6e",
    ),
    Chip(
        name="TPU7x",
        device_kind=r"TPU7x",
        devices=2,
        bfloat16_flops=2307 * TERA,
        int8_ops=None,
        memory_bytes=192 * GIB,
        memory_bandwidth=7380 * GIGA,
        links=6,
        link_bandwidth=100 * GIGA,  # 1,200 GB/s a chip, both directions
        torus_multiple=4,
        topology="tpu7x",
        example="4x4x4",
        source="cloud.google.com/tpu/docs/tpu7x",
    ),
    Chip(
        name="NVIDIA A100 40GB",
        device_kind=r"NVIDIA A100-(SXM4|PCIE)-40GB",
        bfloat16_flops=312 * TERA,
        int8_ops=624 * TERA,
        memory_bytes=40 * GIGA,
        memory_bandwidth=1555 * GIGA,
        links=12,
        link_bandwidth=25 * GIGA,
        source="NVIDIA A100 Tensor Core GPU data sheet",
    ),
    Chip(
        name="NVIDIA A100 80GB",
        device_kind=r"NVIDIA A100(-SXM4-80GB| 80GB PCIe)",
        bfloat16_flops=312 * TERA,
        int8_ops=624 * TERA,
        memory_bytes=80 * GIGA,
        memory_bandwidth=2039 * GIGA,
        links=12,
        link_bandwidth=25 * GIGA,
        source="NVIDIA A100 Tensor Core GPU data sheet",
    ),
    Chip(
        name="NVIDIA H100",
        device_kind=r"NVIDIA H100 80GB HBM3",
        bfloat16_flops=989 * TERA,
        int8_ops=1979 * TERA,
        memory_bytes=80 * GIGA,
        memory_bandwidth=3350 * GIGA,
        links=18,
        link_bandwidth=25 * GIGA,
        source="NVIDIA H100 Tensor Core GPU data sheet (SXM), halved: it states figures with sparsity",
    ),
    Chip(
        name="NVIDIA H200",
        device_kind=r"NVIDIA H200",
        bfloat16_flops=989 * TERA,
        int8_ops=1979 * TERA,
        memory_bytes=141 * GIGA,
        memory_bandwidth=4800 * GIGA,
        links=18,
        link_bandwidth=25 * GIGA,
        source="NVIDIA H200 Tensor Core GPU data sheet (SXM), halved: it states figures with sparsity",
    ),
    Chip(
        name="NVIDIA B200",
        device_kind=r"NVIDIA B200",
        bfloat16_flops=2250 * TERA,
        int8_ops=4500 * TERA,
        memory_bytes=180 * GIGA,
        memory_bandwidth=8000 * GIGA,
        links=18,
        link_bandwidth=50 * GIGA,
        source="NVIDIA DGX B200 data sheet, an eighth, and half of what it states with sparsity",
    ),
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
