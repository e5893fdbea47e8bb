import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import bs4
import essays
import pytest

from picogpt_jax import __version__
from picogpt_jax.errors import UserError
from picogpt_jax.text.download import FetchError

INDEX = """<html><title>Essays</title><body>
<map name=menu><area href="index.html"><area href="bio.html"></map><a href="index.html">Home</a>
<table><tr><td><a href="great.html">Great Work</a><tr><td><a href='/words.html#top'>Putting Ideas into Words</a>
<tr><td><a href=great.html>again</a> <a href="rss.html">RSS</a> <a href="https://elsewhere.example/far.html">Far</a>
<tr><td><a href="acl.txt">A text</a> <a href="sub/deep.html">Deep</a> <a name=x>No link</a>
<a href="http://[">Broken</a> <a href="mailto:x@example.com">Mail</a> <A HREF="caf%65.html">Odd</A>
<a href="lies.html">"""
GREAT = b"<title>Great</title><table><td><font size=2>July 2023<br><br>If you collected\nlists of techniques.<br><br>"
WORDS = "<p>Writing about “something” — even na\u00efve</p>".encode()
LIES = b"<p>Lies we tell kids</p>"
HANGS = None


class Site(ThreadingHTTPServer):
    """An essay site on the loopback interface that notes who asked for what."""

    daemon_threads = False  # `server_close` joins the threads: nothing outlives the test

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        # What each request gets: a body, a status, or no answer. A page's last entry is given again and again.
        self.answers: dict[str, list[bytes | int | None]] = {
            "/articles.html": [INDEX.encode()],
            "/great.html": [GREAT],
            "/words.html": [WORDS],
            "/lies.html": [LIES],
        }
        self.requested: list[str] = []
        self.user_agents: set[str] = set()
        self.is_over = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.requested.append(self.path)
        self.server.user_agents.add(self.headers["User-Agent"])
        answers = self.server.answers.get(self.path, [404])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer is HANGS:
            self.server.is_over.wait(timeout=30)
            return
        self.send_response(answer if isinstance(answer, int) else 200)
        self.end_headers()
        self.wfile.write(b"" if isinstance(answer, int) else answer)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.is_over.set()
        server.shutdown()
        thread.join()


def fetch(site: Site, folder: Path, **settings: Any) -> essays.Essays:
    return essays.fetch_essays(
        folder, site.url, **{"delay_seconds": 0.0, "retries": 1, "backoff_seconds": 0.0, **settings}
    )


def test_the_essays_of_the_index_are_fetched_in_its_order(site: Site, tmp_path: Path) -> None:
    found = fetch(site, tmp_path)
    assert site.requested == ["/articles.html", "/great.html", "/words.html", "/lies.html"]
    assert [agent.split()[0] for agent in site.user_agents] == [f"picogpt_jax/{__version__}"]
    assert found == essays.Essays(
        texts={
            f"{site.url}great.html": "Great\n\nJuly 2023\n\nIf you collected lists of techniques.",
            f"{site.url}words.html": 'Writing about "something" -- even naive',
            f"{site.url}lies.html": "Lies we tell kids",
        },
        failures={},
    )
    assert (tmp_path / "great.html").read_bytes() == GREAT


def test_a_second_run_asks_only_for_what_is_missing(site: Site, tmp_path: Path) -> None:
    site.answers["/words.html"] = [404, WORDS]
    first = fetch(site, tmp_path)
    assert list(first.failures) == [f"{site.url}words.html"]
    site.requested.clear()
    second = fetch(site, tmp_path)
    assert site.requested == ["/words.html"]
    assert list(second.texts) == [f"{site.url}{name}.html" for name in ("great", "words", "lies")]
    fetch(site, tmp_path)
    assert site.requested == ["/words.html"]


def test_every_page_without_a_text_is_reported_with_its_reason(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.answers["/great.html"] = [404]
    site.answers["/words.html"] = [HANGS]
    site.answers["/lies.html"] = [503, LIES]  # passing: not a failure
    found = fetch(site, tmp_path, timeout_seconds=0.2)
    assert essays.join_essays(found) == "Lies we tell kids\n"
    report = capsys.readouterr().out
    assert "got 1 of 3 essays" in report
    assert f"could not get {site.url}great.html: HTTP status 404 Not Found" in report
    assert f"could not get {site.url}words.html: " in report
    assert "Read timed out" in report
    assert site.requested.count("/great.html") == 1  # 404 is final
    assert site.requested.count("/words.html") == 2
    assert site.requested.count("/lies.html") == 2


def test_a_page_that_holds_no_text_is_not_kept(site: Site, tmp_path: Path) -> None:
    site.answers["/great.html"] = [b"<img src=title.gif>", GREAT]
    assert fetch(site, tmp_path).failures == {f"{site.url}great.html": "the page holds nothing of use"}
    assert fetch(site, tmp_path).failures == {}


def test_a_page_that_the_parser_rejects_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(markup: str, parser: str) -> None:  # which markup html.parser rejects differs between Python releases
        raise bs4.builder.ParserRejectedMarkup(markup)

    monkeypatch.setattr(bs4, "BeautifulSoup", reject)
    with pytest.raises(FetchError, match="its HTML cannot be parsed"):
        essays.page_text(GREAT)


def test_only_so_many_essays_are_taken(site: Site, tmp_path: Path) -> None:
    assert list(fetch(site, tmp_path, max_essays=1).texts) == [f"{site.url}great.html"]
    assert site.requested == ["/articles.html", "/great.html"]


def test_there_is_a_pause_between_requests_and_none_without(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    (tmp_path / "words.html").write_bytes(WORDS)
    fetch(site, tmp_path, delay_seconds=7.0)
    assert site.requested == ["/articles.html", "/great.html", "/lies.html"]
    assert pauses == [7.0, 7.0]


@pytest.mark.parametrize(
    ("index", "reason"),
    [(404, "HTTP status 404 Not Found"), (b"<p>Please log in</p>", "the page holds nothing of use")],
)
def test_without_an_index_there_is_a_way_out(site: Site, tmp_path: Path, index: bytes | int, reason: str) -> None:
    site.answers["/articles.html"] = [index]
    with pytest.raises(
        UserError, match=rf"list of essays from {site.url}articles\.html: {reason}; .*--input_file=TEXT"
    ):
        fetch(site, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_any_essay_there_is_a_way_out() -> None:
    with pytest.raises(UserError, match=r"none of 2 essays could be fetched; .*--input_file=TEXT"):
        essays.join_essays(essays.Essays({}, {"a": "HTTP status 404", "b": "HTTP status 404"}))


def test_a_cache_that_cannot_be_written_is_no_failure_of_a_page(site: Site, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"cannot write .*cache.articles\.html: .*; choose a folder"):
        fetch(site, tmp_path / "cache")


def test_a_missing_package_names_the_extra(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bs4", None)
    with pytest.raises(UserError, match=r"package bs4 is missing; run: pip install 'picogpt_jax\[data\]'"):
        fetch(site, tmp_path)


def test_links_are_found_with_and_without_www() -> None:
    index = b'<a href="http://paulgraham.com/a.html">a</a><a href="https://www.paulgraham.com/b.html">b</a>'
    found = essays.essay_urls(index, "https://www.paulgraham.com/articles.html")
    assert found == ["https://www.paulgraham.com/a.html", "https://www.paulgraham.com/b.html"]


@pytest.mark.parametrize(
    ("html", "text"),
    [
        (b"<p>one<p>two<div>three</div>four", "one\n\ntwo\n\nthree\n\nfour"),
        (b"one <br> two<br><br><br><br>three", "one\ntwo\n\nthree"),
        (b"a <b>bold</b> and <i>wrapped\n line</i>&nbsp;&nbsp;here", "a bold and wrapped line here"),
        (b"<p>(code)</p><pre>\n(def x\n   (y  z))\n</pre>", "(code)\n\n(def x\n   (y  z))"),
        (b"<script>var x = 1;</script><style>p {}</style>text<!-- comment -->", "text"),
        (b"1. not a list<br>- nor this * and_that_ \\o/", "1. not a list\n- nor this * and_that_ \\o/"),
        (b"<p <b>x</i></p></table><font>unclosed &amp broken &lt; &#8212; end", "x\n\nunclosed & broken < -- end"),
        (b"<font>" * 5000 + b"deep", "deep"),
        (b"caf\xe9 \x93quoted\x94", 'cafe "quoted"'),  # Windows-1252
        ("café “quoted”".encode(), 'cafe "quoted"'),
        (b"", ""),
        (b"<img src=x.gif>", ""),
    ],
)
def test_the_text_of_a_page(html: bytes, text: str) -> None:
    assert essays.page_text(html) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\u2018a\u2019 \u201cb\u201d \u00abc\u00bb", '\'a\' "b" "c"'),
        ("1\u20132 \u2014 3\u22124 \u2026", "1-2 -- 3-4 ..."),
        ("a\u00a0b\tc\u200bd", "a b cd"),
        ("na\u00efve Erd\u0151s \u00e6on \ufb01ne stra\u00dfe", "naive Erdos aeon fine strasse"),
        ("\u00bd \u00d7 2 \u2033", '1/2 x 2 "'),
        ("\u65e5\u672c ok \U0001f642\x07", "ok"),
        ("a  \n\n\n\n\nb\r\nc\n", "a\n\nb\nc"),
    ],
)
def test_everything_becomes_printable_ascii(text: str, expected: str) -> None:
    assert essays.normalise(text) == expected
