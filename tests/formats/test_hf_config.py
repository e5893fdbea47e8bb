"""config.json and generation_config.json, as transformers reads them; that its logits are ours: test_huggingface.py."""

from typing import Any

import pytest
import torch
from test_int8_model import random_model
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from picogpt_jax.config import Activation
from picogpt_jax.formats.hf_config import generation_config, gpt2_config

VOCABULARY = random_model().vocabulary


def test_every_key_is_one_that_transformers_knows() -> None:
    """An unknown one would be kept as an attribute that nothing reads."""
    known = set(GPT2Config().to_dict()) | {"n_ctx", "torch_dtype"}  # the names of older releases
    assert set(gpt2_config(random_model().model)) <= known
    config = generation_config(random_model().model, VOCABULARY)
    assert set(config) - {"_from_model_config"} <= set(GenerationConfig().to_dict())


def test_no_token_begins_or_ends_a_text_and_no_letter_pads() -> None:
    """GPT-2's own default, 50256, is outside the vocabulary."""
    config = GPT2Config.from_dict(gpt2_config(random_model().model))
    assert [config.bos_token_id, config.eos_token_id] == [None, None]
    for rows, never_drawn in ((11, None), (14, [11, 12, 13])):
        generation = GenerationConfig.from_dict(generation_config(random_model(vocab_size=rows).model, VOCABULARY))
        assert [generation.bos_token_id, generation.eos_token_id, generation.pad_token_id] == [None, None, 11]
        assert generation.suppress_tokens == never_drawn
        assert (generation.max_new_tokens, generation.max_length) == (8, None)


def test_the_model_has_our_sizes() -> None:
    ours = random_model(mlp_ratio=3, bias=True, layer_norm_epsilon=1e-3, dropout=0.25).model
    config = GPT2Config.from_dict(gpt2_config(ours))
    network = GPT2LMHeadModel(config)
    assert network.num_parameters() == ours.n_parameters, "the tied head counts once"
    assert network.lm_head.weight is network.transformer.wte.weight
    assert network.transformer.ln_f.eps == 1e-3
    assert {module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("gelu", torch.nn.GELU()),
        ("gelu_tanh", torch.nn.GELU(approximate="tanh")),
        ("relu", torch.nn.ReLU()),
    ],
)
def test_the_activation_is_ours(activation: Activation, expected: Any) -> None:
    name = gpt2_config(random_model(activation=activation).model)["activation_function"]
    x = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(ACT2FN[name](x), expected(x), rtol=0, atol=1e-6)
