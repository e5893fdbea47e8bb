"""A training report as one HTML page, which needs nothing else: no script, no font, no picture from elsewhere."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from picogpt_jax.benchmarks.html_page import document, html_table, section, shown
from picogpt_jax.benchmarks.run_charts import bar_chart, decibels, short_name
from picogpt_jax.benchmarks.run_report import FLOAT, MARK, SAMPLING, History, Measurement
from picogpt_jax.formats.charts import MARKERS, Line, line_chart, swatch, thinned
from picogpt_jax.training.plot import loss_limits, smooth

MOST_RUNS = len(MARKERS)
Runs = Sequence[tuple[History, Measurement]]


def page(runs: Runs, defaults: Mapping[str, Mapping[str, Any]]) -> str:
    """The report of one run or several.

    Args:
        defaults: section -> key -> value of `configs/base.py`, which one run is compared with.
    """
    title = f"Training report: {', '.join(history.name for history, _ in runs)}"
    sections = [_facts(runs), _curves([history for history, _ in runs]), _losses(runs), _quantization(runs)]
    sections += [_samples(runs), _configuration([history for history, _ in runs], defaults)]
    return document(title, MARK, sections, "scripts/report.py")


def _facts(runs: Runs) -> str:
    found = []
    for style, (history, measured) in enumerate(runs):
        steps = int(max(curve[0].max() for curve in (history.train, history.val) if curve.size))
        smaller = 4 * measured.n_parameters / measured.n_bytes
        facts = [
            ("Data", history.dataset, ""),
            ("Parameters", f"{measured.n_parameters:,}", ""),
            ("Steps", f"{steps:,}", f"of {history.config.train.max_iters:,}, {_training(history)}"),
        ]
        if history.best:
            step, loss = history.best
            bits = f"{loss * history.bits:.3f} {history.unit}, at step {step:,}"
            facts.append(("Best validation loss", f"{loss:.4f} nats", bits))
        facts.append(("int8 model", f"{measured.n_bytes:,} bytes", f"{smaller:.2f} times smaller than float32"))
        cells = "".join(
            f"<div><dt>{name}</dt><dd>{shown(value)}{f' <small>{shown(more)}</small>' if more else ''}</dd></div>"
            for name, value, more in facts
        )
        found.append(f"{_run_heading(runs, style)}<dl>{cells}</dl>")
    return f'<section aria-label="Summary">{"".join(found)}</section>'


def _training(history: History) -> str:
    quant = history.config.quant
    return f"int8 QAT, {quant.arithmetic} arithmetic" if quant.mode == "int8" else "float training"


def _curves(histories: Sequence[History]) -> str:
    alone = len(histories) == 1
    lines, rates, legend, words = [], [], [], []
    for style, history in enumerate(histories):
        smoothed = history.train.copy()
        if smoothed.size:
            smoothed[1] = smooth(smoothed[1])
        if alone:  # the noise of several runs would hide all of them
            lines.append(Line(history.train, style, "raw", "training"))
        lines.append(Line(smoothed, style, "smooth", "training"))
        lines.append(Line(history.val, 1 if alone else style, "val", "validation" if alone else history.name))
        rates.append(Line(history.rate, style, "rate", history.name))
        best = f"best {history.best[1]:.4f} nats at step {history.best[0]:,}" if history.best else "not evaluated"
        name = "validation loss" if alone else history.name
        legend.append(f"<li>{swatch(1 if alone else style)}{shown(name)}, {best}</li>")
        first, last = (f"{smoothed[1, at]:.3f}" if smoothed.size else "nothing" for at in (0, -1))
        words.append(f"{history.name}: training loss from {first} to {last}, validation loss {best}.")
    limits = loss_limits((history.train, history.val) for history in histories)
    highest = max([float(line.curve[1].max()) for line in rates if line.curve.size], default=0.0) or 1.0
    units = {(history.unit, round(history.bits, 3)) for history in histories}
    (unit, bits), *others = units  # runs on texts of other tokens share no axis of bits
    title, rate_title = "Training and validation loss against the step", "Learning rate against the step"
    labels, right_unit = ("nats per token", "" if others else unit), None if others else 1 / bits
    losses = line_chart("losses", title, " ".join(words), lines, limits, labels, right_unit)
    rate = line_chart(
        "rates", rate_title, f"At most {highest:.3g}.", rates, (0.0, 1.05 * highest), ("learning rate", ""), None, 130
    )
    rows = [
        [f"{step:,.0f}", *(("" if (loss := history.get(step)) is None else f"{loss:.4f}") for history in columns)]
        for columns in [[dict(thinned(history.val).T.tolist()) for history in histories]]
        for step in sorted(set().union(*columns))
    ]
    table = html_table("Validation loss, nats per token", ["step", *(history.name for history in histories)], rows)
    noise = " Faint: each step that was logged." if alone else ""
    return section(
        "Loss curves",
        f'<ul class="legend">{"".join(legend)}</ul>'
        f'<p class="soft">With markers: validation. Without: training, a moving average.{noise} The steep first steps '
        "may leave the chart at the top.</p>",
        losses,
        rate,
        f"<details><summary>Validation losses as a table</summary>{table}</details>",
    )


def _losses(runs: Runs) -> str:
    parts = []
    for style, (history, measured) in enumerate(runs):
        parts.append(_run_heading(runs, style))
        if not measured.losses:
            parts.append(f"<p>No losses: the data are not at hand, {shown(history.config.data.dir)}.</p>")
            continue
        exact = measured.losses[FLOAT]
        rows = [
            [form, f"{loss:.5f}", f"{loss * history.bits:.4f}", "" if form == FLOAT else f"{loss - exact:+.5f}"]
            for form, loss in measured.losses.items()
        ]
        count, there = measured.targets
        which = "all" if count == there else f"the first {count:,} of"
        caption = f"Loss on {which} {there:,} targets of the validation text; checkpoint of step {measured.step:,}"
        parts.append(
            html_table(caption, ["form of the model", "nats per token", history.unit, "above float, nats"], rows)
        )
    return section("What int8 costs", *parts)


def _quantization(runs: Runs) -> str:
    parts = [
        "<p>How much of each matrix survives int8: the signal-to-noise ratio of its weights, and of its products as "
        "int8 models compute them. Higher is better; 20 dB is an error of a tenth, 40 dB of a hundredth.</p>"
        '<ul class="legend"><li><span class="box"></span>weights</li><li><span class="box light"></span>products; '
        "the number is theirs</li></ul>"
    ]
    for style, (history, measured) in enumerate(runs):
        worst = min(measured.rows, key=lambda row: math.inf if row.product_db is None else row.product_db)
        description = (
            f"{len(measured.rows)} matrices; the lowest ratio of products is {decibels(worst.product_db)} dB, in "
            f"{short_name(worst.name)}. The table below has all values."
        )
        title = f"Signal-to-noise ratio of each matrix of {history.name}"
        rows = [
            [
                short_name(row.name),
                f"{row.shape[0]} × {row.shape[1]}",
                decibels(row.sqnr_db),
                decibels(row.product_db) or "none",
                f"{row.codes_used} of 255",
                f"{row.n_bytes:,}",
            ]
            for row in measured.rows
        ]
        head = ["matrix", "shape", "weights, dB", "products, dB", "codes used", "bytes"]
        table = html_table(f"Products: of {measured.text}", head, rows)
        how = "The codes are those that the QAT forward pass multiplied."
        if not measured.is_trained:
            how = "The codes were made after the training, with LayerNorm weights in the matrices that follow them."
        parts.append(
            f'{_run_heading(runs, style)}<p class="soft">{how} Arithmetic: {measured.arithmetic}.</p>'
            f"{bar_chart(f'bars{style}', title, description, measured.rows)}"
            f"<details open><summary>The same as a table</summary>{table}</details>"
        )
    return section("Quantization error", *parts)


def _samples(runs: Runs) -> str:
    parts = [
        f"<p>The same prompt and the same seed ({SAMPLING.seed}), temperature {SAMPLING.temperature:g}. The first "
        "character that differs from the float parameters' text is marked; what follows it differs, too.</p>"
    ]
    for style, (_, measured) in enumerate(runs):
        texts = list(measured.samples.items())
        if not texts:
            parts.append(f"{_run_heading(runs, style)}<p>No samples: its token ids stand for no text.</p>")
            continue
        figures = []
        for index, (form, text) in enumerate(texts):
            equal = next((other for other, earlier in texts[:index] if earlier == text), None)
            note = f", the same text as of the {equal}" if equal else ""
            figures.append(
                f"<figure><figcaption>{form}{note}</figcaption>"
                f'<pre lang="">\n<b>{shown(measured.prompt)}</b>{_compared(text, texts[0][1])}</pre></figure>'
            )
        parts.append(f'{_run_heading(runs, style)}<div class="texts">{"".join(figures)}</div>')
    return section("Samples", *parts)


def _compared(text: str, other: str) -> str:
    at = next((at for at, (one, two) in enumerate(zip(text, other, strict=False)) if one != two), len(text))
    if at == len(text):
        return shown(text)
    marked = "\u23ce\n" if text[at] == "\n" else text[at]  # a line break has nothing to mark
    return f"{shown(text[:at])}<mark>{shown(marked)}</mark>{shown(text[at + 1 :])}"


def _configuration(histories: Sequence[History], defaults: Mapping[str, Mapping[str, Any]]) -> str:
    configs = [history.config.to_dict() for history in histories]
    compared = configs if len(configs) > 1 else [defaults, *configs]
    rows = [
        [f"{section}.{key}", *map(_value, values)]
        for section, keys in configs[0].items()
        for key in keys
        for values in [[config[section][key] for config in compared]]
        if any(value != values[0] for value in values)
    ]
    names = [history.name for history in histories]
    head = ["key", *(names if len(names) > 1 else ["default", "this run"])]
    what = "Keys in which the runs differ" if len(names) > 1 else "Keys that are not as in configs/base.py"
    table = html_table(what, head, rows, "words") if rows else f"<p>{what}: none.</p>"
    changes = [
        f"<li>{shown(history.name)}, resumed at step {step:,}: {shown(text)}</li>"
        for history in histories
        for step, text in history.changes
    ]
    return section("Configuration", table, f"<ul>{''.join(changes)}</ul>" if changes else "")


def _value(value: Any) -> str:
    return "none" if value is None else "(empty)" if value == "" else str(value)


def _run_heading(runs: Runs, style: int) -> str:
    """The name of a run, where there are several."""
    return f"<h3>{swatch(style)}{shown(runs[style][0].name)}</h3>" if len(runs) > 1 else ""
