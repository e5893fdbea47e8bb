"""Fetching over HTTP: time-outs, retries, size limits, checksums, and files that are whole or absent (extra `data`)."""

import dataclasses
import hashlib
import importlib
import logging
import os
import time
from pathlib import Path
from typing import Any, BinaryIO, Self

from picogpt_jax import __version__
from picogpt_jax.errors import UserError
from picogpt_jax.files import atomic_path
from picogpt_jax.progress import tqdm
from picogpt_jax.text.plain import read_text

USER_AGENT = f"picogpt_jax/{__version__} (prepares a text for training; one request at a time)"
MAX_BYTES = 1 << 30
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_CHUNK_BYTES = 1 << 16
_RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)


class FetchError(UserError):
    """A URL that could not be read; the message is the reason, without the URL."""


def import_extra(name: str) -> Any:
    """Imports a module of the extra `data`; a `UserError` says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"the Python package {name} is missing; run: pip install 'picogpt_jax[data]'") from None


@dataclasses.dataclass
class Client:
    """One HTTP session, used as a context manager.

    A request that finds no connection, times out (also between two pieces of the body) or gets a passing error status
    is repeated up to `retries` times, after a wait that doubles from `backoff_seconds` or that the server's Retry-After
    asks for; so is one whose body breaks off.
    """

    timeout_seconds: float = 30.0
    retries: int = 4
    backoff_seconds: float = 1.0

    def __enter__(self) -> Self:
        """Raises a `UserError` where `requests` is not installed."""
        self.requests = import_extra("requests")
        retry = import_extra("urllib3").Retry(
            total=self.retries,
            backoff_factor=self.backoff_seconds,
            status_forcelist=_RETRIED_STATUSES,
            allowed_methods=("GET",),
            raise_on_status=False,  # hands over the last response, whose status makes the clearer message
        )
        # Each retry would be a warning: the reason for giving up, if it comes to that, is told once and in full.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        self.session = self.requests.Session()
        self.session.headers["User-Agent"] = USER_AGENT
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, self.requests.adapters.HTTPAdapter(max_retries=retry))
        return self

    def __exit__(self, *exception: object) -> None:
        self.session.close()

    def fetch(self, url: str, sink: BinaryIO, max_bytes: int = MAX_BYTES, progress: bool = False) -> None:
        """Writes the body at `url` to `sink`, a seekable binary file; `progress` shows a bar, on a terminal.

        Raises:
            FetchError: no connection, no answer in time, an error status, a broken body, or more than `max_bytes`.
        """
        for attempt in range(self.retries + 1):
            in_body = False  # what goes wrong before the body has been retried by the session
            try:
                with self.session.get(url, stream=True, timeout=self.timeout_seconds) as response:
                    response.raise_for_status()
                    in_body = True
                    return _copy_body(response, sink, max_bytes, progress)
            except self.requests.RequestException as error:
                if not in_body or attempt == self.retries:
                    raise FetchError(_reason(error)) from None
            time.sleep(self.backoff_seconds * 2**attempt)


def _copy_body(response: Any, sink: BinaryIO, max_bytes: int, progress: bool) -> None:
    length = response.headers.get("Content-Length", "")
    total_bytes = int(length) if length.isdecimal() else None
    if (total_bytes or 0) > max_bytes:
        raise FetchError(f"it has {total_bytes} bytes; at most {max_bytes} were expected")
    sink.seek(0)
    sink.truncate()
    # `disable=None` shows the bar on a terminal only.
    with tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None if progress else True) as bar:
        # A body that ends before its Content-Length raises here (urllib3 2 compares them).
        for chunk in response.iter_content(_CHUNK_BYTES):
            if sink.tell() + len(chunk) > max_bytes:
                raise FetchError(f"it has more than the {max_bytes} bytes that were expected")
            sink.write(chunk)
            bar.update(len(chunk))


def _reason(error: Any) -> str:
    """One line without the layers that requests and urllib3 wrap around the cause."""
    if error.response is not None:
        return f"HTTP status {error.response.status_code} {error.response.reason}"
    cause = error.args[0] if error.args else error
    return str(getattr(cause, "reason", None) or cause)


def download(
    url: str,
    path: str | os.PathLike[str],
    sha256: str | None = None,
    max_bytes: int = MAX_BYTES,
    **patience: Any,
) -> None:
    """Downloads `url` to `path`: whole and checked, or not at all. A file that has the checksum already is kept.

    Args:
        url: http or https.
        path: the file to write.
        sha256: the checksum that the body must have, in hexadecimal.
        max_bytes: a larger body is refused.
        patience: see `Client`.

    Raises:
        UserError: the download failed or has another checksum, `path` cannot be written, or `requests` is missing.
    """
    path = Path(path)
    if sha256 is not None and path.is_file() and _sha256(path) == sha256:
        return
    way_out = "try again later, or name a copy of your own with --input_file=TEXT"
    with atomic_path(path) as temporary:
        try:
            with Client(**patience) as client, temporary.open("wb") as sink:
                client.fetch(url, sink, max_bytes, progress=True)
        except FetchError as error:
            raise UserError(f"cannot download {url}: {error}; {way_out}") from None
        found = _sha256(temporary)
        if sha256 not in (None, found):
            raise UserError(f"{url} has the SHA-256 {found}, expected {sha256}; {way_out}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shakespeare_text(folder: str | os.PathLike[str]) -> str:
    """Returns tiny Shakespeare, 1,115,394 characters; it is downloaded to `input.txt` in `folder` unless it is there.

    Raises:
        UserError: see `download`.
    """
    path = Path(folder) / "input.txt"
    download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
    return read_text(path)
