"""What the HTML pages of this room share; they need nothing else: no script, no font, no picture from elsewhere."""

import re
from collections.abc import Iterable, Sequence
from html import escape

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


def document(title: str, mark: str, sections: Iterable[str], maker: str) -> str:
    """The page.

    Args:
        mark: an element that tells a page of this kind from others, see `picogpt_jax.files.check_own_page`.
        maker: the script that made it.
    """
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f"{mark}\n<title>{shown(title)}</title>",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{shown(title)}</h1>",
            *sections,
            f"</main>\n<footer>Made by {maker} of picogpt_jax. The page is whole: it loads nothing.</footer>",
            "</body>\n</html>\n",
        ]
    )


def section(heading: str, *parts: str) -> str:
    """Parts of a page under a heading."""
    name = heading.lower().replace(" ", "-")
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{heading}</h2>\n' + "\n".join(parts) + "\n</section>"


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """A table as HTML; `kind` is numbers, or words, which are broken into lines."""
    body = "\n".join(
        f'<tr><th scope="row">{shown(first)}</th>{"".join(f"<td>{shown(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    top = "".join(f'<th scope="col">{shown(cell)}</th>' for cell in head)
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{shown(caption)}"><table class="{kind}">'
        f"<caption>{shown(caption)}</caption><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def shown(text: str) -> str:
    """Text as HTML; a replacement character for what no page can hold."""
    return escape(NOT_SHOWN.sub("\ufffd", text))
