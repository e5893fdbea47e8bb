"""A vocabulary as Hugging Face's tokenizer files (standard library only); one that came from there goes back unchanged.

Characters become a byte-pair model without merges: each is a word of its own, with our id. Nothing is normalised,
split, added or stripped, so `decode(encode(text)) == text`. A character outside the vocabulary raises (`Unk token ...
not found in the vocabulary`): no id could stand for it, and without an unknown token it would vanish silently. The
library's message holds the unknown token's name alone, so that name says which characters there are.

The shorter texts of a batch are padded on the left, by a token that no text holds: see `padding`.
"""

import json
from typing import Any

from picogpt_jax.text.tokenizer import TokenizerVocabulary
from picogpt_jax.text.vocabulary import Vocabulary

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"

PAD_TOKEN = "\u27e8pad\u27e9"  # in brackets that hardly any text has, where it would be found
NAMED_CHARACTERS = 200  # at most, in a message


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
    if isinstance(vocabulary, TokenizerVocabulary):
        tokenizer = json.loads(vocabulary.definition)
    else:
        tokenizer = _of_characters(vocabulary)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": padding(vocabulary)[0],
        "padding_side": "left",  # what is generated follows the text, not the padding
        "clean_up_tokenization_spaces": False,  # it would take away the space before a full stop
    }
    return {TOKENIZER_FILE: tokenizer, TOKENIZER_CONFIG_FILE: config}


def _of_characters(vocabulary: Vocabulary) -> dict[str, Any]:
    model: dict[str, Any] = {
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
    }
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
        "model": model,
    }


def _unknown_token(vocabulary: Vocabulary) -> str:
    """A name longer than any entry of the vocabulary, so that it is in none: looking it up is what raises."""
    known = repr("".join(vocabulary.itos[:NAMED_CHARACTERS]))
    more = ", ..." if vocabulary.size > NAMED_CHARACTERS else ""
    return f"[a character that is none of the {vocabulary.size} of this model: {known}{more}]"
