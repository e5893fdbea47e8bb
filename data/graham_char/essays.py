"""Paul Graham's essays as one plain-text file: fetched one at a time, kept in a folder, resumed where they stopped.

The site's list of essays is a page of links. It and every essay are kept as the server sent them, so that a second run
asks only for what is missing, and extracting the text again asks for nothing. Remove a file to have it fetched anew.
"""

import dataclasses
import io
import os
import re
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from picogpt_jax.errors import UserError
from picogpt_jax.files import atomic_path
from picogpt_jax.progress import tqdm
from picogpt_jax.text.download import Client, FetchError, import_extra

T = TypeVar("T")

BASE_URL = "https://www.paulgraham.com/"
INDEX_PAGE = "articles.html"
MAX_PAGE_BYTES = 8 << 20
_WAY_OUT = "try again later, or name a text of your own with --input_file=TEXT"
_PAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.html")  # safe as a file name
# The site's menu, which the index links to as well.
_MENU_PAGES = frozenset(
    {
        *("antispam.html", "arc.html", "articles.html", "bel.html", "bio.html", "books.html", "faq.html", "ind.html"),
        *("index.html", "info.html", "kedrosky.html", "lisp.html", "quo.html", "raq.html", "rss.html"),
    }
)
_BLOCK_TAGS = [
    *("blockquote", "center", "dd", "div", "dl", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "hr"),
    *("li", "ol", "p", "pre", "table", "td", "th", "title", "tr", "ul"),
]
_ASCII_FORMS = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
        **dict.fromkeys("\u2014\u2015", "--"),
        **dict.fromkeys("\u2022\u00b7", "*"),
        **{"\u00d7": "x", "\u2044": "/", "\t": " "},
        **dict(
            zip("\u00c6\u00e6\u0152\u0153\u00d8\u00f8\u00df", ["AE", "ae", "OE", "oe", "O", "o", "ss"], strict=True)
        ),
    }
)


@dataclasses.dataclass(frozen=True)
class Essays:
    """What a run got."""

    texts: dict[str, str]  # URL -> text, in the order of the index
    failures: dict[str, str]  # URL -> why there is no text


def fetch_essays(
    cache_dir: str | os.PathLike[str],
    base_url: str = BASE_URL,
    delay_seconds: float = 1.0,
    max_essays: int | None = None,
    **patience: Any,
) -> Essays:
    """Fetches the essays that are not in `cache_dir` yet, one after the other, and extracts the text of all.

    Args:
        cache_dir: where the pages are kept.
        base_url: the folder that holds articles.html and the essays; pages of other hosts are left out.
        delay_seconds: the pause between two requests.
        max_essays: only the first so many of the index.
        patience: see `picogpt_jax.text.download.Client`.

    Raises:
        UserError: the index cannot be fetched or lists no essay, `cache_dir` cannot be written, or a package is
            missing.
    """
    with Client(**patience) as client:
        pages = _PageCache(client, Path(cache_dir), delay_seconds)
        index_url = urljoin(base_url, INDEX_PAGE)
        try:
            urls = pages.read(index_url, lambda page: essay_urls(page, index_url))[:max_essays]
        except FetchError as error:
            raise UserError(f"cannot get the list of essays from {index_url}: {error}; {_WAY_OUT}") from None
        texts: dict[str, str] = {}
        failures: dict[str, str] = {}
        for url in tqdm(urls, unit="essay", disable=None):
            try:
                texts[url] = pages.read(url, page_text)
            except FetchError as error:
                failures[url] = str(error)
    return Essays(texts, failures)


@dataclasses.dataclass
class _PageCache:
    """What pages hold, by URL. A page that holds something is fetched once and kept as the server sent it."""

    client: Client
    folder: Path
    delay_seconds: float
    has_fetched: bool = False

    def read(self, url: str, extract: Callable[[bytes], T]) -> T:
        """Returns `extract(page)`; a page that cannot be fetched or of which nothing is extracted is a `FetchError`."""
        path = self.folder / urlsplit(url).path.rsplit("/", 1)[-1]
        is_kept = path.is_file()
        page = path.read_bytes() if is_kept else self._fetch(url)
        found = extract(page)
        if not found:
            raise FetchError("the page holds nothing of use")
        if not is_kept:
            with atomic_path(path) as temporary:
                temporary.write_bytes(page)
        return found

    def _fetch(self, url: str) -> bytes:
        if self.has_fetched:
            time.sleep(self.delay_seconds)
        self.has_fetched = True
        page = io.BytesIO()
        self.client.fetch(url, page, MAX_PAGE_BYTES)
        return page.getvalue()


def join_essays(essays: Essays) -> str:
    """Joins the texts with a blank line between them; prints how many there are, and each URL without one and why.

    Raises:
        UserError: there is no text.
    """
    print(f"got {len(essays.texts)} of {len(essays.texts) + len(essays.failures)} essays")
    for url, reason in essays.failures.items():
        print(f"could not get {url}: {reason}")
    if not essays.texts:
        raise UserError(f"none of {len(essays.failures)} essays could be fetched; {_WAY_OUT}")
    return "\n\n".join(essays.texts.values()) + "\n"


def essay_urls(index: bytes, index_url: str) -> list[str]:
    """Returns the pages that `index` links to and that lie beside it, in its order and once each, without the menu.

    Raises:
        FetchError: not even a browser's tolerance makes HTML of it.
    """
    site = urlsplit(urljoin(index_url, "."))
    urls: dict[str, None] = {}
    for link in _parse(index)("a", href=True):
        try:
            target = urlsplit(urljoin(index_url, link["href"].strip()))
        except ValueError:  # such as http://[
            continue
        name = target.path.removeprefix(site.path)
        is_page = _PAGE_NAME.fullmatch(name) and name not in _MENU_PAGES
        if is_page and target.netloc.removeprefix("www.") == site.netloc.removeprefix("www."):
            urls[urljoin(index_url, name)] = None
    return list(urls)


def page_text(html: bytes) -> str:
    """Returns the text of a page, of broken HTML too, as printable ASCII and newlines; "" where it has none.

    A block element or <br><br> ends a paragraph, <br> ends a line, and <pre> keeps its lines and indentation.

    Raises:
        FetchError: not even a browser's tolerance makes HTML of it.
    """
    soup = _parse(html)
    text_type = import_extra("bs4").NavigableString
    for node in soup(string=True):
        if type(node) is not text_type:  # a comment, a script, a style sheet
            node.extract()
        elif node.find_parent("pre"):
            node.replace_with(node.replace(" ", "\xa0"))  # shields the indentation from the squeezing below
        else:
            node.replace_with(re.sub(r"\s+", " ", node))
    for tag in soup("br"):
        tag.insert_before("\n")
    for tag in soup(_BLOCK_TAGS):
        tag.insert_before("\n\n")
        tag.insert_after("\n\n")
    return normalise(re.sub(r" *\n *", "\n", re.sub(r" +", " ", soup.get_text())))


def normalise(text: str) -> str:
    """Maps `text` to printable ASCII and newlines, with at most one blank line in a row.

    Typographic quotes, dashes and ligatures get their typewriter forms, accents are dropped, and so is what is left.
    """
    # Some forms decompose into others of the table (1/2 has a fraction slash), and some would lose by decomposing.
    text = unicodedata.normalize("NFKD", text.translate(_ASCII_FORMS)).translate(_ASCII_FORMS)
    text = re.sub(r"[^\n -~]", "", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", text)).strip()


def _parse(html: bytes) -> Any:
    """Parses HTML of any quality; UTF-8, else Windows-1252, which is what browsers assume for an undeclared page."""
    try:
        markup = html.decode("utf-8")
    except UnicodeDecodeError:
        markup = html.decode("windows-1252", errors="replace")
    bs4 = import_extra("bs4")
    try:
        return bs4.BeautifulSoup(markup, "html.parser")
    except bs4.builder.ParserRejectedMarkup:
        raise FetchError("its HTML cannot be parsed") from None
