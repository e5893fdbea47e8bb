"""Charts of a training report alone, for a page whose stylesheet is `run_page.STYLE`."""

import math
from collections.abc import Sequence

from picogpt_jax.formats.charts import TOP, WIDTH, svg, text_at
from picogpt_jax.int8.convert import BAD_DB, TensorReport

NAMES, VALUES, ROW = 200, 60, 40  # of a chart of bars: left of them, right of them, height of a matrix's two


def bar_chart(name: str, title: str, description: str, rows: Sequence[TensorReport]) -> str:
    """The signal-to-noise ratios of each matrix: a full bar for the weights, a light one for the products."""
    found = [value for row in rows for value in (row.sqnr_db, row.product_db) if value is not None]
    highest = 10 * math.ceil(max([30.0, *filter(math.isfinite, found)]) / 10)
    right, bottom = WIDTH - VALUES, TOP + ROW * len(rows)

    def at_x(decibels: float) -> float:
        return round(NAMES + (right - NAMES) * min(max(decibels, 0.0), highest) / highest, 1)

    parts = [text_at(0, 0, "decibels", "start", "0.9em")]
    for value in range(0, highest + 1, 10):
        kind = "limit" if value == BAD_DB else "grid"
        parts.append(f'<path class="{kind}" d="M{at_x(value)},{TOP}V{bottom}"/>')
        parts.append(text_at(at_x(value), 0, str(value), "middle", "0.9em"))
    for index, row in enumerate(rows):
        top = TOP + ROW * index + 4
        parts.append(text_at(NAMES - 8, top + 15, short_name(row.name), "end", "0.35em"))
        for kind, ratio, y, thick in (("weights", row.sqnr_db, top, 10), ("products", row.product_db, top + 13, 16)):
            if ratio is not None:
                width = round(at_x(ratio) - NAMES, 1)
                parts.append(f'<rect class="{kind}" x="{NAMES}" y="{y}" width="{width}" height="{thick}"/>')
                if kind == "products":
                    parts.append(text_at(NAMES + width + 6, y + thick / 2, decibels(ratio), "start", "0.35em"))
    return svg(name, title, description, bottom + 4, parts)


def short_name(name: str) -> str:
    """transformer.h.0.attn.c_attn -> h.0.attn.c_attn."""
    return name.removeprefix("transformer.")


def decibels(value: float | None) -> str:
    """A ratio for people; infinite where nothing was lost."""
    return "" if value is None else f"{value:.1f}" if math.isfinite(value) else "exact"
