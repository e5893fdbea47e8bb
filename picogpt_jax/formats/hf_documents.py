"""The JSON files of a Hugging Face `GPT2LMHeadModel`: its architecture, how it generates, its tokenizer.

A tokenizer that came from there goes back unchanged. Characters become a byte-pair model without merges, each a word of
its own, so that `decode(encode(text)) == text`. A character outside the vocabulary raises; the library's message holds
the unknown token's name alone, so that name says which characters there are.
"""

import json
from typing import Any

from picogpt_jax.config import Activation, ModelConfig
from picogpt_jax.text.tokenizer import TokenizerVocabulary
from picogpt_jax.text.vocabulary import Vocabulary

# Our activation -> its name in transformers, where "gelu" is the exact form too.
ACTIVATION_FUNCTIONS: dict[Activation, str] = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
PAD_TOKEN = "\u27e8pad\u27e9"  # in brackets that hardly any text has, where it would be found
NAMED_CHARACTERS = 200  # at most, in a message


def hf_documents(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """The JSON files beside a model: name -> value.

    Raises:
        UserError: the vocabulary has no text.
    """
    return {
        "config.json": gpt2_config(model),
        "generation_config.json": generation_config(model, vocabulary),
        **tokenizer_files(vocabulary, model.block_size),
    }


def gpt2_config(model: ModelConfig) -> dict[str, Any]:
    """What `transformers.GPT2Config` reads. A character vocabulary has no tokens that begin or end a text."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": model.block_size,
        "n_ctx": model.block_size,
        "n_embd": model.n_embd,
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_inner": model.n_hidden,
        "activation_function": ACTIVATION_FUNCTIONS[model.activation],
        "layer_norm_epsilon": model.layer_norm_epsilon,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), model.dropout),
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        "use_cache": True,
        "torch_dtype": "float32",
    }


def generation_config(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """generation_config.json: by default half as many new tokens as there are learned positions.

    What pads a table or a batch is never drawn. There is no `max_length`: transformers warns where it meets the
    `max_new_tokens` that everybody gives.
    """
    return {
        "_from_model_config": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": padding(vocabulary)[1],
        "suppress_tokens": list(range(n_tokens(vocabulary), model.vocab_size)) or None,
        "max_new_tokens": max(model.block_size // 2, 1),
    }


def padding(vocabulary: Vocabulary) -> tuple[str, int]:
    """The token that pads, and its id: the last special one of a tokenizer that has some, else one after all others."""
    if isinstance(vocabulary, TokenizerVocabulary):
        added = json.loads(vocabulary.definition).get("added_tokens") or []
        for token in reversed(added):
            if token.get("special"):
                return token["content"], token["id"]
    return PAD_TOKEN, n_tokens(vocabulary)


def n_tokens(vocabulary: Vocabulary) -> int:
    """The tokens that stand for text; further rows of a model's table pad it."""
    return sum(map(bool, vocabulary.itos))


def tokenizer_files(vocabulary: Vocabulary, block_size: int) -> dict[str, Any]:
    """File name -> JSON value, for `tokenizers.Tokenizer.from_file` and `transformers.AutoTokenizer.from_pretrained`.

    Args:
        vocabulary: its ids are the token ids.
        block_size: the longest text that the model takes; transformers warns of a longer one.
    """
    vocabulary.require_text()
    theirs = json.loads(vocabulary.definition) if isinstance(vocabulary, TokenizerVocabulary) else None
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": padding(vocabulary)[0],
        "padding_side": "left",  # what is generated follows the text, not the padding
        "clean_up_tokenization_spaces": False,  # it would take away the space before a full stop
    }
    return {"tokenizer.json": theirs or _of_characters(vocabulary), "tokenizer_config.json": config}


def _of_characters(vocabulary: Vocabulary) -> dict[str, Any]:
    pad = {"id": padding(vocabulary)[1], "content": PAD_TOKEN, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [pad | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},  # the default puts a space between tokens
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _unknown_token(vocabulary),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {char: index for index, char in enumerate(vocabulary.itos)},
            "merges": [],
        },
    }


def _unknown_token(vocabulary: Vocabulary) -> str:
    """A name longer than any entry of the vocabulary, so that it is in none: looking it up is what raises."""
    known = repr("".join(vocabulary.itos[:NAMED_CHARACTERS]))
    more = ", ..." if vocabulary.size > NAMED_CHARACTERS else ""
    return f"[a character that is none of the {vocabulary.size} of this model: {known}{more}]"
