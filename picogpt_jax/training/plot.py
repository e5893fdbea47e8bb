"""The loss curves of one or several runs as a PNG; and the style of every picture."""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from picogpt_jax.errors import UserError
from picogpt_jax.files import atomic_path
from picogpt_jax.training.metrics import Event, read_metrics

Metrics = str | os.PathLike[str] | Sequence[Event]
Curve = Float[np.ndarray, "2 _"]  # steps, losses in nats per token

SMOOTHING = 0.02  # width of the moving average over the training loss, as a part of the run
SETTLING = 0.02  # this part of the run may leave the plot at the top, so that the rest can be read
COLOURS = ("#3b6ea5", "#d1603d", "#4b9b6e", "#8d6cab", "#b59033", "#5f6b76")
STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#3a3f47",
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "text.color": "#22262c",
    "lines.linewidth": 1.3,
    "xtick.color": "#5a606a",
    "ytick.color": "#5a606a",
}


@contextlib.contextmanager
def styled_figure(width: float, height: float) -> Iterator[Any]:
    """A matplotlib Figure of so many inches, to be drawn on in the style of this project.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a plot needs matplotlib, which is not installed; pip install 'picogpt_jax[plot]'") from None
    with rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def save_png(figure: Any, png_path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Writes a matplotlib Figure."""
    with atomic_path(png_path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def plot_loss(metrics: Metrics | Mapping[str, Metrics], png_path: str | os.PathLike[str], title: str) -> None:
    """Draws training and validation loss against the step, in nats (left) and bits (right) per token.

    Args:
        metrics: the path of a `metrics.jsonl`, or its events; or label -> either, to compare several runs.
        png_path: the image to write.
        title: the line above the plot.

    Raises:
        UserError: matplotlib is missing, a file is not a `metrics.jsonl`, or a run has no loss to show.
    """
    save_png(loss_figure(metrics, title), png_path)


def loss_figure(metrics: Metrics | Mapping[str, Metrics], title: str) -> Any:
    """The matplotlib Figure that `plot_loss` saves; the same arguments and errors."""
    runs = metrics if isinstance(metrics, Mapping) else {"": metrics}
    with styled_figure(9, 5) as figure:
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter

        curves = {label: loss_curves(run, label) for label, run in runs.items()}
        axes: Any = figure.subplots()
        for index, (label, (train, val)) in enumerate(curves.items()):
            colour = COLOURS[index % len(COLOURS)]  # a run's own; a single run has one for each of its curves
            _draw_train(axes, train, label, colour, alone=len(curves) == 1)
            _draw_val(axes, val, label, COLOURS[1] if len(curves) == 1 else colour)
        axes.set(title=title, xlabel="step", ylabel="loss (nats per token)", ylim=loss_limits(curves.values()))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.margins(x=0.01)
        axes.grid(color="#e4e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        to_and_from_bits = (lambda nats: nats / math.log(2), lambda bits: bits * math.log(2))
        axes.secondary_yaxis("right", functions=to_and_from_bits).set_ylabel("bits per token")
        axes.legend(loc="upper right", edgecolor="none", framealpha=0.85)
    return figure


def _draw_train(axes: Any, train: Curve, label: str, colour: str, alone: bool) -> None:
    if not train.size:
        return
    steps, losses = train
    if alone:  # the noise of several runs would hide all of them
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(losses), color=colour, alpha=1.0 if alone else 0.5, label=f"{label} train".strip())


def _draw_val(axes: Any, val: Curve, label: str, colour: str) -> None:
    if not val.size:
        return
    steps, losses = val
    best_step, best = val[:, np.argmin(losses)]
    text = f"{label} validation, best {best:.4f} ({best / math.log(2):.3f} bits) at step {best_step:,.0f}".strip()
    markers = dict(marker="o", markersize=5, markeredgecolor="white", markeredgewidth=0.8)
    axes.plot(steps, losses, color=colour, linewidth=1.0, label=text, zorder=3, **markers)
    axes.plot(best_step, best, "o", markersize=11, markerfacecolor="none", markeredgecolor=colour, zorder=4)


def smooth(losses: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
    """A centred moving average over `SMOOTHING` of the points; at the ends, over as many of them as there are."""
    reach = min(round(len(losses) * SMOOTHING / 2), (len(losses) - 1) // 2)
    if reach < 1:
        return losses
    window = np.ones(2 * reach + 1)
    return np.convolve(losses, window, "same") / np.convolve(np.ones_like(losses), window, "same")


def loss_curves(run: Metrics, label: str) -> tuple[Curve, Curve]:
    """The training and the validation loss; a loss that was not finite (null) is left out."""
    events = read_metrics(run) if isinstance(run, str | os.PathLike) else run
    train, val = (
        np.array([(e["step"], e["loss"]) for e in events if e["split"] == split and e.get("loss") is not None], float)
        for split in ("train", "val")
    )
    if not train.size and not val.size:
        raise UserError(f"{label or 'the run'} has no loss to plot among {len(events)} events; train for longer first")
    return train.reshape(-1, 2).T, val.reshape(-1, 2).T


def curves_to_json(run: Metrics, most: int = 100) -> dict[str, dict[str, list[float]]]:
    """The loss curves in few numbers, which a model carries: the training loss smoothed; of each `most` points at most.

    Raises:
        UserError: as `plot_loss`.
    """
    train, val = loss_curves(run, "")
    found = {}
    for name, steps, losses in (("train", train[0], smooth(train[1])), ("val", *val)):
        kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), most)).round().astype(int))
        found[name] = {"step": steps[kept].astype(int).tolist(), "loss": losses[kept].round(4).tolist()}
    return found


def loss_limits(curves: Iterable[tuple[Curve, Curve]]) -> tuple[float, float]:
    """The range of the losses, without the first steep steps of each run."""
    shown = []
    for train, val in curves:
        both = np.concatenate([[train[0], smooth(train[1])], val], axis=1)
        start = train[0, int(SETTLING * train.shape[1])] if train.size else 0
        shown.append(both[1, both[0] >= start])
    losses = np.concatenate(shown)
    margin = 0.05 * max(np.ptp(losses), 1.0)
    return float(losses.min() - margin), float(losses.max() + margin)
