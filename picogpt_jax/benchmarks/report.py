"""What every benchmark shares: contenders that take turns, their times, and the report.

Machines drift: clocks sink with heat, neighbours come and go. So all contenders take turns (A B C A B C ...), and only
figures of one run are compared, by their medians over the rounds. The first turn of each, which compiles, stands apart.
"""

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from picogpt_jax.devices.cpu import cores, cpu

Work = Callable[[], object]  # a fixed amount of work; returns when it is done
Figures = dict[str, float]

# A contender's threads wait for more work with open eyes at first: ONNX Runtime's kept a core busy for 45 ms.
PAUSE_SECONDS = 0.1

CPU_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")

# How a figure is printed: key -> (heading, format, divisor).
COLUMNS = {
    "step_time_ms": ("ms/step", ".1f", 1),
    "step_time_ms_min": ("min", ".1f", 1),
    "tokens_per_second": ("tokens/s", ",.0f", 1),
    "tokens_per_second_max": ("max", ",.0f", 1),
    "flops_per_second": ("GFLOP/s", ",.1f", 1e9),
    "share_of_float32_matmul": ("of float32 matmul", ".1%", 1),
    "mfu": ("MFU", ".1%", 1),
    "first_call_seconds": ("first call s", ".1f", 1),
    "weight_bytes": ("weights", ",.0f", 1),
    "code_bytes": ("code", ",.0f", 1),
    "ram_bytes": ("state", ",.0f", 1),
    "stack_bytes": ("stack", ",.0f", 1),
    "instructions_per_token": ("instructions/token", ",.0f", 1),
}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one contender: its first turn, and one turn for each round."""

    first: float
    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        return min(self.rounds)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Time of `over` divided by that of `under`, and what it should be."""

    over: str
    under: str
    target: str
    goal: str = ""

    def result(self, timings: Mapping[str, Timing]) -> dict[str, Any]:
        over, under = timings[self.over], timings[self.under]
        return {
            "name": f"time of {self.over} / {self.under}",
            "of_medians": over.median / under.median,
            "of_minima": over.best / under.best,
            "target": self.target,
            "goal": self.goal,
        }


def take_turns(contenders: Mapping[str, Work], rounds: int) -> dict[str, Timing]:
    """Runs every contender once, then `rounds` times all of them in turn, each after a pause."""
    first = {name: _seconds(work) for name, work in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            seconds[name].append(_seconds(work))
    return {name: Timing(first[name], seconds[name]) for name in contenders}


def _seconds(work: Work) -> float:
    time.sleep(PAUSE_SECONDS)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def throughput(timings: Mapping[str, Timing], tokens: Mapping[str, int]) -> dict[str, Figures]:
    """The figures of contenders that compute so many `tokens` a turn."""
    return {
        name: {
            "tokens_per_second": tokens[name] / timing.median,
            "tokens_per_second_max": tokens[name] / timing.best,
            "first_call_seconds": timing.first,
        }
        for name, timing in timings.items()
    }


def make_report(
    what: str,
    settings: dict[str, Any],
    figures: Mapping[str, Figures],
    timings: Mapping[str, Timing],
    comparisons: tuple[Comparison, ...],
) -> dict[str, Any]:
    """What a benchmark returns: a JSON value, see `format_report`."""
    measured = [item for item in comparisons if item.over in timings and item.under in timings]
    return {
        "benchmark": what,
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "figures": figures,
        "ratios": [item.result(timings) for item in measured],
        "seconds": {name: dataclasses.asdict(timing) for name, timing in timings.items()},
    }


def machine() -> dict[str, Any]:
    """The CPU's name and those of its features that matter here, the cores that may be used, and JAX's devices."""
    import jax

    (name, flags), devices = cpu(), jax.devices()
    return {
        "cpu": name,
        "cpu_features": [feature for feature in CPU_FEATURES if feature in flags],
        "cores": cores(),
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
    }


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide about speed, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "torch", "onnxruntime"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text: the machine, a table of figures (medians, unless it says min or max) and one of ratios."""
    machine, figures = report["machine"], report["figures"]
    keys = [key for key in COLUMNS if any(key in row for row in figures.values())]
    rows = [["", *(COLUMNS[key][0] for key in keys)]]
    rows += [[name, *(_cell(key, row.get(key)) for key in keys)] for name, row in figures.items()]
    ratios = [["ratio", "of medians", "of minima", "target", "goal"]]
    for item in report["ratios"]:
        numbers = [f"{item[key]:.2f}" for key in ("of_medians", "of_minima")]
        ratios.append([item["name"], *numbers, item["target"], item["goal"]])
    settings = {key: value for key, value in report["settings"].items() if not isinstance(value, dict)}
    lines = [
        f"{machine['cpu']} ({' '.join(machine['cpu_features'])}), {machine['cores']} cores; "
        f"{machine['devices']} {machine['platform']} devices ({machine['device_kind']})",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        ", ".join(f"{name} {value}" for name, value in settings.items()),
        "",
        *table(rows),
        "",
        *(table(ratios) if report["ratios"] else []),
    ]
    return "\n".join(lines).rstrip()


def _cell(key: str, value: float | None) -> str:
    _, form, divisor = COLUMNS[key]
    return "" if value is None else format(value / divisor, form)


def table(rows: list[list[str]]) -> list[str]:
    """The rows as aligned lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
