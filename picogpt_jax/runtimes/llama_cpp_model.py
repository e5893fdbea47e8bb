"""A GGUF file of ours in llama.cpp, as a runtime (extra: llama-cpp, which is compiled when it is installed).

llama.cpp computes with its defaults; the formats' page says how that differs. Text is encoded by our own code. The
context never goes beyond the learned positions, where llama.cpp would abort the process.

Shapes: B streams, T time, V vocabulary.
"""

import ctypes
import dataclasses
import json
import os
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import llama_cpp
except ImportError as error:
    raise ImportError(
        "this needs llama-cpp-python; install it, which compiles it, with: pip install 'picogpt_jax[llama-cpp]'"
    ) from error

from picogpt_jax.devices.cpu import has_amx_int8
from picogpt_jax.errors import UserError
from picogpt_jax.int8.int8_model import config_from_json
from picogpt_jax.text.reading import vocabulary_from_json
from picogpt_jax.text.vocabulary import Vocabulary

ERROR_LEVEL = 4  # ggml.h, ggml_log_level
errors: deque[str] = deque(maxlen=8)  # what llama.cpp reported last


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, user_data: Any) -> None:
    if level == ERROR_LEVEL:
        errors.append(text.decode(errors="replace").strip())


default_parameters = llama_cpp.llama_cpp.llama_model_default_params


def _parameters() -> Any:
    """Of a model; `Llama` has no argument for this one.

    Virtual machines may show AMX and forbid it: a product with weights that were repacked for it ends the process.
    """
    parameters = default_parameters()
    if has_amx_int8():
        parameters.use_extra_bufts = False
    return parameters


llama_cpp.llama_cpp.llama_model_default_params = _parameters
llama_cpp.llama_log_set(_log, ctypes.c_void_p())  # its log would stand between the text on the terminal


@dataclasses.dataclass(eq=False)
class Seen:
    """The tokens of the first positions, int64 [B, T]; llama.cpp itself keeps the keys and values of one stream."""

    tokens: npt.NDArray[np.int64]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]


class LlamaCppGPT:
    """A GGUF file, loaded; a `picogpt_jax.runtimes.loop.Runtime`.

    Attributes:
        vocabulary: of the file.
        config: the architecture that was exported.
        block_size: learned positions.

    Raises:
        UserError: on construction, llama.cpp cannot load the file, or it is no character-level GPT-2.
    """

    windows_at_once = 1

    def __init__(self, path: str | os.PathLike[str]) -> None:
        threads = max((os.cpu_count() or 1) // 2, 1)  # they spin while they wait: more make a shared machine crawl
        errors.clear()
        try:
            self._llama = llama_cpp.Llama(
                str(path),
                n_ctx=0,  # as many positions as the model has
                logits_all=True,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )
        except ValueError as error:
            reason = errors[0] if errors else error
            raise UserError(f"llama.cpp cannot load {path} ({reason}); convert it again with --to=gguf") from None
        metadata = self._llama.metadata
        if metadata.get("general.architecture") != "gpt2":
            raise UserError(f"{path} is of the architecture {metadata.get('general.architecture')}; expected gpt2")
        self.vocabulary = _vocabulary(self._llama, path)
        try:
            self.config, _, _ = config_from_json(json.loads(metadata.get("picogpt_jax.config", "null")))
        except (ValueError, RecursionError) as error:  # a UserError, too
            raise UserError(f"{path}: picogpt_jax.config: {error}; convert it again with --to=gguf") from None
        self.block_size, self.vocab_size = self.config.block_size, self.vocabulary.size

    def new_cache(self, batch: int) -> Seen:
        """A cache of no positions."""
        return Seen(np.zeros((batch, 0), np.int64))

    def forward(
        self, tokens_BT: npt.NDArray[np.int64], cache: Seen | None = None, last_only: bool = False
    ) -> npt.NDArray[np.float32]:
        """Logits of the next token at every position, float32 [B, T, V]; `last_only`: at the last, [B, 1, V].

        One stream goes on where it was; of several, each is computed from its first position again.

        Raises:
            ValueError: the positions do not fit into `block_size`.
        """
        text_BT = tokens_BT if cache is None else np.concatenate([cache.tokens, tokens_BT], axis=1)
        if text_BT.shape[1] > self.block_size:
            raise ValueError(f"{text_BT.shape[1]} positions do not fit into block_size={self.block_size}")
        if cache is not None:
            cache.tokens = text_BT
        wanted = 1 if last_only else tokens_BT.shape[1]
        return np.stack([self._logits(text_T.tolist())[-wanted:] for text_T in text_BT])

    def _logits(self, text: list[int]) -> npt.NDArray[np.float32]:
        """Logits [T, V] at every position of `text`, of which llama.cpp computes what it has not seen yet."""
        seen = self._llama.n_tokens
        if seen >= len(text) or self._llama.input_ids[:seen].tolist() != text[:seen]:
            self._llama.reset()
            seen = 0
        self._llama.eval(text[seen:])
        return self._llama.scores[: len(text)].copy()


def _vocabulary(llama: Any, path: str | os.PathLike[str]) -> Vocabulary:
    """The file's tokens, each of which must be one character."""
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    buffer = ctypes.create_string_buffer(8)
    pieces = []
    for token in range(llama.n_vocab()):
        length = llama_cpp.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, True)
        pieces.append(buffer.raw[: max(length, 0)].decode("utf-8", "replace"))  # a longer one has a negative length
    return vocabulary_from_json({"type": "char", "itos": pieces}, str(path))
