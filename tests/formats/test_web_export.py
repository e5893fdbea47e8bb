"""The page in a real browser: the texts and figures of every other runtime, also by keyboard, and no request."""

import dataclasses
import json
import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, chromium
from conftest import RunScript
from test_int8_model import random_model
from test_onnx_integer import by_numpy, random_integer_model

from picogpt_jax.errors import UserError
from picogpt_jax.formats import web_export
from picogpt_jax.formats.web_export import page, save_web
from picogpt_jax.int8.folder import save_int8_model
from picogpt_jax.int8.integer_model import IntegerModel
from picogpt_jax.runtimes import draws, loop
from picogpt_jax.text.vocabulary import TokenIds, Vocabulary

needs_browser = pytest.mark.skipif(
    chromium() is None and not os.environ.get("PICOGPT_REQUIRE_BROWSER"), reason="needs Chromium, such as Debian's"
)
DEFAULT: dict[str, Any] = dict(n_layer=3, n_head=4, n_embd=192, block_size=128, vocab_size=27, mlp_ratio=2)
CHARACTERS = "\n <&\"'é\U0001f600abcdefghijklmnopqrs"
TRAINING = {"dataset": "<b>Bacon</b> & eggs", "step": 8000, "val_loss": 1.5, "quantization_aware": True}
CONTROLS = ["prompt", "temperature", "top-k", "seed", "length", "write-button", "own", "measure-button"]


@pytest.fixture(scope="module")
def model() -> IntegerModel:
    """Of the default sizes; its logits are as far apart as a trained model's."""
    base = random_integer_model(**DEFAULT)
    base.tensors["transformer.wte.weight_exponent"][...] = -11
    return dataclasses.replace(base, vocabulary=Vocabulary(tuple(CHARACTERS)), training=TRAINING)


@pytest.fixture(scope="module")
def file(model: IntegerModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("web") / "page.html"
    assert save_web(model, path) == path.stat().st_size
    return path


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def browser(chrome: Browser, file: Path) -> Iterator[Browser]:
    """The page, ready; afterwards it has logged nothing, and asked for nothing but itself and its own worker."""
    opened(chrome, file)
    yield chrome
    assert wrong(chrome.events, file) == []


def opened(browser: Browser, path: Path) -> None:
    browser.open(path)
    browser.wait("!element('write-button').disabled")


def wrong(events: list[dict[str, Any]], file: Path) -> list[object]:
    """What was asked for beside the page and its worker, and what was logged."""
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert file.as_uri() in urls
    logged = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    others = [url for url in urls if url != file.as_uri() and not url.startswith("blob:")]
    return [*others, *(event for event in events if event["method"] in logged)]


def write(browser: Browser, prompt: str, **settings: object) -> str:
    """What the page writes behind a prompt."""
    values = {"prompt": prompt} | {name.replace("_", "-"): str(value) for name, value in settings.items()}
    browser.value(f"for (const [id, value] of Object.entries({json.dumps(values)})) element(id).value = value")
    browser.value("element('write').requestSubmit()")
    browser.wait("!isWriting")
    status = browser.value("element('write-status').textContent")
    assert re.match(rf"{settings['length']:,} characters, [\d,]+ characters a second", status), status
    print(status)
    text = browser.value("written.box.textContent")
    assert text.startswith(prompt)
    return text.removeprefix(prompt)


@needs_browser
@pytest.mark.parametrize(("temperature", "top_k", "seed"), [(0.8, 0, 1337), (1.25, 4, 1), (0, 0, 2**32 - 1)])
def test_the_text_is_that_of_the_loop(
    browser: Browser, model: IntegerModel, temperature: float, top_k: int, seed: int
) -> None:
    """Past the context; from prompts that are shorter and longer than it."""
    for prompt, length in (("é\U0001f600<&a\n", 200), ("abc \n" * 30, 20)):
        settings: dict[str, Any] = dict(temperature=temperature, top_k=top_k, seed=seed)
        ids = model.vocabulary.encode(prompt)[None]
        expected = loop.generate(by_numpy(model), ids, length, **settings, overflow="refill")[0, len(prompt) :]
        assert len(set(expected.tolist())) > 3 or temperature == 0
        assert write(browser, prompt, length=length, **settings) == model.vocabulary.decode(expected)


@needs_browser
def test_a_text_is_measured_as_evaluate_does(browser: Browser, model: IntegerModel) -> None:
    """In windows, of which the last one is shorter; what the model does not know is named, and left out."""
    ids = np.random.default_rng(0).integers(0, model.model.vocab_size, 300)
    text = model.vocabulary.decode(ids)
    browser.value(f"element('own').value = {json.dumps(text[:100] + 'Zü' + text[100:] + 'Z')}")
    browser.value("element('measure').requestSubmit()")
    browser.wait("!element('bits').hidden")
    expected = loop.evaluate(by_numpy(model), ids, model.model.block_size) / math.log(2)
    assert browser.value("measured.bits / 299") == pytest.approx(expected, rel=1e-9)
    assert browser.value("element('bits').textContent") == f"{expected:.4f} bits per character"
    status = browser.value("element('measure-status').textContent")
    assert status == "299 characters guessed. Skipped, as the model does not know them: “Z” (2×), “ü” (1×)."
    assert browser.value("measured.box.textContent") == text[:100] + "Zü" + text[100:] + "Z"

    logits_V = by_numpy(model).forward(ids[None, :128])[0, 41].astype(np.float64)
    chances_V = np.exp(logits_V - logits_V.max()) / np.exp(logits_V - logits_V.max()).sum()
    order = np.argsort(-logits_V, kind="stable")[:5]
    others, chances, bits, token = browser.value(
        "['others', 'chances', 'bits', 'token'].map((name) => measured.characters[41][name])"
    )
    assert others == order.tolist()
    np.testing.assert_allclose(chances, chances_V[order])
    assert (token, bits) == (ids[42], pytest.approx(-math.log2(chances_V[ids[42]])))
    browser.value("element('own').value = 'aZ'; element('measure').requestSubmit()")
    assert "at least two characters" in browser.value("element('measure-status').textContent")


@needs_browser
def test_it_stops_at_once_and_writes_again(browser: Browser) -> None:
    settings = dict(temperature=0.8, top_k=0, seed=5)
    expected = write(browser, "a", length=100, **settings)
    browser.value("element('length').value = 20000; element('write').requestSubmit()")
    assert browser.value("element('write-button').textContent") == "Stop"
    browser.value("element('write').requestSubmit()")
    assert not browser.value("isWriting")
    assert browser.value("element('write-status').textContent").startswith("Stopped after ")
    assert write(browser, "a", length=100, **settings) == expected
    browser.value("element('prompt').value = 'aZ'; element('write').requestSubmit()")
    assert browser.value("element('write-status').textContent").startswith("The model does not know “Z” (1×).")


@needs_browser
def test_the_keyboard_is_enough(browser: Browser) -> None:
    focus = "document.activeElement.id"
    for name in CONTROLS[:6]:
        browser.press("Tab")
        assert browser.value(focus) == name
    browser.press("Enter", "\r")
    browser.wait("written.characters.length === 500 && !isWriting")
    browser.press("Tab")
    assert browser.value(focus) == "written"
    browser.settle()
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.value("[written.current, element('tip').hidden]") == [1, False]
    assert re.search(r"[\d.]+ %, [\d.]+ bits", browser.value("element('announce').textContent"))
    browser.press("Escape")
    assert browser.value("element('tip').hidden")
    for name in CONTROLS[6:]:
        browser.press("Tab")
        assert browser.value(focus) == name


@needs_browser
def test_a_character_tells_what_else_was_likely(browser: Browser) -> None:
    """To a mouse that is above it, and to a finger that has been there; and the text can be copied as it is."""
    write(browser, "a", length=50, temperature=1, top_k=0, seed=0)
    at = "written.characters[7].span.getBoundingClientRect()"
    browser.value("written.box.scrollIntoView({ block: 'center' })")
    browser.settle()
    x, y = browser.value(f"[{at}.x + 2, {at}.y + 8]")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    browser.wait("written.current === 7 && !element('tip').hidden")
    assert browser.value("element('tip').querySelectorAll('li').length") == 5
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    browser.wait("element('tip').hidden")
    for points in ([{"x": x, "y": y}], []):
        browser.call("Input.dispatchTouchEvent", type="touchStart" if points else "touchEnd", touchPoints=points)
    browser.wait("!element('tip').hidden")
    browser.value("getSelection().selectAllChildren(written.box)")
    assert browser.value("getSelection().toString()").rstrip() == browser.value("written.box.textContent.trimEnd()")


@needs_browser
def test_everything_has_a_name_and_fits_a_narrow_screen(browser: Browser) -> None:
    roles = ("textbox", "slider", "spinbutton", "button", "image", "group")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    shown = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert len(shown) > len(CONTROLS)
    assert [node for node in shown if not node.get("name", {}).get("value")] == []
    for width in (320, 375, 1280):
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        assert browser.value("document.documentElement.scrollWidth") <= width
    browser.call("Emulation.clearDeviceMetricsOverride")


@needs_browser
def test_it_has_two_themes_and_a_narrow_form(browser: Browser, tmp_path: Path) -> None:
    """The pictures stay in the test's folder, for people to look at."""
    write(browser, "a", length=200, temperature=1, top_k=0, seed=0)
    pictures = {}
    for width in (1280, 375):
        for theme in ("light", "dark"):
            browser.screenshot(tmp_path / f"{theme}_{width}.png", width, theme)
            pictures[theme, width] = (tmp_path / f"{theme}_{width}.png").read_bytes()
            assert struct.unpack(">I", pictures[theme, width][16:20]) == (width,)
    assert len(set(pictures.values())) == 4


@needs_browser
def test_a_temperature_becomes_the_integer_of_every_runtime(browser: Browser) -> None:
    spread = np.exp(np.random.default_rng(0).uniform(-12, 12, 300)).tolist()
    temperatures = [0.05, 0.8, 1.0, 2.0, 1e-320, 1e-30, 189097.0, 2 * 189097.0, 378193.0, 1e30, *spread]
    temperatures += [131072 * math.log2(math.e) / half for half in (0.5, 1.5, 2.5, 100.5)]
    expected = [int(draws.Scale.of(value).multiplier) for value in temperatures]
    assert browser.value(f"{temperatures!r}.map(multiplierOf)") == expected


@needs_browser
def test_the_policy_lets_nothing_be_loaded(chrome: Browser, file: Path) -> None:
    opened(chrome, file)
    for url in ("data:,x", "http://127.0.0.1:9/"):
        assert chrome.value(f"fetch('{url}').then(() => true, () => false)") is False
    blocked = [e["params"]["entry"]["text"] for e in chrome.events if e["method"] == "Log.entryAdded"]
    assert sum("Content Security Policy" in text for text in blocked) >= 2
    assert wrong(chrome.events, file), "the check of the other tests finds it"


@needs_browser
@pytest.mark.parametrize("command", web_export._compilers(), ids=lambda command: command[0].rsplit("/", 1)[-1])
def test_every_kind_of_model_computes_what_numpy_does(
    chrome: Browser, tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page compares a digest of logits and draws before it is ready; with each compiler."""
    monkeypatch.setattr(web_export, "_compilers", lambda: [command])
    for number, case in enumerate(({"bias": True, "activation": "relu"}, {"kind": "wild", "bias": True, "n_embd": 24})):
        model = random_integer_model("per_tensor" if number else "per_channel", **case)
        save_web(model, tmp_path / "page.html")
        opened(chrome, tmp_path / "page.html")
    monkeypatch.setattr(web_export, "logits_digest", lambda model: 1)
    save_web(random_integer_model(), tmp_path / "page.html")
    chrome.open(tmp_path / "page.html")
    chrome.wait("element('write-status').textContent.includes('it computes other numbers than it should')")
    assert chrome.value("element('write-button').disabled")


def test_the_page_is_small_and_names_no_other(file: Path) -> None:
    content = file.read_text("utf-8")
    assert len(content.encode()) <= 1_500_000
    words = re.sub(r"[\w+/=]{1000,}", "", content)  # without the weights
    assert re.findall(r"(?i)https?:|//[a-z]|\bsrc=|\bhref=|@import|\burl\(", words) == []
    assert "&lt;b&gt;Bacon&lt;/b&gt; &amp; eggs" in content
    assert "<b>Bacon" not in content


def test_what_a_page_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_integer_model()
    with pytest.raises(UserError, match="the vocabulary of 11 tokens is not of characters, which a page shows"):
        save_web(dataclasses.replace(model, vocabulary=TokenIds.of_size(11, "ids")), tmp_path / "new.html")
    (tmp_path / "mine.html").write_text("<html>my notes</html>")
    with pytest.raises(UserError, match="is another file than a page, which would be replaced; name a new one"):
        save_web(model, tmp_path / "mine.html")
    with pytest.raises(UserError, match=f"{tmp_path} is a folder"):
        save_web(model, tmp_path)
    monkeypatch.setattr(web_export, "_compilers", list)
    with pytest.raises(UserError, match=r"found neither ziglang nor clang with wasm-ld; .* 'picogpt_jax\[c\]'"):
        save_web(model, tmp_path / "new.html")
    monkeypatch.setattr(web_export, "_compilers", lambda: [["false"]])
    with pytest.raises(UserError, match="false cannot compile picogpt"):
        save_web(model, tmp_path / "new.html")
    monkeypatch.setattr(web_export, "LARGEST", 1 << 10)
    with pytest.raises(UserError, match=r"a page with the model's [\d,]+ bytes would have more than"):
        save_web(model, tmp_path / "new.html")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.html"]


def test_convert_py_writes_a_page_and_replaces_it(run_script: RunScript, tmp_path: Path) -> None:
    save_int8_model(random_integer_model(), tmp_path / "integer")
    page_file = tmp_path / "page.html"
    page_file.write_text(page(random_integer_model(n_layer=1)), encoding="utf-8")
    done = run_script("scripts/convert.py", "--input=integer", "--to=web", "--output=page.html")
    assert done.stdout.startswith(f"wrote page.html: a page of {page_file.stat().st_size:,} bytes"), done.stderr
    save_int8_model(random_model(), tmp_path / "mixed")
    done = run_script("scripts/convert.py", "--input=mixed", "--to=web", "--output=other.html")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "--arithmetic=integer" in done.stderr
    assert not (tmp_path / "other.html").exists()
