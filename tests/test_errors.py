"""The commands of messages run as they are printed: their scripts, flags and choices exist, quoted for a shell."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from test_readme import command_problems

from picogpt_jax.errors import UserError, command
from picogpt_jax.formats import sources

FILES = [*(ROOT / "picogpt_jax").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]


def calls(path: Path) -> Iterator[ast.Call]:
    """The calls of `command` in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "command":
            yield node


def problems_of(call: ast.Call) -> list[str]:
    """What the script of a call does not have: a flag, or a choice that is written there."""
    script = ast.literal_eval(call.args[0])
    pairs = [(key.arg, key.value) for key in call.keywords if key.arg is not None]
    words = [f"--{name}={value.value if isinstance(value, ast.Constant) else ''}" for name, value in pairs]
    return command_problems(script, shlex.join(words))


def test_every_command_in_a_message_has_its_script_and_flags() -> None:
    found = [call for path in FILES for call in calls(path)]
    assert len(found) >= 8
    assert [problem for call in found for problem in problems_of(call)] == []
    wrong = ast.parse('command("scripts/convert.py", input=path, to="floppy", into=path)').body[0].value
    assert problems_of(wrong) == ["no choice --to=floppy in scripts/convert.py", "no flag --into in scripts/convert.py"]


def test_no_message_spells_a_command_itself() -> None:
    """It would be relative to a folder where the reader is not, and unquoted; docstrings are read, not copied."""
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bodies = [
            node.body[0] for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list) and node.body
        ]
        docstrings = {id(first.value) for first in bodies if isinstance(first, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                assert not re.search(r"python (scripts|data)/[a-z]", node.value), f"{path}:{node.lineno}"


def test_a_command_is_quoted_and_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"config": "configs/finetune.py", "config.data.dir": "my data", "workdir": "it's"}
    words = ["--config=configs/finetune.py", "--config.data.dir=my data", "--workdir=it's"]
    monkeypatch.chdir(ROOT)
    assert shlex.split(command("scripts/train.py", **flags)) == ["python", "scripts/train.py", *words]
    monkeypatch.chdir(tmp_path)
    python, script, config, *others = shlex.split(command("scripts/train.py", **flags))
    assert (python, others) == ("python", words[1:])
    assert Path(script).samefile(ROOT / "scripts/train.py")
    assert Path(config.removeprefix("--config=")).samefile(ROOT / "configs/finetune.py")


@pytest.mark.parametrize("load", [sources.load_int8, sources.load_onnx, sources.load_gguf, sources.load_numpy])
def test_the_commands_for_another_kind_of_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load) -> None:
    monkeypatch.chdir(ROOT)
    workdir = tmp_path / "my run"
    (workdir / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=": python ") as told:
        load(workdir)
    message = str(told.value)
    python, script, *words = shlex.split(message[message.index(": python ") + 2 :])
    assert python == "python"
    assert command_problems(script, shlex.join(words)) == []
    assert any(word.endswith((f"={workdir}", "=INT8_FOLDER")) for word in words)
    assert len(message) < 300 + 2 * len(str(workdir))
