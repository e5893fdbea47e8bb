"""What a training report shows of a run: its history, as it was written, and what its model does, computed here."""

import dataclasses
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from picogpt_jax.config import Config
from picogpt_jax.errors import UserError, errors_in
from picogpt_jax.files import read_json
from picogpt_jax.formats import sources
from picogpt_jax.int8 import convert
from picogpt_jax.int8.folder import file_bytes, save_int8_model
from picogpt_jax.int8.integer_model import IntegerModel
from picogpt_jax.model.gpt import GPT
from picogpt_jax.model.numerics import Numerics
from picogpt_jax.runtimes.engine import Sampling
from picogpt_jax.runtimes.jax_model import JaxGPT
from picogpt_jax.text.vocabulary import TokenIds
from picogpt_jax.training.checkpoint import FOLDER
from picogpt_jax.training.metrics import METRICS_FILE, read_metrics
from picogpt_jax.training.plot import Curve, loss_curves

SAMPLING = Sampling(max_new_tokens=500, temperature=0.8, seed=1337)  # the defaults of scripts/sample.py
FLOAT = "float parameters"  # the form that others are compared with
MARK = '<meta name="generator" content="picogpt_jax report">'  # of a file that a new report may replace


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """What a workdir says about its run.

    Attributes:
        name: for people; different for each run of a report.
        train, val: losses in nats per token, against the step.
        rate: the learning rate, against the step.
        unit: of `bits`: "bits per character" or "bits per token".
        bits: of `unit` in a nat.
        changes: what a resumed run changed: step and keys.
    """

    workdir: Path
    name: str
    config: Config
    train: Curve
    val: Curve
    rate: Curve
    unit: str
    bits: float
    changes: list[tuple[int, str]]

    @property
    def dataset(self) -> str:
        """What quantize.py calls it."""
        return Path(self.config.data.dir).name or self.workdir.resolve().name

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss."""
        if not self.val.size:
            return None
        step, loss = self.val[:, self.val[1].argmin()]
        return int(step), float(loss)


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """What a run's best checkpoint does.

    Attributes:
        step: of the checkpoint.
        n_bytes: of the int8 folder that scripts/quantize.py makes of it.
        is_trained: whether the int8 codes are those of the QAT forward pass.
        rows: the error of each int8 matrix.
        text: what the products of `rows` were computed on.
        losses: form of the model -> nats per token; empty where the data are not at hand.
        targets: of the losses; and how many the validation text has.
        samples: form of the model -> what it wrote after the prompt; empty where the token ids stand for no text.
    """

    step: int
    n_parameters: int
    n_bytes: int
    arithmetic: str
    is_trained: bool
    rows: list[convert.TensorReport]
    text: str
    losses: dict[str, float]
    targets: tuple[int, int]
    prompt: str
    samples: dict[str, str]


def read_history(workdir: str | os.PathLike[str], name: str) -> History:
    """Reads `config.json` and `metrics.jsonl`.

    Raises:
        UserError: this is no workdir, or one of these files is missing or damaged.
    """
    workdir = Path(workdir)
    if not (workdir / FOLDER).is_dir():
        raise UserError(f"{workdir} is no workdir of scripts/train.py: it has no folder {FOLDER}/; give one that has")
    with errors_in(workdir / "config.json"):
        config = Config.from_dict(read_json(workdir / "config.json"))
    events = read_metrics(workdir / METRICS_FILE)
    train, val = loss_curves(events, str(workdir))
    rates = [(event["step"], event["learning_rate"]) for event in events if event.get("learning_rate") is not None]
    is_char = not any("bits_per_token" in event for event in events)
    unit = "bits_per_char" if is_char else "bits_per_token"
    of_a_nat = [e[unit] / e["loss"] for e in events if e.get(unit) is not None and e.get("loss")]
    return History(
        workdir=workdir,
        name=name,
        config=config,
        train=train,
        val=val,
        rate=np.array(rates, float).reshape(-1, 2).T,
        unit="bits per character" if is_char else "bits per token",
        bits=of_a_nat[-1] if of_a_nat else 1 / math.log(2),
        changes=[(event["step"], event.get("changes", "")) for event in events if event["split"] == "resume"],
    )


def named(workdirs: Sequence[str], most: int) -> dict[str, Path]:
    """Name -> workdir: the folders' names, or where two are the same, the paths as they were given.

    Raises:
        UserError: there are more than `most`, or one is given twice.
    """
    if len(workdirs) > most:
        raise UserError(f"--workdir names {len(workdirs)} runs; a page can show {most}: give fewer")
    paths = [Path(workdir).expanduser() for workdir in workdirs]
    whole = [path.resolve() for path in paths]
    for path in whole:
        if whole.count(path) > 1:
            raise UserError(f"--workdir names {path} twice; give each run once")
    names = [path.name for path in whole]
    return dict(zip(names if len(set(names)) == len(names) else workdirs, paths, strict=True))


def measure(history: History, start: str | None = None, max_tokens: int | None = None) -> Measurement:
    """Quantizes the best checkpoint as scripts/quantize.py does; compares its forms: float, QAT (if trained so), int8.

    Args:
        start: the prompt; None: the vocabulary's own.
        max_tokens: targets of the losses, of the validation text; None: all.

    Raises:
        UserError: there is no checkpoint, it is damaged, or the vocabulary lacks a character of `start`.
    """
    source = sources.load_float(history.workdir)
    writes = start is not None or not isinstance(source.vocabulary, TokenIds)
    prompt = (source.vocabulary.default_prompt if start is None else start) if writes else ""
    prompt_1T = source.vocabulary.encode(prompt, "--start")[None] if writes else None
    ids = sources.validation_ids(source)
    tokens_BT, text = sources.example(source, ids)
    model, rows = convert.quantized(
        source.config,
        source.quant,
        source.params,
        source.vocabulary,
        {"step": source.step, "val_loss": source.val_loss, "dataset": history.dataset},
        source.qat,
        tokens_BT,
        source.quant.arithmetic,
    )
    with tempfile.TemporaryDirectory() as folder:
        save_int8_model(model, Path(folder) / "int8")
        n_bytes = file_bytes(Path(folder) / "int8")

    forms = {FLOAT: lambda: JaxGPT.from_params(source.config, source.params)}
    if source.qat:
        trained = GPT(source.config, Numerics(source.quant, "train"))
        forms["QAT forward pass"] = lambda: JaxGPT(trained, {"params": source.params})
    forms["int8 model"] = lambda: JaxGPT.from_int8(model)
    losses, samples = {}, {}
    shown = None if ids is None else ids[: None if max_tokens is None else max_tokens + 1]
    for form, engine_of in forms.items():
        engine = engine_of()
        if shown is not None:
            losses[form] = engine.loss(shown)
        if prompt_1T is not None:
            written = np.concatenate([piece_1N[0] for piece_1N in engine.pieces(prompt_1T, SAMPLING)])
            samples[form] = source.vocabulary.decode(written)
    return Measurement(
        step=source.step,
        n_parameters=source.config.n_parameters,
        n_bytes=n_bytes,
        arithmetic="integer" if isinstance(model, IntegerModel) else "mixed",
        is_trained=bool(model.training["quantization_aware"]),
        rows=rows,
        text=text,
        losses=losses,
        targets=(0, 0) if shown is None or ids is None else (len(shown) - 1, len(ids) - 1),
        prompt=prompt,
        samples=samples,
    )
