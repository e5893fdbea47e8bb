"""Parameters of a scanned model: the blocks `h_0`, `h_1`, ... stacked into one subtree `h`, dimension 0 the layer.

Only training and its evaluation scan. Everything else, exporters and serving included, takes one subtree per block.
Parameters that leave a training go through `unstack`, those that enter one through `stack`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import Scope
from jaxtyping import Array

from picogpt_jax.model.gpt import GPT
from picogpt_jax.model.linear import init_stddev

STACKED = "h"
PREFIX = "h_"


def stack(params: Any) -> Any:
    """{h_0, h_1, ..., others} -> {h, others}; as it is where it is stacked already."""
    if STACKED in params:
        return params
    n_layer = sum(name.startswith(PREFIX) for name in params)
    others = {name: value for name, value in params.items() if not name.startswith(PREFIX)}
    blocks = [params[f"{PREFIX}{layer}"] for layer in range(n_layer)]
    return others | {STACKED: jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack(params: Any) -> Any:
    """The inverse of `stack`."""
    if STACKED not in params:
        return params
    blocks = params[STACKED]
    n_layer = jax.tree.leaves(blocks)[0].shape[0]
    others = {name: value for name, value in params.items() if name != STACKED}
    unstacked = [jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks) for layer in range(n_layer)]
    return others | {f"{PREFIX}{layer}": block for layer, block in enumerate(unstacked)}


def relayout(tree: Any, scan: bool) -> Any:
    """Stacks or unstacks every parameter tree within `tree`, such as those of the optimizer's state."""
    is_params = lambda node: isinstance(node, dict) and "wte" in node  # noqa: E731
    convert = stack if scan else unstack
    return jax.tree.map(lambda node: convert(node) if is_params(node) else node, tree, is_leaf=is_params)


def initial_params(model: GPT, key: Array) -> Any:
    """The first parameters of `model`: the same values scanned or not.

    Flax draws each parameter from a key that is a hash of where it is. Unrolled, that is one small program a matrix;
    here a stacked matrix takes one program with the keys of all its layers.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    if not model.scan:
        return nn.unbox(model.init(key, tokens)["params"])
    shapes = nn.unbox(jax.eval_shape(model.init, key, tokens)["params"])

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> Array:
        *module, kind = [entry.key for entry in path]
        if kind in ("scale", "bias"):
            return jnp.full(leaf.shape, float(kind == "scale"), leaf.dtype)
        normal = nn.initializers.normal(init_stddev(module[-1], model.config.n_layer))
        if module[0] != STACKED:
            return normal(_parameter_key(key, module), leaf.shape, leaf.dtype)
        keys = [_parameter_key(key, [f"{PREFIX}{layer}", *module[1:]]) for layer in range(leaf.shape[0])]
        return jax.vmap(lambda key: normal(key, leaf.shape[1:], leaf.dtype))(jnp.stack(keys))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _parameter_key(key: Array, module: list[str]) -> Array:
    """The key that flax gives the initialiser of a module's first parameter."""
    scope = Scope({}, {"params": key}, mutable=True)
    for name in module:
        scope = scope.push(name)
    return scope.make_rng("params")
