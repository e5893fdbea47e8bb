"""The compiled parts of a training: the first state, the step, and how batches reach the devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, UInt16

from picogpt_jax.config import AttentionForm, Config
from picogpt_jax.devices import sharding
from picogpt_jax.devices.cpu import has_bfloat16
from picogpt_jax.devices.setup import compiler_options
from picogpt_jax.kernels import fused_attention
from picogpt_jax.model import attention, layers
from picogpt_jax.model.dropout import DropoutKey, fold
from picogpt_jax.model.gpt import GPT
from picogpt_jax.model.numerics import Mode, Numerics
from picogpt_jax.model.quantization import ROUNDING
from picogpt_jax.text.batches import Tokens, batch_starts
from picogpt_jax.training import checkpoint
from picogpt_jax.training.evaluate import Evaluator
from picogpt_jax.training.loss import SMALL_VOCABULARY, mean_loss, time_parts
from picogpt_jax.training.optimizer import make_optimizer

RESIDENT_BYTES = 256 << 20  # a training split up to this size lies on the device
PART_TOKENS, WIDEST = 512, 768  # of `cache_parts`: tokens of a part; the largest n_embd that is computed in parts
FIRST_LOSS_SCALE = 2.0**15  # float16: as in PyTorch's GradScaler, halved at an overflow, doubled after 2,000 good steps
STEPS_TO_DOUBLE = 2000


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


def compute_dtype(name: str, platform: str | None = None) -> jnp.dtype:
    """The compute type of `train.dtype`; "auto" is float32 on CPU and bfloat16 on accelerators.

    Args:
        platform: of the devices; None: the one at hand.
    """
    if name == "auto":
        name = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    return jnp.dtype(name)


def backward_dtype(name: str, dtype: jnp.dtype, platform: str) -> jnp.dtype | None:
    """What `train.backward_dtype` rounds the operands of the backward pass's products to; None: they stay as they are.

    Of several processes on CPU, all must ask, and all get what the first one's processor can do.

    Args:
        dtype, platform: the compute type, and the kind of the devices.
    """
    is_fast = platform == "cpu" and bool(multihost_utils.broadcast_one_to_all(np.int32(has_bfloat16())))
    is_rounded = dtype == jnp.float32 and (name == "bfloat16" or (name == "auto" and is_fast))
    return jnp.dtype("bfloat16") if is_rounded else None


def cache_parts(sequences: int, block_size: int, width: int) -> int:
    """In how many parts a CPU device computes its sequences, so that activations stay in a core's second-level cache.

    A part has `PART_TOKENS` tokens or is one sequence. On Zen 4 cores with 1 MiB each a step is shorter by 10% at width
    192, 11% at 384 and 3% at 768, and longer by 10% at 1,024, where adding up the parts' gradients costs more.
    """
    if width > WIDEST:
        return 1
    fits = max(PART_TOKENS // block_size, 1)
    return next(parts for parts in range(1, sequences + 1) if sequences % parts == 0 and sequences // parts <= fits)


class Trainer:
    """The compiled parts of one run: initialisation, training steps, evaluation; nothing here touches the disk.

    `vocabulary_size`: token ids of the data, where `model.vocab_size` is padded beyond them.
    """

    def __init__(
        self, config: Config, devices: list[jax.Device] | None = None, vocabulary_size: int | None = None
    ) -> None:
        self.config, self.vocabulary_size = config, vocabulary_size
        self.optimizer = make_optimizer(config.optimizer)
        self.micro_batch = config.train.batch_size // config.train.gradient_accumulation_steps  # what memory holds
        self.mesh: Mesh = sharding.make_mesh(config.mesh, self.micro_batch, devices)
        sharding.check_divides("heads", "the attention heads (model.n_head)", config.model.n_head, self.mesh)
        device = self.mesh.devices.flat[0]
        self.compiler_options = compiler_options(device.platform)
        self.dtype = compute_dtype(config.train.dtype, device.platform)
        self.backward_dtype = backward_dtype(config.train.backward_dtype, self.dtype, device.platform)
        data, fsdp, tensor = self.mesh.devices.shape
        self.share = self.micro_batch // (data * fsdp)  # sequences of a device
        self.parts = config.train.gradient_accumulation_steps
        # Over several processes too, which compute the same bits as one. Int8 gradients have other scales in each part.
        if device.platform == "cpu" and not config.quant.backward_bits:
            self.parts *= cache_parts(self.share, config.model.block_size, config.model.n_embd)
        # Each device adds up the gradients of its own sequences, if it holds all weights: else each part's must move.
        # Float ones of a single part the compiler reduces layer by layer, beside the rest of the backward pass; int8
        # ones it would reduce as int32.
        adds_up = self.parts > 1 or config.quant.backward_bits is not None
        self.reduces_once = adds_up and data > 1 and fsdp == tensor == 1
        self.attention = self._attention(device)
        self.abstract_state = self._abstract_state()
        # (state, corpus or None, batches [K, ...], mode) -> (state, metrics [K]): K steps in one dispatch
        squares = max(leaf.size for leaf in jax.tree.leaves(self.abstract_state.params))  # of the gradient's norm
        longest_sum = max(squares, self.micro_batch * config.model.block_size)  # or of the loss, over tokens
        options = compiler_options(device.platform, longest_sum)
        self.steps = jax.jit(self._steps, static_argnums=3, donate_argnums=0, compiler_options=options)

    def _attention(self, device: jax.Device) -> AttentionForm:
        model = self.config.model
        heads = model.n_head // self.mesh.devices.shape[-1]
        shape = (self.share, heads, model.block_size, model.head_size)

        def measure(form: AttentionForm) -> float:
            numerics = Numerics(self.config.quant, "train", self.dtype, self.backward_dtype, form)
            if numerics.is_integer:
                attend = lambda q, k, v: attention.integer_attend(numerics, model, q, k, v, None, None)[0]  # noqa: E731
                return fused_attention.seconds(attend, shape, jnp.dtype("float32"))
            attend = attention.causal if form == "plain" else functools.partial(fused_attention.fused, form)
            return fused_attention.seconds(attend, shape, self.dtype)

        is_here = device in jax.devices()  # else of a machine that is only compiled for
        wanted = self.config.train.attention
        return fused_attention.choose(wanted, model, self.dtype, device, measure if is_here else None)

    def model(self, mode: Mode) -> GPT:
        train, quant = self.config.train, self.config.quant
        numerics = Numerics(quant, mode, self.dtype, self.backward_dtype, self.attention)
        return GPT(self.config.model, numerics, train.scan_layers, train.remat, self.vocabulary_size)

    def mode_at(self, step: int) -> Mode:
        quant = self.config.quant
        return "train" if quant.mode == "int8" and step >= quant.start_step else "float"

    def _init_model(self) -> GPT:
        model = self.model("float")  # it is called with one token, too few for a kernel
        return model.clone(numerics=dataclasses.replace(model.numerics, attention="plain"))

    def _init_state(self) -> TrainState:
        return self._first_state(layers.initial_params(self._init_model(), jax.random.key(self.config.train.seed)))

    def _first_state(self, params: Any) -> TrainState:
        params = layers.relayout(params, self.config.train.scan_layers)
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
        init = self._init_model().init  # for the names of the dimensions
        boxed = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        param_shardings = sharding.parameter_shardings(boxed, self.mesh)
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
        options: dict[str, Any] = dict(out_shardings=shardings, compiler_options=self.compiler_options)
        if params is None:
            return jax.jit(self._init_state, **options)()
        return jax.jit(self._first_state, **options)(params)

    def stored_as(self, scan_layers: bool) -> "Trainer":
        """The same run with its layers stacked, or one subtree a layer: what a checkpoint may hold."""
        if scan_layers == self.config.train.scan_layers:
            return self
        train = dataclasses.replace(self.config.train, scan_layers=scan_layers, attention=self.attention)
        return Trainer(dataclasses.replace(self.config, train=train), list(self.mesh.devices.flat))

    def adopt(self, state: TrainState) -> TrainState:
        """A state of `stored_as`, with the layers as this run has them."""
        if (layers.STACKED in state.params) == self.config.train.scan_layers:
            return state
        shardings = jax.tree.map(lambda array: array.sharding, self.abstract_state)
        convert = lambda state: layers.relayout(state, self.config.train.scan_layers)  # noqa: E731
        return jax.jit(convert, out_shardings=shardings, compiler_options=self.compiler_options)(state)

    def _loss(
        self, params: Any, tokens_BT1: Int[Array, "B T1"], key: DropoutKey, mode: Mode, scale: Float[Array, ""]
    ) -> Float[Array, ""]:
        """`scale` times the mean loss."""
        # Of int8 gradients; without quant.backward_bits nothing is drawn from it.
        rngs = {ROUNDING: jax.random.fold_in(jax.random.key(key.seed), key.row)}
        apply: Any = functools.partial(self.model(mode).apply, rngs=rngs)
        vocabulary = self.config.model.vocab_size
        is_small = vocabulary <= SMALL_VOCABULARY
        result = apply({"params": params}, tokens_BT1[:, :-1], key, headless=not is_small)  # logits, or before the head
        targets_BT = tokens_BT1[:, 1:]
        if is_small:
            return optax.softmax_cross_entropy_with_integer_labels(result, targets_BT).mean() * scale
        weights = {"params": {"wte": params["wte"]}}
        # Of the second, quantized here and not in each part, there is no gradient.
        both = (weights, None), (weights, apply(weights, method="head_table"))
        head = lambda weights, x_BtC: apply(weights[0], x_BtC, weights[1], method="head")  # noqa: E731
        sequences = targets_BT.shape[0] // sharding.batch_shares()
        parts = time_parts(sequences, targets_BT.shape[1], vocabulary // self.mesh.shape["tensor"])
        return mean_loss(head, *both, result, targets_BT, scale, parts, self.dtype)

    def _gradients(self, state: TrainState, tokens_BT1: Int[Array, "B T1"], mode: Mode) -> tuple[Float[Array, ""], Any]:
        """Mean loss and gradient of a batch, computed in `self.parts` parts, one after another."""
        seed = fold(jnp.uint32(self.config.train.seed), state.step.astype(jnp.uint32))
        place = sharding.batch_sharding(self.mesh, int(self.parts > 1))
        tokens = tokens_BT1
        if self.parts > 1:
            tokens = lax.with_sharding_constraint(tokens.reshape(self.parts, -1, tokens.shape[1]), place)
        summed: Any = functools.partial(self._summed, mode)
        scale = state.loss_scale
        if self.reduces_once:
            scale = scale / self.mesh.size  # the mean over the devices
            whole = PartitionSpec()
            summed = jax.shard_map(
                lambda *operands: lax.psum(self._summed(mode, *operands), sharding.BATCH_AXES),
                in_specs=(whole, whole, whole, place.spec),
                out_specs=whole,
                check_vma=False,  # else `jax.grad` would reduce each gradient where it is computed
            )
        loss, gradients = summed(state.params, seed, scale, tokens)
        factor = 1.0 / (self.parts * state.loss_scale)
        return loss * factor, jax.tree.map(lambda gradient: gradient * factor, gradients)

    def _summed(
        self, mode: Mode, params: Any, seed: Array, scale: Float[Array, ""], tokens: Int[Array, "... b T1"]
    ) -> tuple[Float[Array, ""], Any]:
        """`scale` times the mean loss of each part and its gradient, added up over the parts.

        Args:
            tokens: [b, T1], or [P, b, T1] in parts; a device's own where `self.reduces_once`.
        """
        rows = tokens.shape[-2]

        def part(index: Int[Array, ""], tokens_bT1: Int[Array, "b T1"]) -> tuple[Float[Array, ""], Any]:
            if self.reduces_once:
                index = index * self.mesh.size + lax.axis_index(sharding.BATCH_AXES)
            key = DropoutKey(seed=seed, row=(index * rows).astype(jnp.uint32))
            return jax.value_and_grad(self._loss)(params, tokens_bT1, key, mode, scale)

        if self.parts == 1:
            return part(jnp.int32(0), tokens)
        zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
        add = lambda total, item: (jax.tree.map(jnp.add, total, part(*item)), None)  # noqa: E731
        return lax.scan(add, zero, (jnp.arange(self.parts), tokens))[0]

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

        with sharding.on(self.mesh):
            return lax.scan(body, state, batches)

    def evaluator(self, mode: Mode) -> Evaluator:
        model = self.model(mode)

        def forward(params: Any, tokens_BT: Int[Array, "B T"]) -> Any:
            return model.apply({"params": params}, tokens_BT)

        return Evaluator(forward, self.mesh, self.config.model.block_size, self.micro_batch)


def _after_loss_scaling(old: TrainState, new: TrainState, finite: Array) -> TrainState:
    """Keeps the old parameters where a float16 gradient overflowed, and moves the loss scale."""
    kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)
    good_steps = jnp.where(finite, old.good_steps + 1, 0)
    double = good_steps >= STEPS_TO_DOUBLE
    loss_scale = jnp.where(finite, jnp.where(double, old.loss_scale * 2, old.loss_scale), old.loss_scale / 2)
    loss_scale = jnp.maximum(loss_scale, 1.0)
    return dataclasses.replace(kept, loss_scale=loss_scale, good_steps=jnp.where(double, 0, good_steps))


class Batches:
    """The training split as the steps want it: on the device where it is small, else read from disk step by step.

    Every process has a copy of the small split, from its own file, and reads its own rows of the large one.
    """

    def __init__(self, config: Config, tokens: Tokens, mesh: Mesh) -> None:
        self.config, self.tokens, self.mesh = config, tokens, mesh
        resident = tokens.ids.nbytes <= RESIDENT_BYTES
        whole = lambda index: np.asarray(tokens.ids[index])  # noqa: E731
        everywhere = sharding.replicated(mesh)
        self.corpus = jax.make_array_from_callback(tokens.ids.shape, everywhere, whole) if resident else None

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
            starts = lambda index: starts_KB[index].astype(np.int32)  # noqa: E731
            return jax.make_array_from_callback(starts_KB.shape, place, starts)
        windows = lambda index: self.tokens.windows(starts_KB[index[:2]], block_size + 1)  # noqa: E731
        return jax.make_array_from_callback((*starts_KB.shape, block_size + 1), place, windows)
