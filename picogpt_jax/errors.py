"""The one exception for a user's mistake."""


class UserError(ValueError):
    """Something that the user can put right: the message says what was found, what was expected, what to change.

    Scripts print it as one line on stderr and exit with status 2 (see `picogpt_jax.cli`). Every other exception is a
    defect of ours and keeps its traceback.
    """
