"""A training report as one HTML page, which needs nothing else: no script, no font, no picture from elsewhere."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from picogpt_jax.benchmarks.run_charts import bar_chart, decibels, short_name
from picogpt_jax.benchmarks.run_report import FLOAT, MARK, SAMPLING, History, Measurement
from picogpt_jax.formats.charts import MARKERS, Line, line_chart, swatch, thinned
from picogpt_jax.training.plot import loss_limits, smooth

MOST_RUNS = len(MARKERS)
Runs = Sequence[tuple[History, Measurement]]

# Colours: Okabe and Ito's, which colour-blind people tell apart, darker on white and lighter on black.
STYLE = """
:root{color-scheme:light dark;--page:#fff;--text:#1d2126;--soft:#59616b;--line:#dde1e6;--card:#f5f6f8;--mark:#ffe08a;
--r0:#0069a8;--r1:#c44e00;--r2:#007a5a;--r3:#a8457f;--r4:#7a6200;--r5:#3f474f}
@media(prefers-color-scheme:dark){:root{--page:#14171a;--text:#e6e9ec;--soft:#a3acb5;--line:#363c43;--card:#1e2226;
--mark:#705600;--r0:#56b4e9;--r1:#ff9a57;--r2:#2fc49a;--r3:#e59ac6;--r4:#e8d44d;--r5:#c3cad1}}
.r0{--run:var(--r0)}.r1{--run:var(--r1)}.r2{--run:var(--r2)}.r3{--run:var(--r3)}.r4{--run:var(--r4)}.r5{--run:var(--r5)}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 3rem;max-width:62rem;background:var(--page);color:var(--text);
font:1rem/1.5 system-ui,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 1rem}h2{font-size:1.25rem;margin:2.5rem 0 .5rem}
h3{font-size:1rem;margin:1.5rem 0 .5rem}h1,h2,h3{overflow-wrap:anywhere}p{max-width:46rem;margin:.5rem 0}
.soft,figcaption,dt,footer{color:var(--soft);font-size:.875rem}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.5rem;margin:0 0 1rem}
dl div{background:var(--card);padding:.6rem .8rem;border-radius:.4rem}
dd{margin:0;font-size:1.15rem;font-weight:600;overflow-wrap:anywhere}dd small{display:block;font-weight:400}
.legend{list-style:none;margin:.5rem 0;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1.5rem}
.swatch{width:.9rem;height:.9rem;vertical-align:-.1rem;margin-right:.35rem;fill:var(--run)}
.box{display:inline-block;width:1rem;height:.7rem;margin-right:.35rem;border:1px solid var(--r0);background:var(--r0)}
.box.light{background:none}
.chart{display:block;width:100%;height:auto;margin:.5rem 0;overflow:visible}
.chart text{font-size:13px;fill:var(--soft)}
.chart path{vector-effect:non-scaling-stroke}
.grid{stroke:var(--line)}.axis{stroke:var(--soft)}.limit{stroke:var(--r1);stroke-dasharray:5 4}
.raw,.smooth,.val,.rate{fill:none;stroke:var(--run);stroke-linejoin:round}
.raw{stroke-width:1;opacity:.35}.smooth{stroke-width:1.2}.val{stroke-width:1.5}.rate{stroke-width:1.5}
.smooth.r1,.rate.r1{stroke-dasharray:7 3}.smooth.r2,.rate.r2{stroke-dasharray:2 3}
.smooth.r3,.rate.r3{stroke-dasharray:9 3 2 3}.smooth.r4,.rate.r4{stroke-dasharray:4 2}
.smooth.r5,.rate.r5{stroke-dasharray:12 4}
.marker path{fill:var(--run);stroke:var(--page);stroke-width:.8}
.weights{fill:var(--r0);stroke:var(--r0)}.products{fill:none;stroke:var(--r0)}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .9rem .3rem 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}thead th{color:var(--soft);font-weight:600;vertical-align:bottom}
tbody th{font-weight:400}caption{text-align:left;color:var(--soft);padding-bottom:.3rem}
.words td,.words th{text-align:left;white-space:normal;overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--soft)}
.texts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(16rem,100%),1fr));gap:1rem}
figure{margin:0;min-width:0}
pre{margin:.3rem 0 0;padding:.8rem;background:var(--card);border-radius:.4rem;font:.85rem/1.45 ui-monospace,monospace;
white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext}
mark{background:var(--mark);color:inherit}
footer{margin-top:3rem;border-top:1px solid var(--line);padding-top:.5rem}
@media(max-width:40rem){.chart text{font-size:22px}}
@media print{body{max-width:none;padding:0;font-size:10pt}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.chart,figure,dl,tr{break-inside:avoid}h2,h3{break-after:avoid}pre{font-size:8pt}.wide{overflow:visible}}
@media print and (prefers-color-scheme:dark){:root{--page:#fff;--text:#000;--soft:#444;--line:#ccc;--card:#f5f6f8;
--mark:#ffe08a;--r0:#0069a8;--r1:#c44e00;--r2:#007a5a;--r3:#a8457f;--r4:#7a6200;--r5:#3f474f}}
"""
# No page can hold these: control characters, and halves of surrogate pairs.
NOT_SHOWN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def page(runs: Runs, defaults: Mapping[str, Mapping[str, Any]]) -> str:
    """The report of one run or several.

    Args:
        defaults: section -> key -> value of `configs/base.py`, which one run is compared with.
    """
    title = f"Training report: {', '.join(history.name for history, _ in runs)}"
    sections = [_facts(runs), _curves([history for history, _ in runs]), _losses(runs), _quantization(runs)]
    sections += [_samples(runs), _configuration([history for history, _ in runs], defaults)]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f"{MARK}\n<title>{_shown(title)}</title>",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{_shown(title)}</h1>",
            *sections,
            "</main>\n<footer>Made by scripts/report.py of picogpt_jax. The page is whole: it loads nothing.</footer>",
            "</body>\n</html>\n",
        ]
    )


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
            f"<div><dt>{name}</dt><dd>{_shown(value)}{f' <small>{_shown(more)}</small>' if more else ''}</dd></div>"
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
        legend.append(f"<li>{swatch(1 if alone else style)}{_shown(name)}, {best}</li>")
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
    table = _table("Validation loss, nats per token", ["step", *(history.name for history in histories)], rows)
    noise = " Faint: each step that was logged." if alone else ""
    return _section(
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
            parts.append(f"<p>No losses: the data are not at hand, {_shown(history.config.data.dir)}.</p>")
            continue
        exact = measured.losses[FLOAT]
        rows = [
            [form, f"{loss:.5f}", f"{loss * history.bits:.4f}", "" if form == FLOAT else f"{loss - exact:+.5f}"]
            for form, loss in measured.losses.items()
        ]
        count, there = measured.targets
        which = "all" if count == there else f"the first {count:,} of"
        caption = f"Loss on {which} {there:,} targets of the validation text; checkpoint of step {measured.step:,}"
        parts.append(_table(caption, ["form of the model", "nats per token", history.unit, "above float, nats"], rows))
    return _section("What int8 costs", *parts)


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
        table = _table(f"Products: of {measured.text}", head, rows)
        how = "The codes are those that the QAT forward pass multiplied."
        if not measured.is_trained:
            how = "The codes were made after the training, with LayerNorm weights in the matrices that follow them."
        parts.append(
            f'{_run_heading(runs, style)}<p class="soft">{how} Arithmetic: {measured.arithmetic}.</p>'
            f"{bar_chart(f'bars{style}', title, description, measured.rows)}"
            f"<details open><summary>The same as a table</summary>{table}</details>"
        )
    return _section("Quantization error", *parts)


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
                f'<pre lang="">\n<b>{_shown(measured.prompt)}</b>{_compared(text, texts[0][1])}</pre></figure>'
            )
        parts.append(f'{_run_heading(runs, style)}<div class="texts">{"".join(figures)}</div>')
    return _section("Samples", *parts)


def _compared(text: str, other: str) -> str:
    at = next((at for at, (one, two) in enumerate(zip(text, other, strict=False)) if one != two), len(text))
    if at == len(text):
        return _shown(text)
    shown = "\u23ce\n" if text[at] == "\n" else text[at]  # a line break has nothing to mark
    return f"{_shown(text[:at])}<mark>{_shown(shown)}</mark>{_shown(text[at + 1 :])}"


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
    table = _table(what, head, rows, "words") if rows else f"<p>{what}: none.</p>"
    changes = [
        f"<li>{_shown(history.name)}, resumed at step {step:,}: {_shown(text)}</li>"
        for history in histories
        for step, text in history.changes
    ]
    return _section("Configuration", table, f"<ul>{''.join(changes)}</ul>" if changes else "")


def _value(value: Any) -> str:
    return "none" if value is None else "(empty)" if value == "" else str(value)


def _run_heading(runs: Runs, style: int) -> str:
    """The name of a run, where there are several."""
    return f"<h3>{swatch(style)}{_shown(runs[style][0].name)}</h3>" if len(runs) > 1 else ""


def _section(heading: str, *parts: str) -> str:
    name = heading.lower().replace(" ", "-")
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{heading}</h2>\n' + "\n".join(parts) + "\n</section>"


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    body = "\n".join(
        f'<tr><th scope="row">{_shown(first)}</th>{"".join(f"<td>{_shown(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    top = "".join(f'<th scope="col">{_shown(cell)}</th>' for cell in head)
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{_shown(caption)}"><table class="{kind}">'
        f"<caption>{_shown(caption)}</caption><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _shown(text: str) -> str:
    """Text as HTML; a replacement character for what no page can hold."""
    return escape(NOT_SHOWN.sub("\ufffd", text))
