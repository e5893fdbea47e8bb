"""The one exception for a user's mistake, and the commands that its messages give."""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of scripts/, configs/ and data/


class UserError(ValueError):
    """Something that the user can put right: the message says what was found, what was expected, what to change.

    Scripts print it as one line on stderr and exit with status 2 (see `picogpt_jax.cli`). Every other exception is a
    defect of ours and keeps its traceback. It is one line, of what a terminal can show.
    """

    def __init__(self, message: object) -> None:
        line = " ".join(str(message).splitlines())
        super().__init__("".join(char if char.isprintable() else ascii(char)[1:-1] for char in line))


@contextlib.contextmanager
def errors_in(source: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the file's name in front of the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def reason(error: BaseException) -> str:
    """What another library says, for a message of one line: both ends of a long text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:120]} ... {text[-120:]}"


def command(script: str, **flags: object) -> str:
    """A command for a message, which runs as it is printed from where this program was started.

    Args:
        script: such as scripts/quantize.py.
        flags: name -> value. What only the user knows is a word in capitals, such as DATA.
    """
    ours = "" if Path.cwd() == ROOT else f"{ROOT}/"
    words = [f"--{name}={ours * (name == 'config')}{value}" for name, value in flags.items()]
    return shlex.join(["python", ours + script, *words])


def python_string(value: object) -> str:
    """A string in Python code that a shell is to find within single quotes."""
    return json.dumps(str(value), ensure_ascii=False)
