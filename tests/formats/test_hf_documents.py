"""The JSON files, read back by Hugging Face's own libraries; that its logits are ours: test_huggingface.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_int8_model import random_model
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from picogpt_jax.config import Activation
from picogpt_jax.formats.hf_documents import PAD_TOKEN, generation_config, gpt2_config, tokenizer_files
from picogpt_jax.text.vocabulary import Vocabulary

CHARACTERS = random_model().vocabulary

# What a tokenizer may touch: spaces at the ends and in a row, a space before a full stop, contractions, line endings,
# upper case, a combining accent, a digraph that NFKC takes apart, controls, characters beyond the basic plane.
TEXT = "  it 's  .\n\n\r\n\tNo , we 'Re n't! e\u0301é ﬁ \u2028\u00a0日本 🙂🙂\U0010ffff\0\x7f </w>##▁Ġ\n "
VOCABULARY = Vocabulary.from_text(TEXT)


def test_every_key_is_one_that_transformers_knows() -> None:
    """An unknown one would be kept as an attribute that nothing reads."""
    known = set(GPT2Config().to_dict()) | {"n_ctx", "torch_dtype"}  # the names of older releases
    assert set(gpt2_config(random_model().model)) <= known
    config = generation_config(random_model().model, CHARACTERS)
    assert set(config) - {"_from_model_config"} <= set(GenerationConfig().to_dict())


def test_no_token_begins_or_ends_a_text_and_no_letter_pads() -> None:
    """GPT-2's own default, 50256, is outside the vocabulary."""
    config = GPT2Config.from_dict(gpt2_config(random_model().model))
    assert [config.bos_token_id, config.eos_token_id] == [None, None]
    for rows, never_drawn in ((11, None), (14, [11, 12, 13])):
        generation = GenerationConfig.from_dict(generation_config(random_model(vocab_size=rows).model, CHARACTERS))
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


def write(folder: Path, vocabulary: Vocabulary, block_size: int = 1024) -> Path:
    for name, value in tokenizer_files(vocabulary, block_size).items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}), encoding="utf-8")
    return folder


def test_tokenizers_gives_our_ids_and_the_text_again(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(write(tmp_path, VOCABULARY) / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == VOCABULARY.size + 1
    assert tokenizer.token_to_id(PAD_TOKEN) == VOCABULARY.size
    for text in (TEXT, TEXT[::-1], "", *VOCABULARY.itos):
        encoding = tokenizer.encode(text)
        assert encoding.ids == VOCABULARY.encode(text).tolist(), ascii(text)
        assert encoding.tokens == list(text)
        assert tokenizer.decode(encoding.ids) == text


def test_transformers_gives_our_ids_and_the_text_again(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write(tmp_path, VOCABULARY))
    assert len(tokenizer) == VOCABULARY.size + 1
    assert tokenizer.model_max_length == 1024
    assert tokenizer.all_special_tokens == [PAD_TOKEN]
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (VOCABULARY.size, "left")
    for text in (TEXT, TEXT[::-1], *VOCABULARY.itos):
        ids = tokenizer(text)["input_ids"]
        assert ids == VOCABULARY.encode(text).tolist(), ascii(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_transformers_writes_it_again_as_it_was(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write(tmp_path, VOCABULARY))
    tokenizer.save_pretrained(tmp_path / "again")
    again = Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    assert again.encode(TEXT).ids == VOCABULARY.encode(TEXT).tolist()


def test_a_long_text_and_any_order_of_the_vocabulary(tmp_path: Path) -> None:
    chars = [chr(0x4E00 + index) for index in range(5000)]
    vocabulary = Vocabulary(tuple(np.random.default_rng(0).permutation(chars).tolist()))
    text = "".join(chars * 4)
    tokenizer = Tokenizer.from_file(str(write(tmp_path, vocabulary) / "tokenizer.json"))
    assert tokenizer.encode(text).ids == vocabulary.encode(text).tolist()


@pytest.mark.parametrize("char", ["z", "é", "\n", "🙂"])
def test_a_character_outside_the_vocabulary_raises(tmp_path: Path, char: str) -> None:
    folder = write(tmp_path, Vocabulary.from_text("abc "))
    message = r"Unk token `\[a character that is none of the 4 of this model: ' abc'\]` not found"
    with pytest.raises(Exception, match=message):  # the library raises a bare Exception
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode(f"ab{char}c")
    with pytest.raises(Exception, match=message):
        AutoTokenizer.from_pretrained(folder)(f"ab{char}c")
