"""Charts of a page as SVG elements, which scale to the width of the page.

The page's stylesheet has the classes: chart, grid, axis, marker, the kinds of lines, and a colour `--run` for each
style r0, r1 ... On a narrow screen it sets their text larger, for which there is room; so text is placed in `em`. Lines
differ by colour, marker and dashes, not by colour alone.
"""

import dataclasses
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from picogpt_jax.training.plot import Curve

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 84, 64, 32, 36  # of a chart of lines, in its own units
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

    parts = [text_at(0, 0, labels[0], "start", "0.9em")]
    for value in ticks(low, high, most):
        parts.append(f'<path class="grid" d="M{LEFT},{at_y(value)}H{right}"/>')
        parts.append(text_at(LEFT - 8, at_y(value), f"{value:g}", "end", "0.35em"))
    if right_unit is not None:
        parts.append(text_at(WIDTH, 0, labels[1], "end", "0.9em"))
        parts += [
            text_at(right + 8, at_y(value * right_unit), f"{value:g}", "start", "0.35em")
            for value in ticks(low / right_unit, high / right_unit, most)
        ]
    for value in filter(float.is_integer, ticks(0, last, 5)):
        parts.append(text_at(at_x(value), bottom + 4, f"{value:,.0f}" if value else "step 0", "middle", "1.1em"))
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
    return svg(name, title, description, height, parts)


def text_at(x: float, y: float, text: str, anchor: str, dy: str) -> str:
    """Words in a chart: `anchor` is start, middle or end, `dy` how far below."""
    return f'<text x="{x}" y="{y}" dy="{dy}" text-anchor="{anchor}">{escape(text)}</text>'


def svg(name: str, title: str, description: str, height: int, parts: Sequence[str]) -> str:
    """A chart of these elements, with a name and words for who does not see it."""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-title {name}-desc">\n'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>\n'
        + "\n".join(parts)
        + "\n</svg>"
    )
