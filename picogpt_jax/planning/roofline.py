"""How long a step takes at best: products at the chip's peak, bytes at the memory's, collectives at the links' speed.

Every published figure is taken from `picogpt_jax.devices.chips`. A real step takes longer, by what `LEFT_OUT` lists.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from picogpt_jax.devices.chips import Chip
from picogpt_jax.planning.cost import Collective, Cost, Work

Coordinates = tuple[int, ...]

HOP_SECONDS = 1e-6  # from one chip to the next: "How to Scale Your Model" (jax-ml.github.io/scaling-book), chapter 3
LEFT_OUT = (
    "kernels are taken to reach the peaks of the data sheet; real products reach 50 to 90% of them",
    "element-wise work is counted by its memory traffic alone, not by the vector unit's speed",
    "collectives that the compiler starts early are taken to be hidden behind other work, up to all of it",
    "collectives are taken to use every link that their devices share, without contention with each other",
    "the host: input, dispatch, logging, checkpoints and evaluation",
    "stragglers, failures, and the network between slices",
)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Where the devices of a mesh are.

    Attributes:
        chip: what they are.
        coordinates: of each device's chip in the slice, in the order of the mesh.
    """

    chip: Chip
    coordinates: Sequence[Coordinates]

    @property
    def dims(self) -> Coordinates:
        return tuple(1 + max(axis) for axis in zip(*self.coordinates, strict=True))

    @property
    def devices_per_chip(self) -> int:
        return len(self.coordinates) // len(set(self.coordinates))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step.

    Attributes:
        compute, memory, interconnect: what each alone would take.
        exposed: the part of the interconnect's time that other work does not hide.
        step: instructions one after the other, each bound by compute or memory, and the exposed collectives.
        serial: the same with nothing hidden.
    """

    compute: float
    memory: float
    interconnect: float
    exposed: float
    step: float
    serial: float


def estimate(cost: Cost, place: Slice) -> Estimate:
    """The roofline of what one device does (`cost`) on the chips of `place`."""
    share = place.devices_per_chip  # devices that share a chip's figures
    bandwidth = place.chip.memory_bandwidth / share

    def compute_seconds(work: Work) -> float:
        return sum(item.flops / peak(place.chip, item.precision) for item in work.products) * share

    compute = sum(compute_seconds(work) * work.times for work in cost.work)
    memory = cost.n_bytes / bandwidth
    in_turn = sum(
        max(compute_seconds(work), work.n_bytes / bandwidth) * work.times for work in cost.work if not work.asynchronous
    )
    local = max(in_turn, memory)  # prefetches run beside the products, but through the same memory
    seconds = {True: 0.0, False: 0.0}
    for collective in cost.collectives:
        seconds[collective.overlapped] += collective.times * collective_seconds(collective, place)
    exposed = seconds[False] + max(0.0, seconds[True] - local)
    interconnect = seconds[True] + seconds[False]
    return Estimate(compute, memory, interconnect, exposed, local + exposed, local + interconnect)


def peak(chip: Chip, precision: str) -> float:
    """Operations/s of products: int8 where the chip has it, else bfloat16, in which a TPU also multiplies float32."""
    return chip.int8_ops if precision == "int8" and chip.int8_ops else chip.bfloat16_flops


def collective_seconds(collective: Collective, place: Slice) -> float:
    """Time of one collective: the bytes that each device sends over the bandwidth of its group, and the hops."""
    link = place.chip.link_bandwidth / place.devices_per_chip
    if collective.kind == "collective-permute":
        moved = [pair for pair in collective.groups if pair[0] != pair[1]]
        return (collective.n_bytes / link + HOP_SECONDS) if moved else 0.0
    group = collective.groups[0]
    if len(group) == 1:
        return 0.0
    bandwidth, hops, longest = group_links(sorted({tuple(place.coordinates[device]) for device in group}), place)
    sent = collective.n_bytes * (len(group) - 1) / len(group)
    if collective.kind == "all-reduce":
        sent, hops = 2 * sent, 2 * hops  # a reduce-scatter and an all-gather
    elif "all-to-all" in collective.kind:
        sent *= max(1.0, longest / 4)  # a packet crosses a quarter of a ring on average, and blocks it for others
    return (sent / (bandwidth * link) if bandwidth else 0.0) + hops * HOP_SECONDS


def group_links(members: Sequence[Coordinates], place: Slice) -> tuple[float, float, int]:
    """What a group of chips can use of the torus: links (one direction) a chip, hops of a ring, its longest side.

    Along each dimension of a rectangular group the data goes both ways around the ring, or back and forth on a line,
    which is half as fast; groups that are interleaved with others share the links. The dimensions add up. Another
    shape is taken to have one link.
    """
    if len(members) < 2:
        return 0.0, 0.0, 1
    sides = [sorted(set(axis)) for axis in zip(*members, strict=True)]
    if math.prod(map(len, sides)) != len(members):
        return 1.0, float(len(members)), len(members)
    links, hops = 0.0, 0.0
    for side, size in zip(sides, place.dims, strict=True):
        if len(side) == 1:
            continue
        stride = min(after - before for before, after in itertools.pairwise(side))
        multiple = place.chip.torus_multiple
        ring = bool(multiple) and size % multiple == 0 and len(side) * stride == size
        links += (2.0 if ring else 1.0) / stride
        hops += len(side) * stride / (2.0 if ring else 1.0)
    return links, hops, max(map(len, sides))
