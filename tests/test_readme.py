"""What the pages tell people exists: commands, flags and their choices, configuration keys, files, links, headings."""

import ast
import dataclasses
import functools
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from test_rooms import ROOMS

from configs.base import get_config
from picogpt_jax.config import ModelConfig
from picogpt_jax.int8.int8_model import QUANTIZATION_CHOICES
from picogpt_jax.int8.layout import int8_layout
from picogpt_jax.training.resume import FREE_ON_RESUME

FRONT = ROOT / "README.md"
ROOM_PAGES = {room: ROOT / "picogpt_jax" / room / "README.md" for room in ROOMS}
OTHER_PAGES = [ROOT / folder / "README.md" for folder in ("configs", "data", "scripts/launch")]
PAGES = [FRONT, *ROOM_PAGES.values(), *OTHER_PAGES]
# Where a file lies that is named without its folder, beside the page's own.
PLACES = [ROOT / folder for folder in ("picogpt_jax", "configs", "data/text_char", "scripts", "scripts/launch")]
FRONT_LINES, ROOM_LINES = 200, 80
LONG = ("int8", "benchmarks")  # the format's specification and the measurements may be longer

COMMAND = re.compile(r"(?:python|bash) ((?:scripts|data)/[\w./-]+\.(?:py|sh))([^`\n|;&>]*)")
PATH = re.compile(r"(?<![\w/.-])((?:picogpt_jax|configs|scripts|data|tests)/[\w/-]+\.(?:py|sh|txt))")
KEY = re.compile(r"(\w+)\.(\w+)(?:=\S+)?")
LINK = re.compile(r"\]\(([^)#:]*)(?:#([\w-]+))?\)")
FILE_NAME = re.compile(r"[\w.-]+\.(?:py|sh|sbatch|yaml)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
TREE_ENTRY = re.compile(r"[\w.-]+(?:\.(?:py|sh|toml|md|txt)|/)")
TREE_LINES = "│├└─ "
FILE_TYPES = {"py", "sh", "bin", "json", "jsonl", "pt", "safetensors", "png", "txt", "toml", "md"}
ABSL_FLAGS = {"help", "helpfull", "verbosity"}
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*")  # data/NAME/prepare.py, --seed=N


def problems(page: str, folder: Path) -> list[str]:
    """Everything in the text of a page in `folder` that does not exist."""
    text = page.replace("\\\n", " ")
    found = [problem for script, arguments in COMMAND.findall(text) for problem in command_problems(script, arguments)]
    found += [f"no file {path}" for path in PATH.findall(text) if not exists(path)]
    found += link_problems(text, folder)
    without = r"```.*?```|\[[^\]]*\]\("  # blocks, and what a link is called: its target is checked
    spans = re.findall(r"`([^`\n]+)`", re.sub(without, "", text, flags=re.DOTALL))
    for name in filter(FILE_NAME.fullmatch, spans):
        found += [] if any(exists(name, place) for place in (folder, *PLACES)) else [f"no file {name}"]
    for section, key in (match.groups() for match in map(KEY.fullmatch, spans) if match):
        if section in config() and key not in FILE_TYPES:
            found += key_problems(f"{section}.{key}")
    return sorted({*found, *tree_problems(text)})


def link_problems(text: str, folder: Path) -> list[str]:
    """Links to what is not there; they are relative to the page's folder."""
    found = []
    for path, anchor in LINK.findall(text):
        target = folder / path
        if path and not target.exists():
            found.append(f"no file {path}")
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8") if path else text):
            found.append(f"no heading {path}#{anchor}")
    return found


def anchors(page: str) -> set[str]:
    """What GitHub makes of the headings: lower case, spaces as hyphens, no other punctuation."""
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(page)}


def command_problems(script: str, arguments: str) -> list[str]:
    if not exists(script):
        return [f"no file {script}"]
    if script.endswith(".sh"):
        return []
    found = []
    for argument in shlex.split(arguments, comments=True):
        name, _, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            continue
        if name.startswith("config."):
            found += key_problems(name.removeprefix("config."))
        elif name == "config" and not exists(value):
            found.append(f"no file {value}")
        elif name not in flags_of(script) and name.removeprefix("no") not in flags_of(script):
            found.append(f"no flag --{name} in {script}")
        elif value and (choices := flags_of(script).get(name)):
            found += [f"no choice --{argument[2:]} in {script}"] if value not in choices else []
    return found


@functools.cache
def flags_of(script: str) -> dict[str, list[str]]:
    """The flags that the script defines, with the choices of an enum."""
    paths = sorted(ROOT.glob(PLACEHOLDER.sub("*", script)))
    flags: dict[str, list[str]] = {name: [] for name in ABSL_FLAGS}
    for node in ast.walk(ast.parse(paths[0].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("DEFINE_"):
            is_enum = node.func.attr == "DEFINE_enum" and isinstance(node.args[2], ast.List)  # else a name: any choice
            flags[ast.literal_eval(node.args[0])] = ast.literal_eval(node.args[2]) if is_enum else []
    return flags


@functools.cache
def config() -> dict[str, dict[str, object]]:
    return get_config().to_dict()


def key_problems(key: str) -> list[str]:
    section, _, name = key.partition(".")
    return [] if name in config().get(section, {}) else [f"no key {key}"]


def exists(path: str, folder: Path = ROOT) -> bool:
    return any(folder.glob(PLACEHOLDER.sub("*", path))) if PLACEHOLDER.search(path) else (folder / path).exists()


def tree_problems(text: str) -> list[str]:
    """A file tree is a block with a line `picogpt_jax/`; what is indented below a folder lies in it."""
    found = []
    for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
        if not re.search(r"^\W*picogpt_jax/", block, re.MULTILINE):
            continue
        folder = ""
        for line in block.splitlines():
            first_column = re.split(r"\s{2,}|\s#", line.strip(TREE_LINES))[0]
            is_indented = line[:1] in TREE_LINES
            names = [name for name in first_column.split() if TREE_ENTRY.fullmatch(name)]
            paths = [folder + name if is_indented else name for name in names]
            found += [f"no file {path}" for path in paths if not exists(path)]
            if not is_indented:
                folder = names[0] if names and names[0].endswith("/") else ""
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_only_what_exists(page: Path) -> None:
    assert problems(page.read_text(encoding="utf-8"), page.parent) == []


def test_the_front_page_shows_every_step() -> None:
    """The commands are found at all, and they are those of the pipeline."""
    scripts = {script for script, _ in COMMAND.findall(FRONT.read_text(encoding="utf-8"))}
    assert scripts >= {f"scripts/{name}.py" for name in ("train", "quantize", "evaluate", "sample", "convert")}
    assert scripts >= {"scripts/quickstart.sh", "scripts/test.sh"}


def test_the_front_page_leads_to_every_other() -> None:
    linked = {(ROOT / path).resolve() for path, _ in LINK.findall(FRONT.read_text(encoding="utf-8"))}
    assert linked >= {page.resolve() for page in PAGES[1:]}


def test_pages_are_short() -> None:
    limits = {FRONT: FRONT_LINES} | {page: ROOM_LINES for page in PAGES[1:] if page.parent.name not in LONG}
    lengths = {page: len(page.read_text(encoding="utf-8").splitlines()) for page in limits}
    assert {str(page): length for page, length in lengths.items() if length > limits[page]} == {}


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: str(page.parent.relative_to(ROOT)))
def test_a_page_lists_every_file_of_its_folder(page: Path) -> None:
    files = {path.name for path in page.parent.iterdir() if FILE_NAME.fullmatch(path.name)} - {"__init__.py"}
    if page.parent.name == "data":
        files = {path.parent.name for path in page.parent.glob("*/prepare.py")}
    assert files <= set(re.findall(r"^\| `([\w.-]+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_which_rooms_it_may_use(room: str) -> None:
    (may_use,) = re.findall(r"^May use: ([\w, ]+)\.", ROOM_PAGES[room].read_text(encoding="utf-8"), re.MULTILINE)
    assert may_use == (", ".join(ROOMS[: ROOMS.index(room)]) or "no other room")


def test_the_page_of_training_lists_what_may_change_on_resume() -> None:
    """One list, in `training.resume`; whoever changes it changes the page."""
    page = ROOM_PAGES["training"].read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- free-on-resume -->(.*?)<!-- end -->", page, re.DOTALL)
    assert set(re.findall(r"`([\w.]+)`", shown)) == set(FREE_ON_RESUME)


def test_the_format_is_described_completely() -> None:
    """Every tensor with its type and shape, and every key of config.json."""
    page = ROOM_PAGES["int8"].read_text(encoding="utf-8")
    sizes = {"C": 8, "3C": 24, "F": 16, "V": 5, "T": 7}
    config = dict(n_layer=1, n_head=2, n_embd=8, block_size=7, vocab_size=5, mlp_ratio=2, bias=True, activation="relu")
    layout = int8_layout(ModelConfig(**config, layer_norm_epsilon=1e-5, dropout=0.0), "per_channel")  # type: ignore[arg-type]
    described = {}
    for line in page.splitlines():
        names = re.findall(r"`(transformer\.[\w.{}]+)`", line) if line.startswith("| `transformer.") else []
        for name in (name.replace("{i}", "0") for name in names):
            shape = tuple(sizes[size] for size in re.findall(r"\[([\w, ]+)\]", line)[0].split(", "))
            described[name] = ("int8" if "| int8 |" in line else "float32", shape)
            if len(shape) == 2:
                described[f"{name}_scale"] = ("float32", (shape[0], 1))
    assert described == layout
    keys = [field.name for field in dataclasses.fields(ModelConfig)]
    assert [key for key in (*keys, *QUANTIZATION_CHOICES) if not re.search(rf"`(\w+\.)?{key}`", page)] == []


WRONG = """
# What is wrong?

```bash
bash scripts/missing.sh && python scripts/train.py --config=configs/none.py --config.model.width=3 \\
  --config.train.max_iters=5 --nosuch=1 --noresume   # a comment --with=flags
python scripts/convert.py --input=x --to=floppy
python data/NAME/prepare.py --input_files=a
```
See [there](docs/none.md), [here](../LICENSE), [above](#what-is-wrong), [below](#what-is-right), [code](data.md#x) and
`picogpt_jax/none.py`; `base.py`, `nothing.py`, `train.speed=3`, `train.bin`, `train.seed`.
```
picogpt_jax/
  errors.py none.py   what is raised     configs/base.py
├── config.py  # the configuration
outputs/             what is made
```
"""


def test_the_check_finds_what_does_not_exist() -> None:
    assert problems(WRONG, ROOT / "configs") == sorted(
        [
            "no file scripts/missing.sh",
            "no file configs/none.py",
            "no key model.width",
            "no flag --nosuch in scripts/train.py",
            "no choice --to=floppy in scripts/convert.py",
            "no flag --input_files in data/NAME/prepare.py",
            "no file docs/none.md",
            "no file data.md",
            "no heading #what-is-right",
            "no file picogpt_jax/none.py",
            "no file nothing.py",
            "no key train.speed",
            "no file outputs/",
        ]
    )
