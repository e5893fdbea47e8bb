"""What every script shares: absl flags, and a user's mistake as one line with exit status 2."""

import atexit
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from picogpt_jax.errors import UserError

USER_ERROR_STATUS = 2
CLOSED_PIPE_STATUS = 141  # what a shell reports of a program that SIGPIPE ended


def run(main: Callable[[], object]) -> NoReturn:
    """Parses the flags, runs `main`, and turns a `UserError` into one line on stderr and exit status 2."""
    _silence_background_errors()
    app.run(lambda argv: _guarded(main), flags_parser=_parse_flags)
    raise AssertionError("app.run does not return")


def config_sections(flag: flags.FlagHolder) -> dict[str, dict[str, Any]]:
    """The values of a `--config` flag as plain dicts.

    Raises:
        UserError: its file cannot be read.
    """
    try:
        return flag.value.to_dict()
    except OSError as error:  # ml_collections keeps it until the value is asked for
        reason = str(error.__cause__ or error)
        raise UserError(f"--config: {reason}; give the path of a file such as configs/base.py") from None


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(list(argv))
    except flags.Error as error:
        _exit_with(f"{error}; --help lists the flags")
    except (AttributeError, KeyError, OSError, SyntaxError, TypeError, ValueError) as error:
        reason: object = error  # a ConfigDict wraps its refusal of --config.<unknown>=... in exceptions
        while isinstance(reason, AttributeError | KeyError) and reason.args:
            reason = reason.args[0]
        _exit_with(f"a --config flag does not fit: {reason}; configs/base.py lists the keys")
    if len(rest) > 1:
        _exit_with(f"unexpected argument {rest[1]!r}; every setting is a flag, --name=value; --help lists them")
    return rest


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
    except UserError as error:
        _exit_with(str(error))
    except ImportError as error:
        if "picogpt_jax[" not in str(error):  # the extra to install
            raise
        _exit_with(str(error))
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes when it ends
        sys.exit(CLOSED_PIPE_STATUS)


def _reader_has_left() -> bool:
    """Whether nobody reads the standard output any more, as after `| head`."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # errors are reported in any case
    return bool(output.poll(0))


def _exit_with(message: str) -> NoReturn:
    one_line = " ".join(message.split())
    print(f"error: {one_line}", file=sys.stderr)
    sys.exit(USER_ERROR_STATUS)
