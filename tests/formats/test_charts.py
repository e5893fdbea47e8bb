import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from picogpt_jax.formats.charts import MOST_POINTS, Line, line_chart, thinned, ticks

STEPS = np.arange(1.0, 2001.0)
NOISE = np.random.default_rng(0).normal(size=2000)


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # XML is stricter than HTML


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
