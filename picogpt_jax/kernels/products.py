"""Matrix products in float32 whose gradients are computed in a narrower type.

CPUs with instructions for bfloat16 take half the time for the two products of the backward pass. Only their operands
are rounded; results and sums stay float32, and the forward pass does not change. XLA (jaxlib 0.10.2) hands a bfloat16
product to YNNPACK, which has such kernels, only if the left operand is [M, K] and both are known to be row-major early
on; so the layouts are arranged here.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# As in `lax.dot_general`: the contracted dimensions of both operands, and their batch dimensions.
Dimensions = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


def dot_general(
    lhs: Float[Array, "... M K"], rhs: Float[Array, "..."], dimensions: Dimensions, dtype: jnp.dtype | None
) -> Float[Array, "..."]:
    """`lax.dot_general`, with the operands of its gradients' products rounded to `dtype`; None: as they are.

    Args:
        lhs: its last dimension is contracted; leading ones are a batch.
        rhs: [..., K, N] or [..., N, K]; what is no matrix, such as heads that are split over devices, has the gradients
            of `lax.dot_general`.
    """
    if dtype is None or lhs.ndim != rhs.ndim:
        return lax.dot_general(lhs, rhs, dimensions)
    return _dot_general(lhs, rhs, dimensions, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot_general(lhs: Array, rhs: Array, dimensions: Dimensions, dtype: jnp.dtype) -> Array:
    return lax.dot_general(lhs, rhs, dimensions)


def _forward(lhs: Array, rhs: Array, dimensions: Dimensions, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return lax.dot_general(lhs, rhs, dimensions), (lhs, rhs)


def _backward(
    dimensions: Dimensions, dtype: jnp.dtype, operands: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    lhs, rhs = operands
    (_, (contracted,)), batch = dimensions
    last, before = lhs.ndim - 1, lhs.ndim - 2
    lhs_gradient = of_rounded(gradient, rhs, (((last,), (before + last - contracted,)), batch), dtype)
    pair = (lhs, gradient) if contracted == before else (gradient, lhs)
    return lhs_gradient, of_rounded(*pair, (((before,), (before,)), batch), dtype)


_dot_general.defvjp(_forward, _backward)


def of_rounded(
    lhs: Float[Array, "..."], rhs: Float[Array, "..."], dimensions: Dimensions, dtype: jnp.dtype
) -> Float[Array, "..."]:
    """`lax.dot_general` of operands rounded to `dtype`, in float32; matrices in the layouts of XLA's CPU kernels."""
    contracted, batch = dimensions
    last, before = lhs.ndim - 1, lhs.ndim - 2
    lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)

    def dot(lhs: Array, rhs: Array, dimensions: Dimensions) -> Array:
        return lax.optimization_barrier(lax.dot_general(lhs, rhs, dimensions, preferred_element_type=jnp.float32))

    if lhs.ndim != rhs.ndim or len(batch[0]) != before:
        return dot(lhs, rhs, dimensions)  # not matrices
    (lhs_contracted,), (rhs_contracted,) = contracted
    if lhs_contracted == last:
        return dot(row_major(lhs), row_major(rhs), dimensions)
    return dot(row_major(lhs.mT), row_major(rhs), (((last,), (rhs_contracted,)), batch))


def row_major(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, stored with its last dimension contiguous.

    XLA takes a transposition to change the layout alone, and looks at it when it picks the kernel; the result of a
    reshape is row-major. Barriers, here and around the product, keep transpositions from being simplified into it.
    """
    return lax.optimization_barrier(lax.optimization_barrier(x[..., None, :]).reshape(x.shape))
