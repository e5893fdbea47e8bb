"""What README.md tells people to type exists: scripts, flags and their choices, configuration keys, files."""

import ast
import functools
import re
import shlex

from conftest import ROOT

from configs.base import get_config

COMMAND = re.compile(r"(?:python|bash) ((?:scripts|data)/[\w./-]+\.(?:py|sh))([^`\n|;&>]*)")
PATH = re.compile(r"(?<![\w/.-])((?:picogpt_jax|configs|scripts|data|tests)/[\w/-]+\.(?:py|sh|txt))")
KEY = re.compile(r"(\w+)\.(\w+)(?:=\S+)?")
LINK = re.compile(r"\]\(([^)#:]+)\)")
TREE_ENTRY = re.compile(r"[\w.-]+(?:\.(?:py|sh|toml|md|txt)|/)")
TREE_LINES = "│├└─ "
FILE_TYPES = {"py", "sh", "bin", "json", "jsonl", "pt", "safetensors", "png", "txt", "toml", "md"}
ABSL_FLAGS = {"help", "helpfull", "verbosity"}
PLACEHOLDER = re.compile(r"[A-Z_]+")  # data/NAME/prepare.py, --seed=N


def problems(readme: str) -> list[str]:
    """Everything in the text that does not exist."""
    text = readme.replace("\\\n", " ")
    found = [problem for script, arguments in COMMAND.findall(text) for problem in command_problems(script, arguments)]
    found += [f"no file {path}" for path in (*PATH.findall(text), *LINK.findall(text)) if not exists(path)]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for section, key in (match.groups() for match in map(KEY.fullmatch, spans) if match):
        if section in config() and key not in FILE_TYPES:
            found += key_problems(f"{section}.{key}")
    return sorted({*found, *tree_problems(text)})


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
            is_enum = node.func.attr == "DEFINE_enum"
            flags[ast.literal_eval(node.args[0])] = ast.literal_eval(node.args[2]) if is_enum else []
    return flags


@functools.cache
def config() -> dict[str, dict[str, object]]:
    return get_config().to_dict()


def key_problems(key: str) -> list[str]:
    section, _, name = key.partition(".")
    return [] if name in config().get(section, {}) else [f"no key {key}"]


def exists(path: str) -> bool:
    return any(ROOT.glob(PLACEHOLDER.sub("*", path))) if PLACEHOLDER.search(path) else (ROOT / path).exists()


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


def test_the_readme_names_only_what_exists() -> None:
    assert problems((ROOT / "README.md").read_text(encoding="utf-8")) == []


def test_the_readme_shows_every_step() -> None:
    """The commands are found at all, and they are those of the pipeline."""
    scripts = {script for script, _ in COMMAND.findall((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert scripts >= {f"scripts/{name}.py" for name in ("train", "quantize", "evaluate", "sample", "convert")}
    assert "scripts/quickstart.sh" in scripts


WRONG = """
```bash
bash scripts/missing.sh && python scripts/train.py --config=configs/none.py --config.model.width=3 \\
  --config.train.max_iters=5 --nosuch=1 --noresume   # a comment --with=flags
python scripts/convert.py --input=x --to=floppy
python data/NAME/prepare.py --input_files=a
```
See [there](docs/none.md), [here](LICENSE) and `picogpt_jax/none.py`; `train.speed=3`, `train.bin`, `train.seed`.
```
picogpt_jax/
  model.py none.py   the model     configs/base.py
├── config.py  # the configuration
outputs/             what is made
```
"""


def test_the_check_finds_what_does_not_exist() -> None:
    assert problems(WRONG) == sorted(
        [
            "no file scripts/missing.sh",
            "no file configs/none.py",
            "no key model.width",
            "no flag --nosuch in scripts/train.py",
            "no choice --to=floppy in scripts/convert.py",
            "no flag --input_files in data/NAME/prepare.py",
            "no file docs/none.md",
            "no file picogpt_jax/none.py",
            "no key train.speed",
            "no file outputs/",
        ]
    )
