"""Float steps that give the same result in every runtime: on CPU computed in float64 and rounded once.

An activation's last bit can move its int8 code by one, and that spreads. Runtimes differ in it: in the order of sums,
in exp, erf and rsqrt, and in joining a product with a sum. So what is compared or served computes these in float64 on
CPU and rounds once. Training steps, whose dropout no other runtime repeats, and accelerators use the type at hand.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def in_float64(
    function: Callable[..., Array], exact: bool = True, wide: Callable[..., Array] | None = None
) -> Callable[..., Any]:
    """`function` of float arrays computed in float64 on CPU and rounded to their type; as it is elsewhere.

    Args:
        exact: False gives `function` itself.
        wide: computes the same where `function` is slow in float64.
    """

    def on_cpu(*arrays: Float[Array, "..."]) -> Float[Array, "..."]:
        with jax.enable_x64(True):
            result = (wide or function)(*(lax.convert_element_type(array, jnp.float64) for array in arrays))
            return lax.convert_element_type(result, arrays[0].dtype)

    @jax.custom_jvp
    def computed(*arrays: Float[Array, "..."]) -> Float[Array, "..."]:
        return lax.platform_dependent(*arrays, cpu=on_cpu, default=function)

    @computed.defjvp
    def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
        return computed(*primals), jax.jvp(function, primals, tangents)[1]  # gradients need no such care

    return computed if exact else function


@jax.custom_jvp
def rounded(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, so that the compiler does not join the product that made it with a sum that follows.

    The selection changes no value (but the sign of a zero); its derivative is 1.
    """
    return jnp.where(x == 0, jnp.zeros_like(x), x)


rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0]))

# erf(x) / x on |x| <= 4 as a polynomial in x^2 / 8 - 1, highest power first: interpolated at Chebyshev's nodes, within
# 4e-10 of it; beyond 4, erf is 1 in float32.
ERF = (
    9.40381657863709831e-05,
    -2.46422014530061880e-04,
    1.73229503448773587e-04,
    -3.25519627279535469e-04,
    1.41015289323987488e-03,
    -2.90971295597249437e-03,
    4.77494622056664954e-03,
    -8.38404427609275305e-03,
    1.43810387443963281e-02,
    -2.25625582931081141e-02,
    3.30532916960672649e-02,
    -4.57443126750272377e-02,
    5.98878295830068269e-02,
    -7.47304867970546849e-02,
    9.02089413427963199e-02,
    -1.07710292886412665e-01,
    1.31675117775829631e-01,
    -1.76576235800392278e-01,
    3.53530995643404899e-01,
)


def erf(x: Float[Array, "..."], exact: bool) -> Float[Array, "..."]:
    """The error function; `exact` as in `in_float64`."""
    return in_float64(lax.erf, exact, _erf_polynomial)(x)


def _erf_polynomial(x: Float[Array, "..."]) -> Float[Array, "..."]:
    x = jnp.clip(x, -4.0, 4.0)
    at = x * x * 0.125 - 1.0
    ratio = jnp.full_like(x, ERF[0])
    for coefficient in ERF[1:]:
        ratio = ratio * at + coefficient
    return jnp.clip(x * ratio, -1.0, 1.0)
