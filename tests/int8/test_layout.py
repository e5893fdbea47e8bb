"""What a model's file must hold, and that nothing else passes."""

import dataclasses

import numpy as np
import pytest
from test_int8_model import SMALL

from picogpt_jax.config import Granularity, ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.int8.layout import Layout, check_depth, check_layout, float_layout, int8_layout, layout_of

MODEL = ModelConfig(**(SMALL | {"n_layer": 1, "n_head": 2, "n_embd": 4, "block_size": 8, "vocab_size": 3}))
MATRICES = {
    "transformer.wte.weight": (3, 4),
    "transformer.wpe.weight": (8, 4),
    "transformer.h.0.attn.c_attn.weight": (12, 4),
    "transformer.h.0.attn.c_proj.weight": (4, 4),
    "transformer.h.0.mlp.c_fc.weight": (8, 4),
    "transformer.h.0.mlp.c_proj.weight": (4, 8),
}
NORMS = ["transformer.h.0.ln_1.weight", "transformer.h.0.ln_2.weight", "transformer.ln_f.weight"]


def test_the_float_layout_is_nanogpts_without_the_tied_head() -> None:
    expected = {name: ("float32", shape) for name, shape in MATRICES.items()}
    assert float_layout(MODEL) == expected | dict.fromkeys(NORMS, ("float32", (4,)))


@pytest.mark.parametrize(("granularity", "rows"), [("per_channel", None), ("per_tensor", 1)])
def test_the_int8_layout_has_a_scale_beside_each_matrix(granularity: Granularity, rows: int | None) -> None:
    layout = int8_layout(MODEL, granularity)
    for name, shape in MATRICES.items():
        assert layout.pop(name) == ("int8", shape)
        assert layout.pop(f"{name}_scale") == ("float32", (rows or shape[0], 1))
    assert layout == dict.fromkeys(NORMS, ("float32", (4,)))


EXPECTED: Layout = {"a": ("float32", (2, 3)), "b": ("int8", (4,))}


def test_the_expected_layout_passes() -> None:
    check_layout(layout_of({"b": np.zeros(4, np.int8), "a": np.zeros((2, 3), np.float32)}), EXPECTED)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": EXPECTED["a"]}, r"unknown tensors: none; missing tensors: b$"),
        ({**EXPECTED, "c": EXPECTED["b"]}, r"unknown tensors: c; missing tensors: none$"),
        ({**EXPECTED, "a": ("float32", (3, 2))}, r"a is float32 \[3, 2\]; expected float32 \[2, 3\]$"),
        ({**EXPECTED, "b": ("uint8", (4,))}, r"b is uint8 \[4\]; expected int8 \[4\]$"),
        ({**EXPECTED, **{f"x{i}": EXPECTED["b"] for i in range(10)}}, r"x0, x1, x2 and 7 more; missing tensors: none$"),
    ],
)
def test_any_other_layout_is_refused(found: Layout, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_layout(found, EXPECTED)


def test_a_depth_that_no_file_fills_is_refused_before_its_names_are_made() -> None:
    absurd = dataclasses.replace(MODEL, n_layer=1 << 20)
    with pytest.raises(UserError, match=r"n_layer=1048576, but there are only 2 tensors"):
        check_depth(absurd, EXPECTED)
