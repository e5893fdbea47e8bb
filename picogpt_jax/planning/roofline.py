"""How long a step takes at best: products at the chip's peak, bytes at the memory's, collectives at the links' speed.

Every published figure is taken from `picogpt_jax.devices.chips`. A real step takes longer, by what `left_out` lists.
"""

import dataclasses
import itertools
import math
from collections import Counter
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
    "stragglers and failures",
)
LEFT_OUT_OF_TPUS = ("the network between slices",)
LEFT_OUT_OF_GPUS = (
    "nothing is tuned without a device: tiles are a guess, and no product is given to a library that is faster at it; "
    "read memory, types and traffic, and take times as bounds",
    "starting a kernel: some microseconds each, unless they are recorded once and replayed; the network's delays",
    "collectives take cores and memory bandwidth from what hides them; a switch that adds up (NVLink SHARP) halves "
    "an all-reduce",
    "the second-level cache: arrays that fit into it are counted as traffic with main memory",
    "memory that CUDA, NCCL, cuBLAS and cuDNN's backward pass take for themselves",
)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Where the devices of a mesh are.

    Attributes:
        chip: what they are.
        coordinates: of each device's chip in the slice, in the order of the mesh; of a GPU: its host, its number.
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


def left_out(chip: Chip) -> tuple[str, ...]:
    """What the estimate leaves out, beside what could not be read of the program."""
    return LEFT_OUT + (LEFT_OUT_OF_TPUS if chip.network_bandwidth is None else LEFT_OUT_OF_GPUS)


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
    """Operations/s of products: int8 where the chip has it, else bfloat16.

    float32 is multiplied as bfloat16 on a TPU, and as TF32 on a GPU, at half the rate of bfloat16.
    """
    if precision == "float32" and chip.network_bandwidth is not None:
        return chip.bfloat16_flops / 2
    return chip.int8_ops if precision == "int8" and chip.int8_ops else chip.bfloat16_flops


def collective_seconds(collective: Collective, place: Slice) -> float:
    """Time of one collective: the bytes that each device sends over the bandwidth of its group, and the hops."""
    if place.chip.network_bandwidth is not None:
        return _switched_seconds(collective, place, place.chip.network_bandwidth)
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


def _switched_seconds(collective: Collective, place: Slice, network: float) -> float:
    """On GPUs: inside a host with all links of a GPU, through the switch; between hosts with a GPU's network card.

    A group on several hosts works in two levels at once: what a host receives comes over the cards of all its GPUs in
    the group, and is passed on through the switch.
    """
    links = place.chip.links * place.chip.link_bandwidth
    n_bytes, kind = collective.n_bytes, collective.kind
    if kind == "collective-permute":
        moved = [[place.coordinates[device][0] for device in pair] for pair in collective.groups if pair[0] != pair[1]]
        slowest = network if any(source != target for source, target in moved) else links
        return n_bytes / slowest + HOP_SECONDS if moved else 0.0
    group = collective.groups[0]
    if len(group) == 1:
        return 0.0
    on_host = Counter(place.coordinates[device][0] for device in group)
    hosts, most, fewest = len(on_host), max(on_host.values()), min(on_host.values())
    if "all-to-all" in kind:  # each sends to every other one a part of what it holds
        inside, outside = n_bytes * (most - 1) / len(group), n_bytes * (len(group) - fewest) / len(group)
    else:
        inside, outside = n_bytes * (most - 1) / most, n_bytes * (hosts - 1) / hosts / fewest
    both = 2 if kind == "all-reduce" else 1  # a reduce-scatter and an all-gather
    return both * (max(inside / links, outside / network) + (1 + (hosts > 1)) * HOP_SECONDS)


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
