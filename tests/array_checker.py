"""The type checker that jaxtyping's pytest hook applies to the library: shapes and dtypes, on every call.

Only a function that names an array's shape is checked. Plain types are mypy's part, and the tests hand wrong ones to
functions that answer with a message of their own. Dataclasses are left out as well: JAX rebuilds those that hold arrays
with anything for their leaves.
"""

from collections.abc import Callable
from typing import Any, Self, get_args

import beartype
import jaxtyping

# An int is a float; Self means nothing to a checker that sees each method by itself.
CONFIG = beartype.BeartypeConf(is_pep484_tower=True, hint_overrides=beartype.FrozenDict({Self: Any}))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its arguments and result checked, where one of them is an array with a shape."""
    if function.__name__ == "__init__" or not any(map(_names_a_shape, function.__annotations__.values())):
        return function
    return beartype.beartype(conf=CONFIG)(function)


def _names_a_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_names_a_shape, get_args(hint)))
