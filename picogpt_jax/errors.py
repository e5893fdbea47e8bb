"""The one exception for a user's mistake."""

import contextlib
import os
from collections.abc import Iterator


class UserError(ValueError):
    """Something that the user can put right: the message says what was found, what was expected, what to change.

    Scripts print it as one line on stderr and exit with status 2 (see `picogpt_jax.cli`). Every other exception is a
    defect of ours and keeps its traceback.
    """


@contextlib.contextmanager
def errors_in(source: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the file's name in front of the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
