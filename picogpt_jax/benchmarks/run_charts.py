"""Charts of a training report as SVG elements for a page whose stylesheet is `run_page.STYLE`.

A chart scales to the width of the page. On a narrow screen the stylesheet sets its text larger, for which there is
room; so text is placed in `em`. Runs differ by colour, marker and dashes, not by colour alone.
"""

import dataclasses
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from picogpt_jax.int8.convert import BAD_DB, TensorReport
from picogpt_jax.training.plot import Curve

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 84, 64, 32, 36  # of a chart of lines, in its own units
NAMES, VALUES, ROW = 200, 60, 40  # of a chart of bars: left of them, right of them, height of a matrix's two
MOST_POINTS = 500  # of a line: more than a screen shows
MARKERS = (  # paths around 0, one for each run
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "M-3.6,-3.6h7.2v7.2h-7.2z",
    "M0,-5l4.6,8h-9.2z",
    "M0,-5.2l4.4,5.2l-4.4,5.2l-4.4,-5.2z",
    "M0,5l4.6,-8h-9.2z",
    "M-1.6,-5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """A curve to draw: `style` of `MARKERS` and of the colours, `kind` is a class of the stylesheet."""

    curve: Curve
    style: int
    kind: str  # raw | smooth | val | rate
    name: str


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers from `low` to `high`, which differ by 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def thinned(curve: Curve) -> Curve:
    """At most `MOST_POINTS` points: of each part of a longer curve the lowest and the highest, in their order."""
    count = curve.shape[1]
    if count <= MOST_POINTS:
        return curve
    kept = {0, count - 1}
    for part in np.array_split(np.arange(count), MOST_POINTS // 2 - 1):
        kept |= {int(part[curve[1, part].argmin()]), int(part[curve[1, part].argmax()])}
    return curve[:, sorted(kept)]


def swatch(style: int) -> str:
    """A run's marker, for a legend."""
    return f'<svg class="swatch r{style}" viewBox="-7 -7 14 14" aria-hidden="true"><path d="{MARKERS[style]}"/></svg>'


def line_chart(
    name: str,
    title: str,
    description: str,
    lines: Sequence[Line],
    limits: tuple[float, float],
    labels: tuple[str, str],
    right_unit: float | None = None,
    height: int = 360,
) -> str:
    """Curves against the step.

    Args:
        name: of the chart, in its page.
        description: what the chart shows, in words, for who does not see it.
        limits: lowest and highest value that are shown.
        labels: above the left and the right axis.
        right_unit: how much of the left axis's unit is one of the right's; None: there is no right axis.
    """
    (low, high), last = limits, max((float(line.curve[0].max(initial=0)) for line in lines), default=0.0) or 1.0
    right, bottom = WIDTH - RIGHT, height - BOTTOM
    most = (bottom - TOP) // 30  # labels of an axis

    def at_x(step: float) -> float:
        return round(LEFT + (right - LEFT) * step / last, 1)

    def at_y(value: float) -> float:
        return round(bottom - (bottom - TOP) * (value - low) / (high - low), 1)

    parts = [_text(0, 0, labels[0], "start", "0.9em")]
    for value in ticks(low, high, most):
        parts.append(f'<path class="grid" d="M{LEFT},{at_y(value)}H{right}"/>')
        parts.append(_text(LEFT - 8, at_y(value), f"{value:g}", "end", "0.35em"))
    if right_unit is not None:
        parts.append(_text(WIDTH, 0, labels[1], "end", "0.9em"))
        parts += [
            _text(right + 8, at_y(value * right_unit), f"{value:g}", "start", "0.35em")
            for value in ticks(low / right_unit, high / right_unit, most)
        ]
    for value in filter(float.is_integer, ticks(0, last, 5)):
        parts.append(_text(at_x(value), bottom + 4, f"{value:,.0f}" if value else "step 0", "middle", "1.1em"))
    parts.append(f'<path class="axis" d="M{LEFT},{bottom}H{right}"/>')
    parts.append(f'<clipPath id="{name}-area"><path d="M{LEFT},{TOP}H{right}V{bottom}H{LEFT}z"/></clipPath>')
    for line in lines:
        points = thinned(line.curve)
        if not points.size:
            continue
        path = "L".join(f"{at_x(step)},{at_y(value)}" for step, value in points.T)
        parts.append(f'<path class="{line.kind} r{line.style}" clip-path="url(#{name}-area)" d="M{path}"/>')
        if line.kind == "val":
            markers = [
                f'<path d="{MARKERS[line.style]}" transform="translate({at_x(step)},{at_y(value)})">'
                f"<title>{escape(line.name)}, step {step:,.0f}: {value:.4f}</title></path>"
                for step, value in points.T
                if low <= value <= high
            ]
            parts += [f'<g class="marker r{line.style}">', *markers, "</g>"]
    return _svg(name, title, description, height, parts)


def bar_chart(name: str, title: str, description: str, rows: Sequence[TensorReport]) -> str:
    """The signal-to-noise ratios of each matrix: a full bar for the weights, a light one for the products."""
    found = [value for row in rows for value in (row.sqnr_db, row.product_db) if value is not None]
    highest = 10 * math.ceil(max([30.0, *filter(math.isfinite, found)]) / 10)
    right, bottom = WIDTH - VALUES, TOP + ROW * len(rows)

    def at_x(decibels: float) -> float:
        return round(NAMES + (right - NAMES) * min(max(decibels, 0.0), highest) / highest, 1)

    parts = [_text(0, 0, "decibels", "start", "0.9em")]
    for value in range(0, highest + 1, 10):
        kind = "limit" if value == BAD_DB else "grid"
        parts.append(f'<path class="{kind}" d="M{at_x(value)},{TOP}V{bottom}"/>')
        parts.append(_text(at_x(value), 0, str(value), "middle", "0.9em"))
    for index, row in enumerate(rows):
        top = TOP + ROW * index + 4
        parts.append(_text(NAMES - 8, top + 15, short_name(row.name), "end", "0.35em"))
        for kind, ratio, y, thick in (("weights", row.sqnr_db, top, 10), ("products", row.product_db, top + 13, 16)):
            if ratio is not None:
                width = round(at_x(ratio) - NAMES, 1)
                parts.append(f'<rect class="{kind}" x="{NAMES}" y="{y}" width="{width}" height="{thick}"/>')
                if kind == "products":
                    parts.append(_text(NAMES + width + 6, y + thick / 2, decibels(ratio), "start", "0.35em"))
    return _svg(name, title, description, bottom + 4, parts)


def short_name(name: str) -> str:
    """transformer.h.0.attn.c_attn -> h.0.attn.c_attn."""
    return name.removeprefix("transformer.")


def decibels(value: float | None) -> str:
    """A ratio for people; infinite where nothing was lost."""
    return "" if value is None else f"{value:.1f}" if math.isfinite(value) else "exact"


def _text(x: float, y: float, text: str, anchor: str, dy: str) -> str:
    return f'<text x="{x}" y="{y}" dy="{dy}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(name: str, title: str, description: str, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-title {name}-desc">\n'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>\n'
        + "\n".join(parts)
        + "\n</svg>"
    )
