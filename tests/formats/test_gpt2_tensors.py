"""The one rule for other people's tensors: their names, what is left out, what their shapes tell, what is refused."""

from typing import Any

import numpy as np
import pytest
from test_int8_model import SMALL

from picogpt_jax.config import ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.formats.gpt2_tensors import is_buffer, our_name, read_parameters, renamed, sizes_of
from picogpt_jax.int8.layout import Stored, float_layout

MODEL = ModelConfig(**(SMALL | {"bias": True}))


def stored(*left_out: str, prefix: str = "", **others: np.ndarray) -> dict[str, Stored]:
    """A file of the model's tensors, and of others."""
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name, (_, shape) in float_layout(MODEL).items():
        arrays[f"{prefix}{name}"] = generator.normal(size=shape).astype(np.float32)
    arrays = {name: array for name, array in arrays.items() if name not in left_out}
    arrays |= {name.replace("__", "."): array for name, array in others.items()}
    return {name: Stored(name, (str(x.dtype), x.shape), lambda x=x: x) for name, x in arrays.items()}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("wte.weight", "transformer.wte.weight"),
        ("module._orig_mod.transformer.h.3.ln_1.bias", "transformer.h.3.ln_1.bias"),
        ("_orig_mod.h.3._checkpoint_wrapped_module.ln_1.bias", "transformer.h.3.ln_1.bias"),
        ("module.lm_head.weight", "lm_head.weight"),
        ("module.score.weight", "score.weight"),
        ("my_module.wte.weight", "my_module.wte.weight"),
    ],
)
def test_wrappers_are_taken_off_and_the_trunk_is_put_on(theirs: str, ours: str) -> None:
    assert our_name(theirs) == ours


def test_buffers_are_known_under_every_prefix() -> None:
    for name in ("transformer.h.0.attn.bias", "module.h.11.attn.masked_bias", "x.weight_fake_quant.scale"):
        assert is_buffer(name)
    for name in ("transformer.h.0.attn.c_attn.bias", "transformer.h.0.attn.rotary", "attn.bias", 3):
        assert not is_buffer(name)


def test_the_tensors_tell_all_but_the_heads() -> None:
    sizes = sizes_of(renamed(stored(prefix="module.")))
    assert sizes == {name: getattr(MODEL, name) for name in sizes}
    assert set(vars(MODEL)) - set(sizes) == {"n_head", "activation", "layer_norm_epsilon", "dropout"}


def test_a_table_may_lie_in_another_file_than_the_head() -> None:
    whole = stored()
    table = whole.pop("transformer.wte.weight")
    head = {"lm_head.weight": table._replace(name="lm_head.weight")}
    read = read_parameters(MODEL, renamed(whole, head))
    np.testing.assert_array_equal(read["transformer.wte.weight"], table.read())
    assert read.keys() == float_layout(MODEL).keys()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (stored(module__wpe__weight=np.ones(3)), "transformer.wpe.weight and module.wpe.weight are one tensor"),
        (stored("transformer.wte.weight"), "unknown tensors: none; missing tensors: transformer.wte.weight$"),
        (stored(module__x=np.ones(3)), "unknown tensors: module.x; missing tensors: none$"),
        (stored(lm_head__weight=np.ones((11, 32), np.float32)), "lm_head.weight differs from transformer.wte.weight"),
        (
            stored("transformer.ln_f.bias", ln_f__bias=np.ones(3)),
            r"^ln_f.bias is float64 \[3\]; expected float32",
        ),
        (
            stored("transformer.ln_f.bias", ln_f__bias=np.full(32, np.nan, np.float32)),
            "^ln_f.bias holds values that are not finite",
        ),
    ],
)
def test_what_does_not_fit_is_called_what_the_file_calls_it(found: dict[str, Stored], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_parameters(MODEL, renamed(found))


def test_a_message_stays_short_however_many_tensors_are_wrong() -> None:
    others = {f"a_tensor_of_quite_another_model.{index}": np.ones(1) for index in range(500)}
    with pytest.raises(UserError, match=r"and 497 more; missing tensors: .* and 2. more") as told:
        read_parameters(MODEL, {name: Stored(name, ("float32", (1,)), lambda: np.ones(1)) for name in others})
    assert len(str(told.value)) < 350
