import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from picogpt_jax.errors import UserError
from picogpt_jax.training.plot import curves_to_json, loss_figure, plot_loss, smooth

pytest.importorskip("matplotlib")

VAL = [(0, 4.0), (100, 2.0), (200, 1.5), (300, 1.75)]
EVENTS = [{"step": step, "split": "train", "loss": 4.0 * 0.99**step} for step in range(0, 301, 2)]
EVENTS += [{"step": step, "split": "val", "loss": loss, "bits_per_char": loss / math.log(2)} for step, loss in VAL]


def legend(figure: object) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_a_png_is_written_from_a_metrics_file(tmp_path: Path) -> None:
    file, png = tmp_path / "metrics.jsonl", tmp_path / "plots" / "loss.png"
    file.write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    plot_loss(file, png, "a run")
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">II", content[16:24]) == (1350, 750)
    assert list(png.parent.iterdir()) == [png]


def test_the_validation_loss_and_its_best_are_drawn() -> None:
    figure = loss_figure(EVENTS, "a run")
    axes = figure.axes[0]
    points = [line.get_xydata().tolist() for line in axes.lines]
    assert [list(point) for point in VAL] in points
    assert [[200.0, 1.5]] in points
    assert legend(figure) == ["train", f"validation, best 1.5000 ({1.5 / math.log(2):.3f} bits) at step 200"]
    assert axes.get_title(loc="left") == "a run"


def test_the_second_axis_is_in_bits() -> None:
    figure = loss_figure(EVENTS, "a run")
    figure.draw_without_rendering()  # the second axis takes its limits when it is drawn
    axes = figure.axes[0]
    (bits,) = axes.child_axes
    assert bits.get_ylabel() == "bits per token"
    assert np.array(bits.get_ylim()) * math.log(2) == pytest.approx(axes.get_ylim())


def test_the_first_steep_steps_do_not_squeeze_the_rest() -> None:
    spike = [{"step": 0, "split": "train", "loss": 1e6}, *EVENTS]
    assert loss_figure(spike, "a run").axes[0].get_ylim()[1] < 1e5


def test_a_model_carries_the_curves_in_few_numbers() -> None:
    found = curves_to_json(EVENTS)
    assert found["val"] == {"step": [0, 100, 200, 300], "loss": [4.0, 2.0, 1.5, 1.75]}
    steps, losses = found["train"]["step"], found["train"]["loss"]
    assert (len(steps), steps[0], steps[-1]) == (100, 0, 300)
    assert losses == sorted(losses, reverse=True)
    assert len(json.dumps(found, indent=2)) < 10_000
    assert curves_to_json(EVENTS[-1:])["train"] == {"step": [], "loss": []}


def test_several_runs_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 5, "split": "val", "loss": 2.0}\n')
    figure = loss_figure({"int8": EVENTS, "float": file}, "two runs")
    assert [text.split(",")[0] for text in legend(figure)] == ["int8 train", "int8 validation", "float validation"]
    colours = {line.get_color() for line in figure.axes[0].lines if "validation" in str(line.get_label())}
    assert len(colours) == 2


def test_a_loss_that_was_not_finite_is_left_out() -> None:
    events = [{"step": 1, "split": "val", "loss": None}, {"step": 2, "split": "val", "loss": 2.0}]
    assert "best 2.0000" in legend(loss_figure(events, "a run"))[0]


@pytest.mark.parametrize("events", [[], [{"step": 1, "split": "train", "loss": None}]])
def test_a_run_without_a_loss_is_named(events: list[dict[str, object]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"int4 has no loss to plot among {len(events)} events"):
        plot_loss({"int8": EVENTS, "int4": events}, tmp_path / "loss.png", "two runs")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"needs matplotlib.*picogpt_jax\[plot\]"):
        plot_loss(EVENTS, tmp_path / "loss.png", "a run")


def test_smoothing_keeps_a_straight_line_and_halves_no_end() -> None:
    line = np.linspace(3.0, 1.0, 200)
    reach = 2
    assert smooth(line)[reach:-reach] == pytest.approx(line[reach:-reach])
    assert smooth(line)[0] == pytest.approx(line[: reach + 1].mean())
    assert smooth(np.full(200, 2.5)) == pytest.approx(2.5)


def test_smoothing_takes_out_noise_but_leaves_a_short_run_alone() -> None:
    noise = np.random.default_rng(0).standard_normal(2000)
    assert smooth(noise).std() < 0.25 * noise.std()
    assert smooth(noise[:20]).tolist() == noise[:20].tolist()
