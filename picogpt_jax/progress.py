"""tqdm's bar: text on a terminal, a widget in a notebook."""

import warnings

from tqdm import TqdmWarning
from tqdm.asyncio import tqdm_asyncio

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # of a notebook without ipywidgets, where the bar is text
    from tqdm.auto import tqdm

IS_WIDGET = tqdm is not tqdm_asyncio

__all__ = ["IS_WIDGET", "tqdm"]
