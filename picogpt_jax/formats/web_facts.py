"""What a page says about its model, as HTML, from what the int8 folder carries: an older folder says less."""

import math
from collections.abc import Iterator
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt_jax.formats.charts import Line, line_chart, swatch
from picogpt_jax.int8.integer_model import IntegerModel
from picogpt_jax.training.plot import Curve, loss_limits

KINDS = {
    "transformer.wte": "characters",
    "transformer.wpe": "positions",
    "attn.c_attn": "attention, in",
    "attn.c_proj": "attention, out",
    "mlp.c_fc": "network, in",
    "mlp.c_proj": "network, out",
}
LARGEST = 1e9  # of a step or a loss
BARS, BAR_WIDTH, BAR_HEIGHT = 51, 3, 24  # of the counts of codes: five codes a bar


def facts(model: IntegerModel) -> str:
    """The section's contents: figures, the curve of the training, the matrices."""
    return "\n".join([_figures(model), *_curve(model.training.get("curve")), _matrices(model)])


def _figures(model: IntegerModel) -> str:
    config, training = model.model, model.training
    step, loss = training.get("step"), training.get("val_loss")
    found = [("Learned from", str(training.get("dataset") or "a text of its own"), "")]
    if isinstance(step, int):
        how = "in the arithmetic of this page" if training.get("quantization_aware") else "in floating point"
        found.append(("Training", f"{step:,} steps", how))
    if isinstance(loss, float):
        nats = f"per character of unseen text; {loss:.4f} nats"
        found.append(("Loss", f"{loss / math.log(2):.3f} bits", nats))
    small = f"{4 * config.n_parameters / model.n_bytes:.1f} times smaller than in floating point"
    found += [
        ("Size", f"{model.n_bytes:,} bytes", small),
        ("Parameters", f"{config.n_parameters:,}", f"{100 * config.int8_share:.1f} % of them are int8"),
        ("Shape", f"{config.n_layer} layers", f"of {config.n_head} heads, {config.n_embd} wide"),
    ]
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{escape(value)}{f'<small>{escape(note)}</small>' if note else ''}</dd></div>"
        for name, value, note in found
    )
    return f"<dl>{cells}</dl>"


def _curve(notes: Any) -> Iterator[str]:
    """The chart of the training, where the notes are what quantize.py writes."""
    try:
        train, val = (_points(notes[name]) for name in ("train", "val"))
        limits = loss_limits([(train, val)])
    except (KeyError, TypeError, ValueError, OverflowError):
        return
    lines = [Line(train, 0, "smooth", "training"), Line(val, 1, "val", "validation")]
    words = "; ".join(
        f"{line.name} from {line.curve[1, 0]:.2f} to {line.curve[1, -1]:.2f}" for line in lines if line.curve.size
    )
    chart = line_chart(
        "curve", "Loss against the step of the training", words, lines, limits, ("nats", "bits"), math.log(2), 300
    )
    yield "<h3>How it learned</h3>"
    yield (
        "<p>The loss is how surprised the model is by the next character. It falls while the model trains. The curve "
        f"with marks is of text that it never trains on.</p>{chart}"
        f'<p class="soft legend">{swatch(1)}validation <span class="dash"></span>training, smoothed</p>'
    )


def _points(curve: dict[str, Any]) -> Curve:
    points = np.array([curve["step"], curve["loss"]], float).reshape(2, -1)
    if not (np.abs(points) < LARGEST).all():
        raise ValueError("no step, or no loss")
    return points


def _matrices(model: IntegerModel) -> str:
    errors = model.training.get("weight_errors")
    errors = errors if isinstance(errors, dict) else {}
    rows = []
    for name, matrix in model.matrices.items():
        error = errors.get(name)
        shown = f"{100 * error:.1f} %" if isinstance(error, float) else ""
        cells = f"<td>{_counts(matrix.codes)}</td><td>{len(np.unique(matrix.codes))}</td>"
        cells += f"<td>{shown}</td>" if errors else ""
        rows.append(f'<tr><th scope="row">{_shown(name)}</th>{cells}</tr>')
    head = '<th scope="col">how often each code occurs</th><th scope="col">codes used</th>'
    head += '<th scope="col">error</th>' if errors else ""
    lost = " The error is what rounding to them lost of the numbers it was trained with." if errors else ""
    return (
        "<h3>What it is made of</h3>"
        f"<p>Tables of whole numbers from −127 to 127, the codes, which a row's power of two scales.{lost}</p>"
        f'<div class="wide"><table><thead><tr><th scope="col">table</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _shown(name: str) -> str:
    """transformer.h.0.attn.c_attn -> layer 1: attention, in."""
    if name in KINDS:
        return KINDS[name]
    layer, kind = name.removeprefix("transformer.h.").split(".", 1)
    return f"<span>layer {int(layer) + 1}</span> {KINDS[kind]}"


def _counts(codes: npt.NDArray[np.int8]) -> str:
    """A small chart of how often codes occur."""
    counts = np.histogram(codes, BARS, (-127.5, 127.5))[0]
    heights = np.ceil(counts * (BAR_HEIGHT / counts.max())).astype(int)
    bars = "".join(
        f"M{BAR_WIDTH * at},{BAR_HEIGHT}v-{height}h{BAR_WIDTH - 1}v{height}z" for at, height in enumerate(heights)
    )
    label = f"codes from {codes.min()} to {codes.max()}; half of them within {int(np.median(np.abs(codes)))} of 0"
    size = f'viewBox="0 0 {BARS * BAR_WIDTH - 1} {BAR_HEIGHT}" width="{BARS * BAR_WIDTH - 1}" height="{BAR_HEIGHT}"'
    return f'<svg class="counts" {size} role="img" aria-label="{label}"><path d="{bars}"/></svg>'
