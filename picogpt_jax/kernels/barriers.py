"""Values that a training step computes once and stores.

XLA's CPU compiler copies a cheap computation into every loop that reads its result. In a training step these copies
grow: each reader of the residual stream, forward and backward, added up all earlier layers again, dropout's masks
included. A barrier makes the compiler store the value; the pass that would remove it is left out
(`devices.setup.BARRIER_PASS`). Accelerators decide by themselves what to store.
"""

import jax
from jax import lax
from jaxtyping import Array, Float


@jax.custom_vjp
def materialized(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, computed once and stored, on CPU; so is its gradient. Elsewhere nothing but `x`."""
    return _barrier(x)


@jax.custom_vjp
def scaled(x: Float[Array, "... C"], scale: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """x * scale, where all dimensions of `scale` but the last are 1.

    The gradient of `scale` sums products that are stored on CPU: summed in the loop that makes them, column by column,
    they are made in an order that the cache does not like.
    """
    return x * scale


def _scaled_backward(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, scale = operands
    return gradient * scale, _barrier(gradient * x).sum(range(x.ndim - 1), keepdims=True)


def _barrier(x: Float[Array, "..."]) -> Array:
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


materialized.defvjp(lambda x: (_barrier(x), None), lambda _, gradient: (_barrier(gradient),))
scaled.defvjp(lambda x, scale: (x * scale, (x, scale)), _scaled_backward)
