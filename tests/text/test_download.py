import contextlib
import dataclasses
import hashlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from picogpt_jax import __version__
from picogpt_jax.errors import UserError
from picogpt_jax.text import download

BODY = b"All the world's a stage,\r\nAnd all the men and women merely players.\n" * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the server says to one request. The last of a page's answers is given again and again."""

    body: bytes = BODY
    status: int = 200
    content_length: int | None = None  # None: the true one; -1: none is sent
    headers: tuple[tuple[str, str], ...] = ()
    hangs: bool = False  # until the test is over


class Site(ThreadingHTTPServer):
    """An HTTP server on the loopback interface that answers as told and notes who asked for what."""

    daemon_threads = False  # `server_close` joins the threads: nothing outlives the test

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.answers: dict[str, list[Answer]] = {}
        self.requested: list[str] = []
        self.user_agents: set[str] = set()
        self.is_over = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.requested.append(self.path)
        self.server.user_agents.add(self.headers["User-Agent"])
        answers = self.server.answers.get(self.path, [Answer(b"", 404)])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer.hangs:
            self.server.is_over.wait(timeout=30)
            return
        self.send_response(answer.status)
        length = len(answer.body) if answer.content_length is None else answer.content_length
        for name, value in (*answer.headers, *([("Content-Length", str(length))] if length >= 0 else [])):
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that refuses a large body hangs up
            self.wfile.write(answer.body)

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


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were to be slept; nothing sleeps."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def fetch(site: Site, path: Path, sha256: str | None = None, retries: int = 2, max_bytes: int = 1 << 20) -> None:
    patience = {"timeout_seconds": 10.0, "retries": retries, "backoff_seconds": 0.0}
    download.download(site.url + "text", path, sha256, max_bytes=max_bytes, **patience)


@pytest.mark.parametrize("content_length", [None, -1])
def test_the_body_is_saved_and_the_program_names_itself(site: Site, tmp_path: Path, content_length: int | None) -> None:
    site.answers["/text"] = [Answer(content_length=content_length)]
    fetch(site, tmp_path / "new" / "a.txt", SHA256)
    assert (tmp_path / "new/a.txt").read_bytes() == BODY
    assert [agent.split()[0] for agent in site.user_agents] == [f"picogpt_jax/{__version__}"]


def test_a_file_with_the_checksum_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    site.answers["/text"] = [Answer()]
    (tmp_path / "a.txt").write_bytes(b"an older text")
    fetch(site, tmp_path / "a.txt", SHA256)
    fetch(site, tmp_path / "a.txt", SHA256)
    assert site.requested == ["/text"]
    assert (tmp_path / "a.txt").read_bytes() == BODY
    fetch(site, tmp_path / "a.txt")  # without a checksum there is no telling
    assert site.requested == ["/text", "/text"]


def test_another_text_than_the_expected_one_is_not_kept(site: Site, tmp_path: Path) -> None:
    site.answers["/text"] = [Answer()]
    (tmp_path / "a.txt").write_bytes(b"what was there")
    with pytest.raises(UserError, match=rf"/text has the SHA-256 {SHA256}, expected {'0' * 64}; .*--input_file=TEXT"):
        fetch(site, tmp_path / "a.txt", "0" * 64)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"what was there"]


def test_a_body_that_breaks_off_is_fetched_again(site: Site, tmp_path: Path) -> None:
    site.answers["/text"] = [Answer(BODY[:-9], content_length=len(BODY)), Answer()]
    fetch(site, tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == BODY
    assert site.requested == ["/text"] * 2


def test_a_body_that_always_breaks_off_is_given_up(site: Site, tmp_path: Path, sleeps: list[float]) -> None:
    site.answers["/text"] = [Answer(BODY[:-9], content_length=len(BODY))]
    with pytest.raises(UserError, match=r"cannot download http://127.*/text: .*9 more expected.*; .*--input_file=TEXT"):
        download.download(site.url + "text", tmp_path / "a.txt", retries=3)
    assert site.requested == ["/text"] * 4
    assert sleeps == [1, 2, 4]
    assert not list(tmp_path.iterdir())


def test_a_passing_error_status_is_tried_again(site: Site, tmp_path: Path) -> None:
    site.answers["/text"] = [Answer(status=503), Answer(status=429), Answer()]
    fetch(site, tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == BODY
    assert site.requested == ["/text"] * 3


def test_the_server_says_when_to_come_back(site: Site, tmp_path: Path, sleeps: list[float]) -> None:
    site.answers["/text"] = [Answer(status=503, headers=(("Retry-After", "77"),)), Answer()]
    fetch(site, tmp_path / "a.txt")
    assert sleeps == [77]


@pytest.mark.parametrize(("status", "requests"), [(503, 3), (404, 1), (403, 1)])
def test_an_error_status_is_the_reason(site: Site, tmp_path: Path, status: int, requests: int) -> None:
    site.answers["/text"] = [Answer(status=status)]
    with pytest.raises(UserError, match=rf"cannot download .*/text: HTTP status {status} .*; .*--input_file=TEXT"):
        fetch(site, tmp_path / "a.txt")
    assert len(site.requested) == requests
    assert not list(tmp_path.iterdir())


def test_a_server_that_does_not_answer_is_given_up(site: Site, tmp_path: Path) -> None:
    site.answers["/text"] = [Answer(hangs=True)]
    with pytest.raises(UserError, match=r"cannot download .*: .*[Tt]imed out.*--input_file=TEXT"):
        patience = {"timeout_seconds": 0.1, "retries": 1, "backoff_seconds": 0.0}
        download.download(site.url + "text", tmp_path / "a.txt", **patience)
    assert site.requested == ["/text"] * 2


def test_no_connection_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:  # bound and not listening: whoever connects is refused
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        with pytest.raises(UserError, match=rf"^cannot download {url}: .*Connection refused.*--input_file=TEXT$"):
            download.download(url, tmp_path / "a.txt", retries=1, backoff_seconds=0.0)
    assert not caplog.records


@pytest.mark.parametrize(
    ("content_length", "message"),
    [(None, rf"it has {len(BODY)} bytes; at most 1000"), (-1, "it has more than the 1000")],
)
def test_a_body_above_the_limit_is_refused(
    site: Site, tmp_path: Path, content_length: int | None, message: str
) -> None:
    site.answers["/text"] = [Answer(content_length=content_length)]
    with pytest.raises(UserError, match=message):
        fetch(site, tmp_path / "a.txt", max_bytes=1000)
    assert site.requested == ["/text"]
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "requests", None)
    with pytest.raises(UserError, match=r"package requests is missing; run: pip install 'picogpt_jax\[data\]'"):
        download.download("http://127.0.0.1/", tmp_path / "a.txt")


def test_shakespeare_is_downloaded_once_and_checked(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.answers["/text"] = [Answer()]
    monkeypatch.setattr(download, "SHAKESPEARE_URL", site.url + "text")
    with pytest.raises(UserError, match=f"expected {download.SHAKESPEARE_SHA256}"):
        download.shakespeare_text(tmp_path)
    monkeypatch.setattr(download, "SHAKESPEARE_SHA256", SHA256)
    assert download.shakespeare_text(tmp_path) == BODY.decode()
    assert download.shakespeare_text(tmp_path) == BODY.decode()
    assert site.requested == ["/text"] * 2


def test_the_checksum_is_that_of_tiny_shakespeare(shakespeare_text: str) -> None:
    assert hashlib.sha256(shakespeare_text.encode()).hexdigest() == download.SHAKESPEARE_SHA256
