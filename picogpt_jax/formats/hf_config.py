"""The JSON files of a Hugging Face `GPT2LMHeadModel`: its architecture, how it generates, its tokenizer."""

from typing import Any

from picogpt_jax.config import Activation, ModelConfig
from picogpt_jax.formats.hf_tokenizer import n_tokens, padding, tokenizer_files
from picogpt_jax.text.vocabulary import Vocabulary

# Our activation -> its name in transformers, where "gelu" is the exact form too.
ACTIVATION_FUNCTIONS: dict[Activation, str] = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}


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
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
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


def hf_documents(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """The JSON files beside a model: name -> value."""
    return {
        "config.json": gpt2_config(model),
        "generation_config.json": generation_config(model, vocabulary),
        **tokenizer_files(vocabulary, model.block_size),
    }
