import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config

from picogpt_jax.benchmarks import html_page, run_page
from picogpt_jax.benchmarks.run_report import FLOAT, History, Measurement
from picogpt_jax.int8.convert import TensorReport

CONFIG = tiny_config("data/a & b")
DEFAULTS = CONFIG.to_dict()
VAL = np.array([[0.0, 4.0, 8.0], [2.5, 1.25, 1.5]])
TRAIN = np.stack([np.arange(1.0, 9.0), np.linspace(2.5, 1.2, 8)])
HISTORY = History(
    workdir=Path("runs/<b>"),
    name="<b> & co",
    config=CONFIG,
    train=TRAIN,
    val=VAL,
    rate=np.stack([TRAIN[0], TRAIN[1] * 1e-3]),
    unit="bits per character",
    bits=1 / math.log(2),
    changes=[],
)
MEASUREMENT = Measurement(
    step=4,
    n_parameters=1000,
    n_bytes=1250,
    arithmetic="integer",
    is_trained=True,
    rows=[TensorReport("transformer.wte", (12, 16), (0.1, 0.2), 99, 41.25, 38.75, 240)],
    text="a text",
    losses={FLOAT: 1.5, "QAT forward pass": 1.50125, "int8 model": 1.50125},
    targets=(399, 400),
    prompt="\n",
    samples={FLOAT: "a <b> & c\x00", "QAT forward pass": "a <i> & c", "int8 model": "a <i> & c"},
)
OTHER = dataclasses.replace(
    HISTORY, name="other", config=tiny_config("data/a & b", train__seed=7), changes=[(4, "train.dtype")]
)


class Page(HTMLParser):
    """Checks that what is opened is closed, and gathers tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def attributes(self, name: str) -> list[str]:
        return [value for _, values in self.found for key, value in values.items() if key == name and value]


def parsed(*histories: History, measurement: Measurement = MEASUREMENT) -> Page:
    return Page(run_page.page([(history, measurement) for history in histories], DEFAULTS))


def test_the_headline_says_what_the_run_is() -> None:
    page = parsed(HISTORY)
    assert page.texts["h1"] == page.texts["title"][:1] == ["Training report: <b> & co"]
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert facts == {
        "Data": "a & b",
        "Parameters": "1,000",
        "Steps": "8 of 8, int8 QAT, mixed arithmetic",
        "Best validation loss": "1.2500 nats 1.803 bits per character, at step 4",
        "int8 model": "1,250 bytes 3.20 times smaller than float32",
    }


def test_samples_are_shown_to_the_letter() -> None:
    """HTML leaves out a line break that follows <pre>: the first one is not the prompt's."""
    page = parsed(HISTORY)
    assert page.texts["pre"] == ["\n\na <b> & c\ufffd", "\n\na <i> & c", "\n\na <i> & c"]
    assert page.texts["mark"] == ["i", "i"], "the first character that differs"
    assert page.texts["figcaption"] == [
        "float parameters",
        "QAT forward pass",
        "int8 model, the same text as of the QAT forward pass",
    ]


def test_a_line_break_that_differs_can_be_seen() -> None:
    samples = {FLOAT: "ab", "int8 model": "a\n"}
    page = parsed(HISTORY, measurement=dataclasses.replace(MEASUREMENT, samples=samples))
    assert page.texts["mark"] == ["\u23ce\n"]


def test_token_ids_without_a_text_have_no_samples() -> None:
    page = parsed(HISTORY, measurement=dataclasses.replace(MEASUREMENT, prompt="", samples={}))
    assert "No samples: its token ids stand for no text." in page.texts["p"]
    assert "pre" not in page.texts


def test_losses_stand_beside_those_of_the_float_parameters() -> None:
    page = parsed(HISTORY)
    assert "Loss on the first 399 of 400 targets of the validation text; checkpoint of step 4" in page.texts["caption"]
    cells = page.texts["td"]
    assert ["1.50125", f"{1.50125 / math.log(2):.4f}", "+0.00125"] == cells[6:9]
    page = parsed(HISTORY, measurement=dataclasses.replace(MEASUREMENT, losses={}, targets=(0, 0)))
    assert "No losses: the data are not at hand, data/a & b." in page.texts["p"]


def test_the_error_of_each_matrix_is_in_the_chart_and_in_a_table() -> None:
    page = parsed(HISTORY)
    assert page.texts["th"].count("wte") == 1
    at = page.texts["td"].index("12 × 16")
    assert page.texts["td"][at : at + 5] == ["12 × 16", "41.2", "38.8", "99 of 255", "240"]
    assert {"weights", "products"} <= set(page.attributes("class"))


def test_several_runs_are_overlaid() -> None:
    page = parsed(HISTORY, OTHER)
    classes = page.attributes("class")
    assert all(classes.count(f"{kind} r{style}") == 1 for kind in ("val", "smooth", "rate") for style in (0, 1))
    assert not any(name.startswith("raw") for name in classes), "the noise of several runs would hide all of them"
    assert page.texts["h3"] == 4 * ["<b> & co", "other"]
    assert "other, best 1.2500 nats at step 4" in page.texts["li"]
    drawn = {values["class"]: values["d"] for tag, values in page.found if tag == "path" and "class" in values}
    assert len(re.findall("[ML]", drawn["val r1"] or "")) == VAL.shape[1]
    assert len(re.findall("[ML]", drawn["smooth r0"] or "")) == TRAIN.shape[1]


def test_runs_of_other_tokens_share_no_axis_of_bits() -> None:
    assert parsed(HISTORY, OTHER).texts["text"].count("bits per character") == 1
    tokens = dataclasses.replace(OTHER, unit="bits per token")
    assert not any("bits" in text for text in parsed(HISTORY, tokens).texts["text"])


def test_what_differs_in_the_configuration_is_shown() -> None:
    page = parsed(HISTORY, OTHER)
    assert page.texts["caption"][-1] == "Keys in which the runs differ"
    assert (page.texts["th"][-1], page.texts["td"][-2:]) == ("train.seed", ["1337", "7"])
    assert "other, resumed at step 4: train.dtype" in page.texts["li"]
    alone = parsed(OTHER)
    assert (alone.texts["th"][-1], alone.texts["td"][-2:]) == ("train.seed", ["1337", "7"])
    assert parsed(HISTORY).texts["p"][-1] == "Keys that are not as in configs/base.py: none."


@pytest.mark.parametrize("histories", [[HISTORY], [HISTORY, OTHER]])
def test_the_page_needs_nothing_else(histories: list[History]) -> None:
    page = parsed(*histories)
    tags = {tag for tag, _ in page.found}
    assert not tags & {"script", "link", "img", "iframe", "object", "use", "image"}
    assert not page.attributes("src") + page.attributes("href")
    assert "url(" not in html_page.STYLE
    assert "@import" not in html_page.STYLE
    names = page.attributes("id")
    assert len(names) == len(set(names))
    assert {name for value in page.attributes("aria-labelledby") for name in value.split()} <= set(names)
    assert {f"url(#{name})" for name in names} >= set(page.attributes("clip-path"))


def test_every_class_has_a_style_and_dark_pages_change_every_colour() -> None:
    page = parsed(HISTORY, OTHER)
    used = {name for value in page.attributes("class") for name in value.split()} - {"numbers"}
    assert not {name for name in used if f".{name}" not in html_page.STYLE}
    light, dark, printed = (
        set(re.findall(r"(--\w+):#", block)) for block in re.findall(r":root\{(.*?)\}", html_page.STYLE, re.DOTALL)
    )
    assert light == dark == printed
