"""What every script shares: absl flags, the standard output, and a user's mistake as one line with exit status 2."""

import atexit
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from picogpt_jax.errors import UserError

USER_ERROR_STATUS = 2
CLOSED_PIPE_STATUS = 141  # what a shell reports of a program that SIGPIPE ended
flags.disclaim_key_flags()  # a flag that is defined here belongs to the script that asks for it


class OutputError(Exception):
    """Standard output or error cannot be written. No OSError: nothing may take it for one of its own files."""


class _Output(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(self.fileno(), error.errno, error.strerror) from None


class _PathParser(flags.ArgumentParser[str]):
    def parse(self, argument: str) -> str:
        return os.path.expanduser(argument)


def DEFINE_path(name: str, default: str | None, help_text: str) -> flags.FlagHolder[str]:  # noqa: N802
    """Defines a flag for the path of a file or folder; a `~` in front is the home folder."""
    return flags.DEFINE(_PathParser(), name, default, help_text, serializer=flags.ArgumentSerializer())


def run(main: Callable[[], object]) -> NoReturn:
    """Parses the flags, runs `main`, and turns a `UserError` into one line on stderr and exit status 2."""
    sys.stdout, sys.stderr = _output(sys.stdout, "replace"), _output(sys.stderr, "backslashreplace")
    _silence_background_errors()
    app.run(lambda argv: _guarded(main), flags_parser=_parse_flags)
    raise AssertionError("app.run does not return")


def _output(stream: Any, errors: str) -> Any:
    """The same stream, which writes what its encoding has no bytes for as `errors` says, and raises `OutputError`."""
    if stream is None:  # closed by who started the program
        return None
    stream.flush()
    raw = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
    lines = stream.line_buffering or stream.write_through
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors=errors, line_buffering=lines)


def config_sections(flag: flags.FlagHolder) -> dict[str, dict[str, Any]]:
    """The values of a `--config` flag as plain dicts."""
    sections = flag.value.to_dict()
    if "data" in sections:
        sections["data"]["dir"] = os.path.expanduser(sections["data"]["dir"])
    return sections


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(_with_config_file(argv))
    except flags.Error as error:
        _exit_with(f"{error}; --help lists the flags")
    except (AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
        reason: object = error  # a ConfigDict wraps its refusal of --config.<unknown>=... in exceptions
        while isinstance(reason, AttributeError | KeyError) and reason.args:
            reason = reason.args[0]
        _exit_with(f"a --config flag does not fit: {reason}; configs/base.py lists the keys")
    if len(rest) > 1:
        _exit_with(f"unexpected argument {rest[1]!r}; every setting is a flag, --name=value; --help lists them")
    return rest


def _with_config_file(argv: Sequence[str]) -> list[str]:
    """Expands the path of `--config`, and sees that it can be read: ml_collections would blame the next override."""
    argv = list(argv)
    for index, argument in enumerate(argv):
        if argument == "--config" and argument != argv[-1]:
            argument = f"--config={argv.pop(index + 1)}"
        if argument.startswith("--config="):
            value = os.path.expanduser(argument.removeprefix("--config="))
            argv[index] = f"--config={value}"
            path = value.partition(":")[0]  # what follows is get_config's
            try:
                open(path, "rb").close()
            except OSError as error:
                there = f"{error.strerror} in {Path.cwd()}"
                _exit_with(f"--config={path}: {there}; give the full path of a file such as configs/base.py")
    return argv


def _silence_background_errors() -> None:
    """Leaves out what Orbax and TensorStore print in threads about a failure that the main thread raises, and after."""
    noisy = ("/orbax/", "/asyncio/")
    logging.get_absl_handler().addFilter(lambda record: not any(name in record.pathname for name in noisy))
    hook = sys.unraisablehook

    def without_closed_loops(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # of a write or read that comes back too late
            hook(unraisable)

    sys.unraisablehook = without_closed_loops
    # TensorStore goes on when the interpreter has lost its hooks. 2 is stderr.
    atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))


def _guarded(main: Callable[[], object]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # Orbax reports whatever it does
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _exit_with(str(error))
    except ImportError as error:
        if "picogpt_jax[" not in str(error):  # the extra to install
            raise
        _exit_with(str(error))
    except MemoryError as error:
        _exit_with(f"there is not enough memory ({str(error) or 'of this process'}); ask for less, or give it more")
    except OutputError as error:
        descriptor, error_number, reason = error.args
        is_closed = error_number == errno.EPIPE  # as after `| head`: nobody is there to read about it
        for broken in (1, 2) if is_closed else (descriptor,):  # for what Python still writes when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), broken)
        if is_closed:
            sys.exit(CLOSED_PIPE_STATUS)
        _exit_with(
            f"cannot write to the standard {'output' if descriptor == 1 else 'error'}: {reason}; send it elsewhere"
        )


def _exit_with(message: str) -> NoReturn:
    one_line = " ".join(message.split())
    print(f"error: {one_line}", file=sys.stderr)
    sys.exit(USER_ERROR_STATUS)


# JAX reads it when it is imported, which a script may do before it runs.
_devices = os.environ.get("JAX_NUM_CPU_DEVICES", "1")
if not _devices.isdecimal() or int(_devices) < 1:
    _exit_with(f"JAX_NUM_CPU_DEVICES={_devices!r} is not a number of CPU devices; set it to 1 or more, or unset it")
