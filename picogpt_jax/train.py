"""Training: the step, and the loop around it as a recipe that reads from top to bottom."""

import dataclasses
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from flax import linen as nn
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt16

from picogpt_jax import checkpoint, sharding
from picogpt_jax.config import Config
from picogpt_jax.data import Tokens, batch_starts
from picogpt_jax.devices import compiler_options
from picogpt_jax.dropout import DropoutKey, fold
from picogpt_jax.errors import UserError
from picogpt_jax.evaluate import Evaluator, bits_per_char
from picogpt_jax.files import read_json, write_json
from picogpt_jax.metrics import MetricsWriter, ProgressBar
from picogpt_jax.model import GPT
from picogpt_jax.optimizer import learning_rate_schedule, make_optimizer
from picogpt_jax.quantization import Mode
from picogpt_jax.vocabulary import Vocabulary

RESIDENT_BYTES = 256 << 20  # a training split up to this size lies on the device
# What a resumed run may change: nothing that moves a parameter, but for the length and the shape of the machine.
FREE_ON_RESUME = frozenset(
    {
        *("train.max_iters", "train.eval_interval", "train.eval_iters", "train.log_interval"),
        *("train.gradient_accumulation_steps", "data.dir", "mesh.data", "mesh.fsdp", "mesh.tensor"),
        *("checkpoint.keep", "log.tensorboard", "log.wandb", "log.wandb_project"),
    }
)
FIRST_LOSS_SCALE = 2.0**15  # float16: as in PyTorch's GradScaler, halved at an overflow, doubled after 2,000 good steps
STEPS_TO_DOUBLE = 2000
TOKENS_COUNTED = 1 << 20  # tokens of the validation split that tell how many characters one has


@struct.dataclass
class TrainState:
    """All that the next step depends on, besides the configuration and the data."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    loss_scale: Float[Array, ""]  # float16 only; 1 otherwise
    good_steps: Int[Array, ""]  # since the loss scale last changed


@struct.dataclass
class StepMetrics:
    loss: Float[Array, "..."]
    grad_norm: Float[Array, "..."]


def compute_dtype(name: str) -> jnp.dtype:
    """The compute type of `train.dtype`; "auto" is float32 on CPU and bfloat16 on accelerators."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


class Trainer:
    """The compiled parts of one run: initialisation, training steps, evaluation; nothing here touches the disk."""

    def __init__(self, config: Config, devices: list[jax.Device] | None = None) -> None:
        self.config = config
        self.dtype = compute_dtype(config.train.dtype)
        self.optimizer = make_optimizer(config.optimizer)
        micro_batch = config.train.batch_size // config.train.gradient_accumulation_steps
        self.mesh: Mesh = sharding.make_mesh(config.mesh, micro_batch, devices)
        self.abstract_state = self._abstract_state()
        # (state, corpus or None, batches [K, ...], mode) -> (state, metrics [K]): K steps in one dispatch
        self.steps = jax.jit(self._steps, static_argnums=3, donate_argnums=0, compiler_options=compiler_options())

    def model(self, mode: Mode) -> GPT:
        return GPT(self.config.model, self.config.quant, mode, self.dtype)

    def mode_at(self, step: int) -> Mode:
        quant = self.config.quant
        return "train" if quant.mode == "int8" and step >= quant.start_step else "float"

    def _init_params(self) -> Any:
        tokens = jnp.zeros((1, 1), jnp.int32)
        return self.model("float").init(jax.random.key(self.config.train.seed), tokens)["params"]

    def _init_state(self) -> TrainState:
        return self._first_state(nn.unbox(self._init_params()))

    def _first_state(self, params: Any) -> TrainState:
        scale = FIRST_LOSS_SCALE if self.dtype == jnp.float16 else 1.0
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=self.optimizer.init(params),
            loss_scale=jnp.float32(scale),
            good_steps=jnp.int32(0),
        )

    def _abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, without computing it."""
        state = jax.eval_shape(self._init_state)
        param_shardings = sharding.parameter_shardings(jax.eval_shape(self._init_params), self.mesh)
        everywhere = sharding.replicated(self.mesh)
        shardings = dataclasses.replace(
            jax.tree.map(lambda _: everywhere, state),
            params=param_shardings,
            opt_state=optax.tree.map_params(
                self.optimizer,
                lambda _, place: place,
                state.opt_state,
                param_shardings,
                transform_non_params=lambda _: everywhere,
            ),
        )
        return checkpoint.abstract(state, shardings)

    def init(self, params: Any = None) -> TrainState:
        """The state before the first step, with new parameters or with `params`, such as imported ones."""
        shardings = jax.tree.map(lambda array: array.sharding, self.abstract_state)
        options: dict[str, Any] = dict(out_shardings=shardings, compiler_options=compiler_options())
        if params is None:
            return jax.jit(self._init_state, **options)()
        return jax.jit(self._first_state, **options)(params)

    def _loss(self, params: Any, tokens_BT1: Int[Array, "B T1"], key: DropoutKey, mode: Mode) -> Float[Array, ""]:
        # Of int8 gradients; without quant.backward_bits nothing is drawn from it.
        rngs = {"stochastic_rounding": jax.random.fold_in(jax.random.key(key.seed), key.row)}
        logits_BTV = self.model(mode).apply({"params": params}, tokens_BT1[:, :-1], key, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT1[:, 1:]).mean()

    def _gradients(self, state: TrainState, tokens_BT1: Int[Array, "B T1"], mode: Mode) -> tuple[Float[Array, ""], Any]:
        """Mean loss and gradient of a batch, computed in `gradient_accumulation_steps` parts."""
        seed = fold(jnp.uint32(self.config.train.seed), state.step.astype(jnp.uint32))
        parts = self.config.train.gradient_accumulation_steps
        rows = tokens_BT1.shape[0] // parts

        def part(index: Int[Array, ""], tokens: Int[Array, "b T1"]) -> tuple[Float[Array, ""], Any]:
            key = DropoutKey(seed=seed, row=(index * rows).astype(jnp.uint32))
            scaled = lambda params: self._loss(params, tokens, key, mode) * state.loss_scale  # noqa: E731
            loss, gradients = jax.value_and_grad(scaled)(state.params)
            return loss, gradients

        if parts == 1:
            loss, gradients = part(jnp.int32(0), tokens_BT1)
        else:
            split = tokens_BT1.reshape(parts, rows, -1)
            split = lax.with_sharding_constraint(split, sharding.batch_sharding(self.mesh, 1))
            zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), state.params))
            add = lambda total, item: (jax.tree.map(jnp.add, total, part(*item)), None)  # noqa: E731
            (loss, gradients), _ = lax.scan(add, zero, (jnp.arange(parts), split))
        factor = 1.0 / (parts * state.loss_scale)
        return loss * factor, jax.tree.map(lambda gradient: gradient * factor, gradients)

    def _step(self, state: TrainState, tokens_BT1: Int[Array, "B T1"], mode: Mode) -> tuple[TrainState, StepMetrics]:
        loss, gradients = self._gradients(state, tokens_BT1, mode)
        grad_norm = optax.tree.norm(gradients)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        new = dataclasses.replace(state, params=optax.apply_updates(state.params, updates), opt_state=opt_state)
        if self.dtype == jnp.float16:
            new = _after_loss_scaling(state, new, jnp.isfinite(grad_norm))
        return dataclasses.replace(new, step=state.step + 1), StepMetrics(loss=loss, grad_norm=grad_norm)

    def _steps(
        self, state: TrainState, corpus: UInt16[Array, " N"] | None, batches: Array, mode: Mode
    ) -> tuple[TrainState, StepMetrics]:
        def body(state: TrainState, batch: Array) -> tuple[TrainState, StepMetrics]:
            if corpus is not None:  # the batch is where its sequences start
                length = self.config.model.block_size + 1
                batch = jax.vmap(lambda start: lax.dynamic_slice_in_dim(corpus, start, length))(batch)
            tokens_BT1 = lax.with_sharding_constraint(batch.astype(jnp.int32), sharding.batch_sharding(self.mesh))
            return self._step(state, tokens_BT1, mode)

        return lax.scan(body, state, batches)

    def evaluator(self, mode: Mode) -> Evaluator:
        quant = dataclasses.replace(self.config.quant, backward_bits=None)  # there are no gradients to round
        model = self.model(mode).clone(quant=quant)

        def forward(params: Any, tokens_BT: Int[Array, "B T"]) -> Any:
            return model.apply({"params": params}, tokens_BT)

        return Evaluator(forward, self.mesh, self.config.model.block_size, self.config.train.batch_size)


def _after_loss_scaling(old: TrainState, new: TrainState, finite: Array) -> TrainState:
    """Keeps the old parameters where a float16 gradient overflowed, and moves the loss scale."""
    kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)
    good_steps = jnp.where(finite, old.good_steps + 1, 0)
    double = good_steps >= STEPS_TO_DOUBLE
    loss_scale = jnp.where(finite, jnp.where(double, old.loss_scale * 2, old.loss_scale), old.loss_scale / 2)
    loss_scale = jnp.maximum(loss_scale, 1.0)
    return dataclasses.replace(kept, loss_scale=loss_scale, good_steps=jnp.where(double, 0, good_steps))


class Batches:
    """The training split as the steps want it: on the device where it is small, else read from disk step by step."""

    def __init__(self, config: Config, tokens: Tokens, mesh: Mesh) -> None:
        self.config, self.tokens, self.mesh = config, tokens, mesh
        resident = tokens.ids.nbytes <= RESIDENT_BYTES
        self.corpus = jax.device_put(np.asarray(tokens.ids), sharding.replicated(mesh)) if resident else None

    def __call__(self, first: int, stop: int) -> Array:
        """The batches of steps first .. stop-1: starts int32 [K, B], or tokens uint16 [K, B, T+1]."""
        train, block_size = self.config.train, self.config.model.block_size
        starts_KB = np.stack(
            [
                batch_starts(train.seed, step, len(self.tokens), train.batch_size, block_size)
                for step in range(first, stop)
            ]
        )
        place = sharding.batch_sharding(self.mesh, 1)
        if self.corpus is not None:
            return jax.device_put(starts_KB.astype(np.int32), place)
        return jax.device_put(self.tokens.windows(starts_KB, block_size + 1), place)


def dispatches(config: Config, first: int) -> Iterator[tuple[int, int]]:
    """Splits the steps from `first` on into runs that end where something is logged, evaluated or changed."""
    train = config.train
    while first < train.max_iters:
        ends = [(first // every + 1) * every for every in (train.log_interval, train.eval_interval)]
        ends += [end for end in (config.quant.start_step, train.max_iters) if end > first]
        yield first, min(ends)
        first = min(ends)


class StopSignal:
    """Notes SIGINT and SIGTERM, so that the loop can save before it leaves; a second one ends the program at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number


@dataclasses.dataclass(frozen=True)
class Result:
    """How a training ended."""

    step: int
    val_loss: float | None  # nats per token, of the last evaluation
    best_val_loss: float
    stopped_by: int | None  # the signal that ended it


def train(
    config: Config, vocabulary: Vocabulary, workdir: str | os.PathLike[str], resume: bool | None = None
) -> Result:
    """Trains until `train.max_iters`; evaluates and saves every `train.eval_interval` steps.

    Args:
        config: the run; `model.vocab_size` is the vocabulary's.
        vocabulary: of the data in `data.dir`.
        workdir: gets checkpoints/, config.json, vocab.json and metrics.jsonl.
        resume: True: there must be something to resume; False: there must not be; None: resume where there is.

    Raises:
        UserError: data, workdir or configuration do not fit, or the loss stopped being finite.
    """
    workdir = Path(workdir)
    tokens = {
        split: Tokens.open(config.data.dir, split, config.model.block_size, config.model.vocab_size)
        for split in ("train", "val")
    }
    check_resumable(workdir, config, vocabulary, resume)
    trainer = Trainer(config)
    with checkpoint.Checkpoints(workdir, config.checkpoint.keep) as checkpoints, StopSignal() as stop:
        state, first, best, resume_step = begin(trainer, checkpoints, workdir)
        val_loss = None
        write_json(workdir / "config.json", config.to_dict())
        vocabulary.save(workdir / "vocab.json")

        def save(step: int, val_loss: float | None, ranked: bool = False) -> None:
            meta = {
                "config": config.to_dict(),
                "vocab": vocabulary.to_json(),
                "val_loss": val_loss,
                "best_val_loss": best,
            }
            checkpoints.save(step, state, meta, val_loss if ranked else None)

        batches = Batches(config, tokens["train"], trainer.mesh)
        evaluators: dict[Mode, Evaluator] = {}
        max_windows = config.train.eval_iters * config.train.batch_size
        sample = tokens["val"].ids[:TOKENS_COUNTED]
        tokens_per_char = len(sample) / vocabulary.n_characters(sample)
        with (
            MetricsWriter(workdir, config.log, config.to_dict(), resume_step) as writer,
            ProgressBar(config.train.max_iters, first) as progress,
        ):
            log = TrainLog(config, writer, progress)
            step = first
            for start, step in dispatches(config, first):
                mode = trainer.mode_at(start)
                state, metrics = trainer.steps(state, batches.corpus, batches(start, step), mode)
                evaluate = step % config.train.eval_interval == 0 or step == config.train.max_iters
                stopping = stop.received is not None  # asked once: a signal after this ends the next dispatch
                log.enqueue(start, step, metrics, flush=evaluate or stopping)
                if log.failed_step is not None:
                    _stop_not_finite(f"the loss of step {log.failed_step}", workdir, checkpoints)
                if evaluate:
                    began = time.perf_counter()
                    evaluator = evaluators.setdefault(mode, trainer.evaluator(mode))
                    val_loss = evaluator.loss(state.params, tokens["val"].ids, max_windows)
                    if not math.isfinite(val_loss):
                        _stop_not_finite(f"the validation loss of step {step}", workdir, checkpoints)
                    bits = bits_per_char(val_loss) * tokens_per_char
                    writer.write(step, "val", {"loss": val_loss, "bits_per_char": bits})
                    # Before quant.start_step nothing is quantized yet: such a checkpoint is never the best one.
                    ranked = mode == trainer.mode_at(config.train.max_iters - 1)
                    best = min(best, val_loss) if ranked else best
                    save(step, val_loss, ranked)
                    log.exclude(time.perf_counter() - began)
                if stopping:
                    save(step, None)  # unless the evaluation has just saved it
                    break
    stopped_by = stop.received if step < config.train.max_iters else None
    return Result(step=step, val_loss=val_loss, best_val_loss=best, stopped_by=stopped_by)


def begin(
    trainer: Trainer, checkpoints: checkpoint.Checkpoints, workdir: Path
) -> tuple[TrainState, int, float, int | None]:
    """Where a training starts: from the newest checkpoint, from imported parameters, or from new ones.

    Returns:
        the state, its step, the best validation loss so far, and the step to resume the log at (None: a new log).
    """
    restored = checkpoints.restore_latest(trainer.abstract_state)
    if restored is None:
        if (workdir / "config.json").is_file():
            print(f"{workdir} holds no checkpoint yet: starting at step 0")
        return trainer.init(), 0, math.inf, None
    if checkpoint.IMPORTED in restored.meta:
        print(f"starting from the parameters imported into {workdir}")
        return trainer.init(restored.state.params), 0, math.inf, None
    print(f"resumed {workdir} at step {restored.step}")
    return restored.state, restored.step, restored.meta["best_val_loss"], restored.step


class TrainLog:
    """Turns metrics into log lines, at most one dispatch late, so that the device never waits for the host."""

    def __init__(self, config: Config, writer: MetricsWriter, progress: ProgressBar) -> None:
        self.config, self.writer, self.progress = config, writer, progress
        self.schedule = learning_rate_schedule(config.optimizer)
        self.failed_step: int | None = None
        self._pending: list[tuple[int, int, StepMetrics]] = []
        self._losses: list[float] = []  # of the steps since the last line
        self._seconds: list[float] = []
        self._began = time.perf_counter()

    def enqueue(self, start: int, stop: int, metrics: StepMetrics, flush: bool) -> None:
        """Takes the metrics of steps start .. stop-1; reads those of the dispatch before, and these if ready."""
        self._pending.append((start, stop, metrics))
        ready = [flush or _is_ready(item[2].loss) or item is not self._pending[-1] for item in self._pending]
        read = [item for item, is_ready in zip(self._pending, ready, strict=True) if is_ready]
        self._pending = self._pending[len(read) :]
        losses = [np.asarray(item[2].loss) for item in read]  # waits for the device
        if not read:
            return
        now = time.perf_counter()
        step_seconds = (now - self._began) / (read[-1][1] - read[0][0])
        self._began = now
        for (first, last, item), values in zip(read, losses, strict=True):
            self._record(first, last, values, item, step_seconds)

    def exclude(self, seconds: float) -> None:
        """Leaves time that was not spent on training out of the step time."""
        self._began += seconds

    def _record(
        self, start: int, stop: int, losses: npt.NDArray[np.float32], metrics: StepMetrics, step_seconds: float
    ) -> None:
        if not np.isfinite(losses).all():
            self.failed_step = self.failed_step or start + int(np.argmin(np.isfinite(losses))) + 1
            return
        self._losses += losses.tolist()
        self._seconds.append(step_seconds * (stop - start))
        train = self.config.train
        if stop % train.log_interval and stop != train.max_iters:
            return
        step_seconds = sum(self._seconds) / len(self._losses)
        tokens_per_second = train.batch_size * self.config.model.block_size / step_seconds
        values = {
            "loss": float(np.mean(self._losses)),
            "step_time_ms": 1e3 * step_seconds,
            "tokens_per_second": tokens_per_second,
            "learning_rate": float(self.schedule(stop - 1)),
            "grad_norm": float(metrics.grad_norm[-1]),
        }
        self.writer.write(stop, "train", values)
        self.progress.update(stop, values["loss"], tokens_per_second)
        self._losses, self._seconds = [], []


def _is_ready(array: Any) -> bool:
    return bool(array.is_ready())  # jax.Array has it; its type stub has not


def _stop_not_finite(what: str, workdir: Path, checkpoints: checkpoint.Checkpoints) -> None:
    checkpoints.wait()
    steps = checkpoints.steps
    last = f"the last good checkpoint is step {steps[-1]} in {workdir}" if steps else "no checkpoint had been written"
    raise UserError(
        f"{what} is not finite; {last}; lower optimizer.learning_rate, set optimizer.grad_clip, "
        "or use train.dtype=float32"
    )


def check_resumable(workdir: Path, config: Config, vocabulary: Vocabulary, resume: bool | None) -> None:
    """Refuses a workdir that does not fit: see `train`.

    A run goes on with its own configuration, but for `FREE_ON_RESUME`. Imported parameters are no run yet: they take
    any training that is of their shape and vocabulary.

    Raises:
        UserError: naming the keys that differ from the run in `workdir`.
    """
    exists = (workdir / checkpoint.FOLDER).is_dir() and (workdir / "config.json").is_file()
    if resume and not exists:
        raise UserError(f"--resume: {workdir} holds no run; give the --workdir of one, or leave --resume out")
    if resume is False and exists:
        raise UserError(f"--noresume: {workdir} already holds a run; give another --workdir, or leave --noresume out")
    if not exists:
        return
    newest = _newest_meta(workdir)
    if resume and newest is None:
        raise UserError(
            f"--resume: {workdir} holds no finished checkpoint yet; leave --resume out to start at step 0 again"
        )
    imported = checkpoint.IMPORTED in (newest or {})
    stored = newest["config"] if newest and imported else read_json(workdir / "config.json")
    old = Config.from_dict(stored).to_dict()
    differing = [
        f"{section}.{key} ({old[section][key]!r} there, {value!r} here)"
        for section, values in config.to_dict().items()
        for key, value in values.items()
        if old[section][key] != value and not _may_change(section, key, imported)
    ]
    if differing and imported:
        raise UserError(
            f"{workdir} holds an imported model of another shape: {', '.join(differing)}; use its values, as "
            "configs/finetune.py does, or another --workdir"
        )
    if differing:
        raise UserError(
            f"{workdir} holds a run with another configuration: {', '.join(differing)}; "
            "use its values, or another --workdir"
        )
    if Vocabulary.load(workdir / "vocab.json") != vocabulary:
        raise UserError(f"{workdir} was trained on another vocabulary than {config.data.dir}; use another --workdir")


def _may_change(section: str, key: str, imported: bool) -> bool:
    if imported:
        return section != "model" or key == "dropout"
    return f"{section}.{key}" in FREE_ON_RESUME


def _newest_meta(workdir: Path) -> dict[str, Any] | None:
    """What lies beside the newest checkpoint; None where there is none, nothing where it is damaged."""
    try:
        with checkpoint.Checkpoints(workdir) as checkpoints:
            return checkpoints.meta(checkpoints.steps[-1]) if checkpoints.steps else None
    except UserError:  # the training reports it, and takes the one before it
        return {}
