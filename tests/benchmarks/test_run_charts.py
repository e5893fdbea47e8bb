import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from picogpt_jax.benchmarks.run_charts import MOST_POINTS, Line, bar_chart, line_chart, thinned, ticks
from picogpt_jax.int8.convert import TensorReport

STEPS = np.arange(1.0, 2001.0)
NOISE = np.random.default_rng(0).normal(size=2000)


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # XML is stricter than HTML


def report(name: str, sqnr_db: float, product_db: float | None) -> TensorReport:
    return TensorReport(f"transformer.{name}", (4, 2), (0.1, 0.2), 9, sqnr_db, product_db, 24)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 8000.0, [0, 2000, 4000, 6000, 8000]),
        (1.26, 2.45, [1.4, 1.6, 1.8, 2.0, 2.2, 2.4]),
        (-0.3, 0.6, [-0.2, 0, 0.2, 0.4, 0.6]),
    ],
)
def test_ticks_are_round_and_within_the_axis(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 6) == pytest.approx(expected)


def test_a_long_curve_keeps_its_ends_and_extremes() -> None:
    curve = np.stack([STEPS, NOISE])
    short = thinned(curve)
    assert MOST_POINTS / 2 < short.shape[1] <= MOST_POINTS
    assert {NOISE[0], NOISE[-1], NOISE.min(), NOISE.max()} <= set(short[1])
    assert (np.diff(short[0]) > 0).all()
    np.testing.assert_array_equal(thinned(curve[:, :MOST_POINTS]), curve[:, :MOST_POINTS])


def test_every_point_is_drawn_where_it_belongs() -> None:
    val = np.array([[0.0, 50.0, 100.0], [3.0, 2.0, 1.0]])
    train = np.stack([STEPS[:100], NOISE[:100]])
    lines = [Line(train, 0, "smooth", "training"), Line(val, 2, "val", "a < b & c")]
    svg = parsed(line_chart("losses", "A title", "1 < 2", lines, (1.0, 3.0), ("nats", "bits"), 0.5, 300))
    paths = {path.get("class"): path.get("d", "") for path in svg.iter("path")}
    assert len(re.findall("[ML]", paths["smooth r0"])) == 100
    points = [tuple(map(float, pair.split(","))) for pair in paths["val r2"][1:].split("L")]
    assert points == [(84.0, 32.0), (370.0, 148.0), (656.0, 264.0)]
    marks = svg.findall("g[@class='marker r2']/path")
    assert [mark.get("transform") for mark in marks] == [f"translate({x},{y})" for x, y in points]
    assert marks[1].findtext("title") == "a < b & c, step 50: 2.0000"
    texts = {text.text: text for text in svg.iter("text")}
    assert {"nats", "bits", "step 0", "100"} <= set(texts)
    assert float(texts["6"].get("y", 0)) == 32.0, "6 bits are 3 nats here"


def test_a_chart_has_a_name_for_who_does_not_see_it() -> None:
    svg = parsed(line_chart("c", "A title", "1 < 2", [], (0.0, 1.0), ("nats", "")))
    assert svg.get("role") == "img"
    named = {element.get("id"): element.text for element in svg}
    assert [named[name] for name in svg.get("aria-labelledby", "").split()] == ["A title", "1 < 2"]


def test_a_run_without_a_single_step_is_drawn() -> None:
    parsed(line_chart("c", "t", "d", [Line(np.array([[0.0], [1.5]]), 0, "val", "r")], (1.0, 2.0), ("nats", "")))
    parsed(line_chart("c", "t", "d", [Line(np.zeros((2, 0)), 0, "val", "r")], (1.0, 2.0), ("nats", "")))


def test_bars_are_as_long_as_their_ratio() -> None:
    rows = [report("h.0.mlp.c_fc", 40.0, 10.0), report("wpe", float("inf"), None), report("wte", 20.0, -3.0)]
    svg = parsed(bar_chart("bars", "t", "d", rows))
    widths = [(bar.get("class"), float(bar.get("width", 0))) for bar in svg.iter("rect")]
    full = widths[0][1]
    assert full > 0
    assert widths == [
        ("weights", full),
        ("products", full / 4),
        ("weights", full),  # nothing was lost: as far as the axis goes
        ("weights", full / 2),
        ("products", 0.0),
    ]
    texts = [text.text for text in svg.iter("text")]
    assert {"h.0.mlp.c_fc", "10.0", "wpe", "wte", "-3.0"} <= set(texts)
    assert len(svg.findall("path[@class='limit']")) == 1, "where products are bad"
