"""One int8 model in every runtime: whether the numbers are the same, and what each runtime costs.

The reference is JAX's int8 pass, the network that was trained. All runtimes see the same windows, each in a process of
its own (`Apart`): one that dies leaves the others' results. Speed is that of `scripts/sample.py`, as a user runs it.

Shapes: B windows, T time, V vocabulary.
"""

import codecs
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt_jax.benchmarks.report import table
from picogpt_jax.errors import UserError
from picogpt_jax.runtimes.engine import BATCH_SIZE
from picogpt_jax.runtimes.loop import losses
from picogpt_jax.text.batches import evaluation_windows, padded_windows
from picogpt_jax.training.plot import COLOURS, save_png, styled_figure

REFERENCE = "jax"

# token ids [B, T] -> float32 logits [B, T, V]
Forward = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]
# prompts [B, T], new tokens -> the prompts and their likeliest continuations [B, T + new]
Continue = Callable[[npt.NDArray[np.int64], int], npt.NDArray[np.integer]]
Passes = tuple[Forward, Continue]


class Apart:
    """A runtime in a process of its own.

    Attributes:
        passes: its forward pass and its texts; they raise a UserError where the runtime refuses the model
            or its process has ended.

    Args:
        load: gives the passes of a model, in that process, which imports it by its name.
        path: the model.
    """

    def __init__(self, load: Callable[[Path], Passes], path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, load, path), daemon=True)
        self._process.start()
        theirs.close()
        self.passes: Passes = (functools.partial(self._call, 0), functools.partial(self._call, 1))

    def _call(self, which: int, *arguments: Any) -> Any:
        try:
            self._pipe.send((which, arguments))
            result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            raise UserError(f"its process {how}") from None
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, load: Callable[[Path], Passes], path: Path) -> None:
    passes: Passes | None = None
    with contextlib.suppress(EOFError):  # nobody asks any more
        while True:
            which, arguments = pipe.recv()
            try:
                passes = passes or load(path)
                pipe.send(np.asarray(passes[which](*arguments)))
            except (UserError, ImportError) as error:
                pipe.send(UserError(str(error)))


def _attempt(failures: dict[str, str], name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a runtime computes; None where it cannot, which is noted. The reference must."""
    if name in failures:
        return None
    try:
        return function(*arguments)
    except UserError as error:
        if name == REFERENCE:
            raise UserError(f"{name}, the reference: {error}") from None
        failures[name] = str(error)
        return None


@dataclasses.dataclass
class Agreement:
    """How one runtime's logits compare with the reference's.

    Attributes:
        loss: mean over the targets, nats.
        largest_difference: max |logit - reference logit|.
        same_next_token: share of the places where both find the same token the likeliest.
    """

    loss: float = 0.0
    largest_difference: float = 0.0
    same_next_token: float = 0.0


@dataclasses.dataclass(frozen=True)
class Start:
    """One process of `sample.py`.

    Attributes:
        first_token_seconds: from the start of the process to its first new character.
        tokens_per_second: between its first and its last new characters.
    """

    first_token_seconds: float
    tokens_per_second: float

    @classmethod
    def of(cls, arrivals: Sequence[tuple[float, int]]) -> "Start":
        """From (seconds since the start, new characters so far) of each arrival; one arrival alone has no rate: 0."""
        (first, already), (last, in_all) = arrivals[0], arrivals[-1]
        return cls(first, (in_all - already) / (last - first) if last > first else 0.0)


def agreement(
    forwards: Mapping[str, Forward], ids: npt.NDArray[np.uint16], block_size: int, failures: dict[str, str]
) -> dict[str, Agreement]:
    """Compares every runtime with `forwards[REFERENCE]` in one pass over `ids`, every target once.

    Args:
        failures: runtime -> why it cannot compute; grows. These are left out.
        forwards: runtime -> its forward pass.
        ids: token ids [N]; N - 1 targets.
        block_size: tokens of a window.
    """
    results = {name: Agreement() for name in forwards}
    n_targets = len(ids) - 1
    for starts in evaluation_windows(len(ids), block_size, BATCH_SIZE):
        tokens_BT, targets_BT = padded_windows(ids, starts, block_size)
        counted_BT = targets_BT >= 0
        targets_N = targets_BT[counted_BT]
        computed = {
            name: _attempt(failures, name, forward, tokens_BT.astype(np.int64)) for name, forward in forwards.items()
        }
        reference_NV = np.asarray(computed[REFERENCE], np.float32)[counted_BT]
        for name, logits_BTV in computed.items():
            if logits_BTV is None:
                continue
            logits_NV = np.asarray(logits_BTV, np.float32)[counted_BT]
            result, share = results[name], len(targets_N) / n_targets
            result.loss += float(losses(logits_NV, targets_N).mean()) * share
            difference = float(np.abs(logits_NV - reference_NV).max())
            result.largest_difference = max(result.largest_difference, difference)
            result.same_next_token += float((logits_NV.argmax(-1) == reference_NV.argmax(-1)).mean()) * share
    return {name: result for name, result in results.items() if name not in failures}


def same_texts(
    continues: Mapping[str, Continue],
    ids: npt.NDArray[np.integer],
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    failures: dict[str, str],
) -> dict[str, float]:
    """The share of prompts that a runtime continues, greedily, with exactly the reference's text.

    The prompts are taken from `ids` at even distances; `failures` as in `agreement`.

    Raises:
        UserError: `ids` has no room for so many prompts.
    """
    last = len(ids) - prompt_tokens
    if last + 1 < prompts:
        raise UserError(f"{len(ids)} tokens hold no {prompts} prompts of {prompt_tokens}; ask for fewer, or more text")
    starts = np.linspace(0, last, prompts).astype(np.int64)
    prompts_BT = np.stack([ids[start : start + prompt_tokens] for start in starts]).astype(np.int64)
    texts = {name: _attempt(failures, name, go_on, prompts_BT, new_tokens) for name, go_on in continues.items()}
    expected = texts[REFERENCE]
    return {name: float((text == expected).all(-1).mean()) for name, text in texts.items() if text is not None}


def time_process(command: Sequence[str], prompt_characters: int) -> Start:
    """Runs a command that prints its prompt and then new characters; times their arrival on its standard output.

    Raises:
        UserError: the command fails, or prints nothing after its prompt; the message is the command's own.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    output = process.stdout.fileno()
    decoder = codecs.getincrementaldecoder("utf-8")()
    arrivals: list[tuple[float, int]] = []  # seconds since the start, new characters so far
    printed = 0
    while piece := os.read(output, 1 << 16):  # as soon as it is there
        printed += len(decoder.decode(piece))
        if printed > prompt_characters:
            arrivals.append((time.perf_counter() - began, printed - prompt_characters))
    _, error = process.communicate()
    if process.returncode or not arrivals:
        lines = error.decode(errors="replace").strip().splitlines() or ["it printed nothing"]
        raise UserError(f"{' '.join(map(str, command))}: {lines[-1].removeprefix('error: ')}")
    return Start.of(arrivals)


def disk_bytes(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


# How a figure is printed and drawn: key of a row -> (heading, format, title of its panel if it has one).
COLUMNS = {
    "loss": ("loss", ".6f", ""),
    "loss_difference": ("- jax", "+.1e", "|loss - JAX's|, nats"),
    "largest_difference": ("largest logit diff.", ".1e", "largest logit difference"),
    "same_next_token": ("same next token", ".3%", "same next token"),
    "same_texts": ("same text", ".0%", ""),
    "tokens_per_second": ("tokens/s", ",.0f", "tokens/s, one stream"),
    "first_token_seconds": ("first token s", ".2f", "seconds to the first token, cold start"),
    "bytes": ("bytes", ",d", "bytes on disk"),
}
LOGARITHMIC = ("loss_difference", "largest_difference")  # panels


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as aligned text; what a row lacks stays blank. A row may say why: `error`."""
    cells = [["runtime", *(heading for heading, _, _ in COLUMNS.values())]]
    for row in rows:
        values = [(row.get(key), style) for key, (_, style, _) in COLUMNS.items()]
        cells.append([row["runtime"], *("" if value is None else format(value, style) for value, style in values)])
    heading, *lines = table(cells)
    for at, row in enumerate(rows):
        lines[at] += f"  {row['error']}" if row.get("error") else ""
    return "\n".join([heading, "-" * len(heading), *lines])


def draw(rows: Sequence[Mapping[str, Any]], png_path: str | os.PathLike[str], heading: str) -> None:
    """Draws one panel a figure, one bar a runtime.

    Raises:
        UserError: matplotlib is missing.
    """
    with styled_figure(10, 5.5) as figure:
        figure.suptitle(heading, x=0.01, ha="left", fontweight="bold")
        grid: Any = figure.subplots(2, 3)
        panels = [(key, style.lstrip("+"), title) for key, (_, style, title) in COLUMNS.items() if title]
        for axes, (key, style, title) in zip(grid.flat, panels, strict=True):
            names = [row["runtime"] for row in rows if row.get(key) is not None]
            values = [abs(row[key]) for row in rows if row.get(key) is not None]
            if not values:  # it was not measured
                axes.set_visible(False)
                continue
            labels = [format(value, style) if value else "0" for value in values]
            bars = axes.barh(names, values, color=[COLOURS[index % len(COLOURS)] for index in range(len(names))])
            axes.bar_label(bars, labels, padding=3, fontsize=9)
            axes.set_title(title, fontsize=10)
            if key in LOGARITHMIC:
                axes.set_xscale("symlog", linthresh=1e-8)
            axes.margins(x=0.4)
            axes.set_xlim(left=0, right=None if any(values) else 1)
            axes.invert_yaxis()
            axes.xaxis.set_visible(False)
            axes.tick_params(length=0)
    save_png(figure, png_path)
