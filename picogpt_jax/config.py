"""The configuration as frozen dataclasses: every value typed, every range and cross-field rule checked on construction.

`configs/base.py` declares each key with its default and a comment; this module is what the library works with. It
imports neither JAX nor AQT, so that the exporters and their runtimes stay light.
"""

import dataclasses
import math
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Self

from picogpt_jax.errors import UserError

Activation = Literal["gelu", "gelu_tanh", "relu"]
Arithmetic = Literal["integer", "mixed"]
Bits = Literal[8, None]  # None: float
Granularity = Literal["per_channel", "per_tensor"]
AttentionForm = Literal["auto", "plain", "cudnn", "splash"]
Remat = Literal["none", "block", "dots"]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


Size = Annotated[int, (1, 1 << 20)]  # an integer between these, both included
Count = Annotated[int, (1, 1 << 31)]
Step = Annotated[int, (0, 1 << 40)]


class _Section:
    """Checks every value against its annotation, and makes an int a float where one is meant."""

    def __post_init__(self) -> None:
        where = type(self).__name__.removesuffix("Config").lower()
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            kind, *bounds = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
            key, value = f"{where}.{name}", getattr(self, name)
            choices = typing.get_args(kind)  # of a Literal
            if kind is float and type(value) is int:
                _check(abs(value) < 1 << 1000, f"{key}={str(value)[:20]}... is too large for a float")
                object.__setattr__(self, name, float(value))
            elif None in choices and value == "none":  # as the scripts' own flags spell it
                object.__setattr__(self, name, None)
            elif choices:
                is_one = any(type(value) is type(choice) and value == choice for choice in choices)
                _check(is_one, f"{key}={value!r:.60} is not one of {', '.join(map(repr, choices))}")
            else:
                _check(
                    type(value) is kind, f"{key}={value!r:.60} is a {type(value).__name__}; expected {kind.__name__}"
                )
            for low, high in bounds:
                _check(low <= value <= high, f"{key}={value} is not between {low} and {high}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(_Section):
    """The architecture: a GPT-2/nanoGPT pre-LayerNorm decoder."""

    n_layer: Size
    n_head: Size
    n_embd: Size
    block_size: Size
    vocab_size: Size
    mlp_ratio: Size
    bias: bool
    activation: Activation
    layer_norm_epsilon: float
    dropout: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            self.n_embd % self.n_head == 0,
            f"model.n_embd={self.n_embd} is not a multiple of model.n_head={self.n_head}; change one of them",
        )
        _check(
            0.0 < self.layer_norm_epsilon < 1.0, f"model.layer_norm_epsilon={self.layer_norm_epsilon} is not in (0, 1)"
        )
        _check(0.0 <= self.dropout < 1.0, f"model.dropout={self.dropout} is not in [0, 1)")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_hidden(self) -> int:
        return self.mlp_ratio * self.n_embd

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """The int8 matrices of the model: nanoGPT's name without `.weight` -> (out, in)."""
        width, hidden = self.n_embd, self.n_hidden
        shapes = {"transformer.wte": (self.vocab_size, width), "transformer.wpe": (self.block_size, width)}
        for layer in range(self.n_layer):
            block = f"transformer.h.{layer}"
            shapes[f"{block}.attn.c_attn"] = (3 * width, width)
            shapes[f"{block}.attn.c_proj"] = (width, width)
            shapes[f"{block}.mlp.c_fc"] = (hidden, width)
            shapes[f"{block}.mlp.c_proj"] = (width, hidden)
        return shapes

    def vector_shapes(self) -> dict[str, tuple[int]]:
        """The float vectors of the model: LayerNorm weights and, where `bias` is true, every bias."""
        norms = [f"transformer.h.{layer}.ln_{which}" for layer in range(self.n_layer) for which in (1, 2)]
        norms.append("transformer.ln_f")
        shapes: dict[str, tuple[int]] = {f"{name}.weight": (self.n_embd,) for name in norms}
        if self.bias:
            shapes |= {f"{name}.bias": (self.n_embd,) for name in norms}
            embeddings = ("transformer.wte", "transformer.wpe")
            linear = {name: shape for name, shape in self.matrix_shapes().items() if name not in embeddings}
            shapes |= {f"{name}.bias": (shape[0],) for name, shape in linear.items()}
        return shapes

    @property
    def n_parameters(self) -> int:
        """All parameters; the head is tied to `wte` and counted once."""
        shapes = [*self.matrix_shapes().values(), *self.vector_shapes().values()]
        return sum(math.prod(shape) for shape in shapes)

    @property
    def int8_share(self) -> float:
        """Share of the parameters that an int8 model holds as codes, in [0, 1]."""
        return sum(map(math.prod, self.matrix_shapes().values())) / self.n_parameters

    @property
    def flops_per_token(self) -> float:
        """Forward and backward FLOPs of one trained token: 6 per matmul weight, and attention's 12 L T C.

        The formula of PaLM (arXiv 2204.02311, appendix B), with the causal half of attention counted in full.
        """
        embeddings = self.block_size * self.n_embd  # wpe is looked up; wte counts: the tied head multiplies by it
        vectors = sum(math.prod(shape) for shape in self.vector_shapes().values())
        matmul_weights = self.n_parameters - embeddings - vectors
        return 6.0 * matmul_weights + 12.0 * self.n_layer * self.block_size * self.n_embd


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig(_Section):
    """Quantization-aware training (`picogpt_jax.model.quantization`)."""

    mode: Literal["int8", "none"]
    weight_granularity: Granularity
    activation_bits: Bits
    backward_bits: Bits
    start_step: Step
    arithmetic: Arithmetic = "mixed"  # runs that were made before there was this key

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            self.arithmetic == "mixed" or self.activation_bits == 8,
            "quant.arithmetic=integer needs quant.activation_bits=8; set both, or quant.arithmetic=mixed",
        )
        _check(
            self.backward_bits is None or self.activation_bits == 8,
            "quant.backward_bits=8 needs quant.activation_bits=8; set both, or quant.backward_bits=None",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    dir: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(_Section):
    seed: Annotated[int, (0, 2**32 - 1)]
    batch_size: Count
    max_iters: Step
    gradient_accumulation_steps: Count
    eval_interval: Count
    eval_iters: Count
    log_interval: Count
    dtype: Literal["float32", "bfloat16", "float16", "auto"]
    # With defaults: runs and files that were written before there were these keys were made like this.
    scan_layers: bool = False
    remat: Remat = "none"
    attention: AttentionForm = "auto"
    backward_dtype: Literal["same", "bfloat16", "auto"] = "same"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            self.batch_size % self.gradient_accumulation_steps == 0,
            f"train.batch_size={self.batch_size} is not a multiple of "
            f"train.gradient_accumulation_steps={self.gradient_accumulation_steps}; change one of them",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(_Section):
    learning_rate: float
    min_lr: float
    warmup_iters: Step
    lr_decay_iters: Annotated[int, (1, 1 << 40)]
    weight_decay: float
    beta1: float
    beta2: float
    grad_clip: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("learning_rate", "min_lr", "weight_decay", "grad_clip"):
            value = getattr(self, name)
            _check(math.isfinite(value) and value >= 0.0, f"optimizer.{name}={value} is not a finite number >= 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _check(0.0 <= value < 1.0, f"optimizer.{name}={value} is not in [0, 1)")
        _check(
            self.min_lr <= self.learning_rate,
            f"optimizer.min_lr={self.min_lr} is above optimizer.learning_rate={self.learning_rate}",
        )
        _check(
            self.warmup_iters < self.lr_decay_iters,
            f"optimizer.warmup_iters={self.warmup_iters} must be below optimizer.lr_decay_iters={self.lr_decay_iters}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(_Section):
    data: int
    fsdp: int
    tensor: int

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (self.data, self.fsdp, self.tensor)
        _check(
            all(size >= 1 or size == -1 for size in sizes), f"mesh sizes {sizes} must be positive, or -1 to infer one"
        )
        _check(sizes.count(-1) <= 1, f"mesh sizes {sizes} have more than one -1; only one can be inferred")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(_Section):
    keep: Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig(_Section):
    tensorboard: bool
    wandb: bool
    wandb_project: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training run. `from_dict` and `to_dict` are exact inverses."""

    model: ModelConfig
    quant: QuantConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    log: LogConfig

    @classmethod
    def from_dict(cls, sections: Mapping[str, Mapping[str, Any]]) -> Self:
        """Builds and checks the configuration.

        Args:
            sections: section -> key -> value, as in `configs/base.py`.

        Raises:
            UserError: a section or key is missing or unknown, or a value has the wrong type or range.
        """
        known = {field.name: field.type for field in dataclasses.fields(cls)}
        check_names("config", sections, known)
        built = {name: section_from_dict(known[name], name, sections[name]) for name in known}
        return cls(**built)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)


def section_from_dict(section: Any, name: str, values: Mapping[str, Any]) -> Any:
    """Builds one section's dataclass from a mapping; unknown and missing keys are a `UserError` that names them."""
    fields = dataclasses.fields(section)
    optional = [field.name for field in fields if field.default is not dataclasses.MISSING]
    check_names(name, values, [field.name for field in fields], optional)
    return section(**values)


def check_names(where: str, found: Any, expected: Collection[str], optional: Collection[str] = ()) -> None:
    """Raises a UserError if `found` is no mapping, has a key that is not `expected`, or lacks one that is needed."""
    _check(isinstance(found, Mapping), f"{where} must be a mapping of keys to values, found {type(found).__name__}")
    unknown = sorted(map(str, set(found) - set(expected)))
    missing = sorted(set(expected) - set(found) - set(optional))
    _check(not unknown, f"{where} has unknown keys {unknown!s:.100}; it knows {sorted(expected)}")
    _check(not missing, f"{where} lacks the keys {missing}")
