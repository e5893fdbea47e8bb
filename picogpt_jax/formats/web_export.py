"""The integer model as one HTML page: its weights, `picogpt.c` as WebAssembly, and what people see of them.

The sources are in `web/`. The page loads nothing, and its policy lets it load nothing.
"""

import base64
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

from picogpt_jax.errors import UserError, reason
from picogpt_jax.files import atomic_path, check_own_page
from picogpt_jax.formats.c_export import logits_digest
from picogpt_jax.formats.web_facts import facts
from picogpt_jax.int8.integer_model import IntegerModel
from picogpt_jax.runtimes.c_weights import SOURCES, packed

WEB = Path(__file__).resolve().parent / "web"
MARK = '<meta name="generator" content="picogpt_jax page">'  # of a file that a new page may replace
LARGEST = 64 << 20  # bytes of a page
# Without an operating system or a C library: the module asks its page for nothing.
OPTIONS = (
    *("-std=c99", "-O3", "-msimd128", "-mbulk-memory", "-fvisibility=hidden", "-nostdlib"),
    *("-Wl,--no-entry", "-Wl,--export-dynamic", "-Wl,--strip-all"),
)


def save_web(model: IntegerModel, path: str | os.PathLike[str]) -> int:
    """Writes the page in one step; an earlier one is replaced.

    Returns:
        its bytes.

    Raises:
        UserError: the vocabulary is none of characters, the model is too large for a page, no compiler makes
            WebAssembly, or `path` is another file or cannot be written.
    """
    check_own_page(path, MARK, "page")
    if model.vocabulary.to_json()["type"] != "char":
        raise UserError(
            f"the vocabulary of {model.vocabulary.size:,} tokens is not of characters, which a page shows; "
            "use --to=c, whose program takes token ids"
        )
    if 4 * model.n_bytes // 3 > LARGEST:
        raise UserError(
            f"a page with the model's {model.n_bytes:,} bytes would have more than {LARGEST >> 20} MB; use --to=c"
        )
    with atomic_path(path) as temporary:
        temporary.write_text(page(model), encoding="utf-8")
        return temporary.stat().st_size


def page(model: IntegerModel) -> str:
    """The HTML."""
    known = {
        "characters": list(model.vocabulary.itos),
        "blockSize": model.model.block_size,
        "defaultPrompt": model.vocabulary.default_prompt,
    }
    data = str(model.training.get("dataset") or "a text")
    parts = {
        "mark": MARK,
        "data": escape(data),
        "parameters": f"{model.model.n_parameters:,}",
        "vocabulary": f"{model.model.vocab_size:,}",
        "context": f"{model.model.block_size:,}",
        "facts": facts(model),
        "known": json.dumps(known).replace("<", "\\u003c"),  # no end of the script within
        "weights": base64.b64encode(packed(model, logits_digest(model))).decode(),
        "program": base64.b64encode(web_assembly()).decode(),
        **{name.replace(".", "_"): (WEB / name).read_text("utf-8") for name in ("page.css", "page.js", "worker.js")},
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], (WEB / "page.html").read_text("utf-8"))


def web_assembly() -> bytes:
    """`web/web.c` and `picogpt.c` as a module of WebAssembly.

    Raises:
        UserError: there is no compiler for it, or it fails.
    """
    for command in _compilers():
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "picogpt.wasm"
            words = [*command, *OPTIONS, f"-I{SOURCES}", "-o", str(made), str(WEB / "web.c")]
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
            if done.returncode == 0:
                return made.read_bytes()
            raise UserError(
                f"{command[0]} cannot compile picogpt.c to WebAssembly ({reason(ValueError(done.stderr))}); "
                "install another compiler: pip install 'picogpt_jax[c]'"
            )
    raise UserError(
        "--to=web needs a compiler for WebAssembly, and found neither ziglang nor clang with wasm-ld; install one: "
        "pip install 'picogpt_jax[c]'"
    )


def _compilers() -> list[list[str]]:
    """Commands of what is at hand, the one that is the same everywhere first."""
    found = []
    if importlib.util.find_spec("ziglang"):
        found.append([sys.executable, "-m", "ziglang", "cc", "-target", "wasm32-freestanding"])
    if shutil.which("clang") and shutil.which("wasm-ld"):
        found.append(["clang", "--target=wasm32", "-ffreestanding"])
    return found
