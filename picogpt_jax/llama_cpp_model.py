"""A GGUF file of ours in llama.cpp: logits, loss and text (extra: llama-cpp, which is compiled when it is installed).

llama.cpp computes with its defaults, as it does for everybody; `picogpt_jax.gguf_export` says how that differs from the
int8 model. Text is encoded by our own code with the vocabulary of the file, so that a character outside it is an error.
The context never goes beyond the learned positions, where llama.cpp would abort the process.

Shapes: T time, V vocabulary.
"""

import ctypes
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

try:
    import llama_cpp
except ImportError as error:
    raise ImportError(
        "this needs llama-cpp-python; install it, which compiles it, with: pip install 'picogpt_jax[llama-cpp]'"
    ) from error

from picogpt_jax.errors import UserError
from picogpt_jax.vocabulary import Vocabulary

Tokens = Sequence[int] | npt.NDArray[np.integer]

ERROR_LEVEL = 4  # ggml.h, ggml_log_level
errors: deque[str] = deque(maxlen=8)  # what llama.cpp reported last


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, user_data: Any) -> None:
    if level == ERROR_LEVEL:
        errors.append(text.decode(errors="replace").strip())


llama_cpp.llama_log_set(_log, ctypes.c_void_p())  # its log would stand between the text on the terminal


class LlamaCppModel:
    """A GGUF file, loaded.

    Attributes:
        vocabulary: of the file.
        block_size: learned positions.
        description: what the file says about itself.

    Raises:
        UserError: on construction, llama.cpp cannot load the file, or it is no character-level GPT-2.
    """

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
        self.block_size = int(metadata["gpt2.context_length"])
        self.description = metadata.get("general.description", "")

    def logits(self, tokens_T: Tokens) -> npt.NDArray[np.float32]:
        """Logits [T, V] of the next token after each of `tokens_T`, at positions 0 to T - 1.

        Raises:
            UserError: no token, more than `block_size`, or an id outside the vocabulary.
        """
        ids = self._checked(tokens_T)
        if len(ids) > self.block_size:
            raise UserError(f"{len(ids)} tokens; the model takes 1 to {self.block_size}")
        self._llama.reset()
        self._llama.eval(ids)
        return self._llama.scores[: len(ids)].copy()

    def evaluate(self, tokens: npt.NDArray[np.integer], block_size: int) -> float:
        """Mean loss in nats per token: one pass in consecutive windows, every token but the first a target once.

        Args:
            tokens: token ids, integers [N].
            block_size: window length; the last window is shorter where N - 1 is no multiple of it.

        Raises:
            UserError: fewer than two tokens, an id outside the vocabulary, or a window longer than the model's.
        """
        n_targets = len(tokens) - 1
        if n_targets < 1:
            raise UserError(f"{len(tokens)} tokens; expected at least two")
        if not 1 <= block_size <= self.block_size:
            raise UserError(f"windows of {block_size} tokens; the model takes 1 to {self.block_size}")
        total = 0.0
        for start in range(0, n_targets, block_size):
            window = np.asarray(tokens[start : start + block_size + 1], np.int64)
            targets_T = np.asarray(self._checked(window[1:]))
            logits_TV = self.logits(window[:-1]).astype(np.float64)
            logits_TV -= logits_TV.max(-1, keepdims=True)
            log_sums_T = np.log(np.exp(logits_TV).sum(-1))
            total += float((log_sums_T - logits_TV[np.arange(len(targets_T)), targets_T]).sum())
        return total / n_targets

    def generate(
        self,
        tokens_T: Tokens,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | Sequence[int] = 0,
        overflow: Literal["slide", "refill"] = "slide",
        callback: Callable[[int], object] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Continues `tokens_T`, of which the model sees the last `block_size`.

        Args:
            tokens_T: the prompt, at least one token.
            max_new_tokens: how many tokens to append.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: draw from the k likeliest tokens; None from all.
            seed: of the draws.
            overflow: once `block_size` tokens are seen, "slide" recomputes the window of the last `block_size` tokens
                for every token; "refill" goes on after the last `block_size // 2` tokens, which is far faster.
            callback: called with each token as soon as it is drawn.

        Returns:
            int64 [T + max_new_tokens]: the prompt and what follows.

        Raises:
            UserError: an empty prompt, or an id outside the vocabulary.
        """
        text = self._checked(tokens_T)
        generator = np.random.default_rng(seed)
        self._llama.reset()
        unseen = text[-self.block_size :]
        for _ in range(max_new_tokens):
            if self._llama.n_tokens + len(unseen) > self.block_size:
                kept = self.block_size if overflow == "slide" else max(self.block_size // 2, 1)
                self._llama.reset()
                unseen = text[-kept:]
            self._llama.eval(unseen)
            token = sample(self._llama.scores[self._llama.n_tokens - 1], temperature, top_k, generator)
            unseen = [token]
            text.append(token)
            if callback is not None:
                callback(token)
        return np.asarray(text, np.int64)

    def _checked(self, tokens: Tokens) -> list[int]:
        ids = [int(token) for token in tokens]
        self.vocabulary.decode(ids)  # raises for an id that is not in it
        if not ids:
            raise UserError("there are no tokens; at least one is needed")
        return ids


def sample(
    logits_V: npt.NDArray[np.float32], temperature: float, top_k: int | None, generator: np.random.Generator
) -> int:
    """Draws one token."""
    if temperature == 0:
        return int(logits_V.argmax())
    ids_K = np.argsort(-logits_V, kind="stable")[:top_k]
    logits_K = logits_V[ids_K].astype(np.float64)
    weights_K = np.exp((logits_K - logits_K[0]) / temperature)
    return int(generator.choice(ids_K, p=weights_K / weights_K.sum()))


def _vocabulary(llama: Any, path: str | os.PathLike[str]) -> Vocabulary:
    """The file's tokens, each of which must be one character."""
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    buffer = ctypes.create_string_buffer(8)
    pieces = []
    for token in range(llama.n_vocab()):
        length = llama_cpp.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, True)
        pieces.append(buffer.raw[: max(length, 0)].decode("utf-8", "replace"))  # a longer one has a negative length
    return Vocabulary.from_json({"type": "char", "itos": pieces}, str(path))
