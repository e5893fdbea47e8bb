"""AdamW with decay on matrices alone, global-norm clipping, linear warm-up and cosine decay (nanoGPT's recipe)."""

from typing import Any

import jax
import optax

from picogpt_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """step -> learning rate.

    Step s < warmup_iters: learning_rate * (s + 1) / (warmup_iters + 1). Then a half cosine down to min_lr, reached at
    lr_decay_iters and kept.
    """
    warmup, decay = config.warmup_iters, config.lr_decay_iters
    first = config.learning_rate / (warmup + 1)
    rise = optax.linear_schedule(first, config.learning_rate, warmup)
    alpha = config.min_lr / config.learning_rate if config.learning_rate else 0.0
    fall = optax.cosine_decay_schedule(config.learning_rate, decay - warmup, alpha)
    return optax.join_schedules([rise, fall], [warmup])


def decay_mask(params: Any) -> Any:
    """True for the matrices (kernels and embedding tables), False for biases and LayerNorm scales."""
    return jax.tree.map(lambda parameter: parameter.ndim >= 2, params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, then AdamW with decoupled weight decay (arXiv 1711.05101)."""
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    adamw = optax.adamw(
        learning_rate_schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=1e-8,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(clip, adamw)
