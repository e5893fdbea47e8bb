import itertools

import pytest

from picogpt_jax.devices.chips import Chip, chip_of
from picogpt_jax.planning.cost import Collective, Cost, Precision, Product, Work
from picogpt_jax.planning.hlo import HloArray, Instruction
from picogpt_jax.planning.roofline import (
    HOP_SECONDS,
    LEFT_OUT,
    Slice,
    collective_seconds,
    estimate,
    group_links,
    left_out,
    peak,
)

INSTRUCTION = Instruction("f", (HloArray("f32", (1,)),), "fusion", (), "", "", False)


def chip(kind: str = "TPU v5 lite") -> Chip:
    found = chip_of(kind)
    assert found is not None
    return found


def grid(*dims: int, kind: str = "TPU v5 lite") -> Slice:
    return Slice(chip(kind), list(itertools.product(*map(range, dims))))


def work(flops: float = 0.0, n_bytes: int = 0, precision: Precision = "bfloat16", asynchronous: bool = False) -> Work:
    return Work([Product(flops, precision)] if flops else [], n_bytes, asynchronous, 1, INSTRUCTION)


def collective(
    kind: str, n_bytes: int, groups: list[list[int]], overlapped: bool = False, times: int = 1
) -> Collective:
    return Collective(kind, n_bytes, "f32", groups, overlapped, times, "")


def test_an_instruction_takes_as_long_as_its_products_or_its_bytes() -> None:
    v5e = chip()
    items = [work(flops=v5e.bfloat16_flops, n_bytes=1), work(flops=1.0, n_bytes=int(2 * v5e.memory_bandwidth))]
    found = estimate(Cost(items, [], []), grid(2, 2))
    assert found.compute == pytest.approx(1.0)
    assert found.memory == pytest.approx(2.0)
    assert found.step == found.serial == pytest.approx(3.0), "one after the other"
    assert found.interconnect == 0.0


def test_int8_products_run_at_the_int8_rate_where_there_is_one() -> None:
    v5e = chip()
    assert v5e.int8_ops is not None
    assert estimate(Cost([work(v5e.int8_ops, precision="int8")], [], []), grid(2, 2)).compute == pytest.approx(1.0)
    assert peak(chip("TPU7x"), "int8") == chip("TPU7x").bfloat16_flops
    assert peak(v5e, "float32") == v5e.bfloat16_flops


def test_two_devices_of_one_chip_share_its_figures() -> None:
    place = Slice(chip("TPU7x"), [(0, 0, 0), (0, 0, 0), (1, 0, 0), (1, 0, 0)])
    assert place.devices_per_chip == 2
    whole = chip("TPU7x")
    cost = Cost([work(whole.bfloat16_flops / 2), work(n_bytes=int(whole.memory_bandwidth / 2))], [], [])
    assert estimate(cost, place).step == pytest.approx(2.0)
    assert collective_seconds(collective("all-reduce", 1000, [[0, 1], [2, 3]]), place) == 0.0, "no link is crossed"


def test_prefetches_and_early_collectives_are_hidden_behind_other_work_and_no_more() -> None:
    v5e, place = chip(), grid(2, 2)
    sent = int(3 * v5e.link_bandwidth * 2)  # three seconds in a group of two: half of it crosses the one link
    hidden = collective("all-gather", sent, [[0, 1], [2, 3]], overlapped=True)
    exposed = collective("all-gather", sent, [[0, 1], [2, 3]])
    prefetch = work(n_bytes=int(0.5 * v5e.memory_bandwidth), asynchronous=True)
    products = work(flops=4 * v5e.bfloat16_flops)
    found = estimate(Cost([products, prefetch], [hidden], []), place)
    assert (found.step, found.exposed, found.serial) == pytest.approx((4.0, 0.0, 7.0), rel=1e-5)
    assert estimate(Cost([products], [exposed], []), place).step == pytest.approx(7.0, rel=1e-5)
    short = work(flops=v5e.bfloat16_flops)
    assert estimate(Cost([short], [hidden], []), place).step == pytest.approx(3.0, rel=1e-5), "two seconds stick out"


@pytest.mark.parametrize(
    ("members", "dims", "links", "longest"),
    [
        ([(0, 0), (0, 1)], (2, 2), 1.0, 2),  # neighbours
        ([(0, y) for y in range(4)], (4, 4), 1.0, 4),  # a line: no torus of v5e below 16
        ([(0, y) for y in range(16)], (16, 16), 2.0, 16),  # a ring: both ways
        ([(0, y) for y in range(8)], (16, 16), 1.0, 8),  # half of a ring is a line
        ([(x, y) for x in range(16) for y in range(16)], (16, 16), 4.0, 16),
        ([(x, 0) for x in range(0, 16, 4)], (16, 16), 0.5, 4),  # every fourth of a ring: four groups share it
        ([(0, 0), (1, 1)], (4, 4), 1.0, 2),  # no rectangle
        ([(0, 0)], (4, 4), 0.0, 1),
    ],
)
def test_links_of_a_group(members: list[tuple[int, int]], dims: tuple[int, int], links: float, longest: int) -> None:
    found = group_links(members, grid(*dims))
    assert (found[0], found[2]) == (links, longest)


def test_a_cube_of_v5p_closes_in_every_dimension() -> None:
    links, hops, _ = group_links([(x, y, z) for x in range(4) for y in range(4) for z in range(8)],
                                 grid(4, 4, 8, kind="TPU v5"))  # fmt: skip
    assert (links, hops) == (6.0, 2 + 2 + 4)


def test_seconds_of_each_kind_of_collective_on_a_ring() -> None:
    place, link = grid(16, 16), chip().link_bandwidth
    row = [list(range(16 * x, 16 * x + 16)) for x in range(16)]  # along the second dimension: a ring of 16
    size = 16 * 10**9
    gather = size * 15 / 16 / (2 * link) + 8 * HOP_SECONDS
    assert collective_seconds(collective("all-gather", size, row), place) == pytest.approx(gather)
    assert collective_seconds(collective("reduce-scatter", size, row), place) == pytest.approx(gather)
    assert collective_seconds(collective("all-reduce", size, row), place) == pytest.approx(2 * gather)
    # n (n - 1) / n packets, each over n / 4 hops on average: 4 times what a device sends
    crossing = size * 15 / 16 * 4 / (2 * link) + 8 * HOP_SECONDS
    assert collective_seconds(collective("all-to-all", size, row), place) == pytest.approx(crossing)
    assert collective_seconds(collective("collective-permute", size, [[0, 1], [1, 0]]), place) == pytest.approx(
        size / link + HOP_SECONDS
    )
    assert collective_seconds(collective("collective-permute", size, [[0, 0]]), place) == 0.0
    assert collective_seconds(collective("all-reduce", size, [[0]]), place) == 0.0


def hosts(number: int, each: int, kind: str = "NVIDIA H100 80GB HBM3") -> Slice:
    return Slice(chip(kind), [(host, host * each + gpu) for host in range(number) for gpu in range(each)])


def test_float32_is_multiplied_at_half_the_rate_of_bfloat16_on_a_gpu() -> None:
    h100 = chip("NVIDIA H100 80GB HBM3")
    assert peak(h100, "float32") == h100.bfloat16_flops / 2
    assert peak(h100, "int8") == h100.int8_ops


def test_inside_a_host_a_gpu_sends_with_all_its_links() -> None:
    place, size = hosts(1, 8), 8 * 10**9
    gather = size * 7 / 8 / 450e9 + HOP_SECONDS
    everyone = [list(range(8))]
    for kind in ("all-gather", "reduce-scatter", "all-to-all"):
        assert collective_seconds(collective(kind, size, everyone), place) == pytest.approx(gather)
    assert collective_seconds(collective("all-reduce", size, everyone), place) == pytest.approx(2 * gather)
    # No neighbours: two GPUs, wherever they are, have the same links.
    for group in ([[0, 1]], [[0, 7]]):
        assert collective_seconds(collective("all-gather", size, group), place) == pytest.approx(
            size / 2 / 450e9 + HOP_SECONDS
        )
    permute = collective("collective-permute", size, [[0, 3], [3, 0], [5, 5]])
    assert collective_seconds(permute, place) == pytest.approx(size / 450e9 + HOP_SECONDS)
    assert collective_seconds(collective("all-reduce", size, [[3]]), place) == 0.0
    assert collective_seconds(collective("collective-permute", size, [[3, 3]]), place) == 0.0


def test_between_hosts_the_network_bounds_what_a_group_sends() -> None:
    place, size = hosts(2, 8), 16 * 10**9
    # Half of the array comes from the other host, over eight cards; the links carry 7/8 of it, which is faster.
    outside = size / 2 / 8 / 50e9 + 2 * HOP_SECONDS
    inside = size * 7 / 8 / 450e9 + 2 * HOP_SECONDS
    everyone = [list(range(16))]
    assert outside < inside
    assert collective_seconds(collective("all-gather", size, everyone), place) == pytest.approx(inside)
    pairs = [[gpu, gpu + 8] for gpu in range(8)]  # one GPU of each host: over one card each
    assert collective_seconds(collective("all-reduce", size, pairs), place) == pytest.approx(
        2 * (size / 2 / 50e9 + 2 * HOP_SECONDS)
    )
    crossing = collective("all-to-all", size, everyone)
    assert collective_seconds(crossing, place) == pytest.approx(size * 8 / 16 / 50e9 + 2 * HOP_SECONDS)
    permute = collective("collective-permute", size, [[0, 1], [1, 8]])
    assert collective_seconds(permute, place) == pytest.approx(size / 50e9 + HOP_SECONDS)


def test_what_is_left_out_is_said_of_the_kind_of_chip() -> None:
    of_gpus, of_tpus = left_out(chip("NVIDIA H200")), left_out(chip())
    assert set(of_gpus) & set(of_tpus) == set(LEFT_OUT)
    assert any("nothing is tuned without a device" in item for item in of_gpus)


def test_a_latency_remains_of_small_messages() -> None:
    place = grid(16, 16)
    everyone = [list(range(256))]
    assert collective_seconds(collective("all-reduce", 4, everyone), place) == pytest.approx(
        2 * 16 * HOP_SECONDS, rel=1e-3
    )
