"""The int8 model in ONNX Runtime (extra: onnx): runs the folder that `picogpt_jax.formats.onnx_export` writes.

Only onnxruntime and NumPy are imported. Every step hands over the keys and values that the step before returned: arrays
in ONNX Runtime's own memory, not copied.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from picogpt_jax.config import ModelConfig
from picogpt_jax.errors import UserError, command, errors_in
from picogpt_jax.int8.int8_model import FORMAT_VERSION, Quantization, check_version, config_from_json
from picogpt_jax.int8.integer_model import INTEGER_VERSION, integer_config_from_json
from picogpt_jax.runtimes.onnx_session import Session
from picogpt_jax.text.reading import vocabulary_from_json
from picogpt_jax.text.vocabulary import Vocabulary

MODEL_FILE = "model.onnx"
METADATA_KEY = "picogpt_jax"  # {"config": config.json of an int8 folder, "vocabulary": vocab.json, ...}
PART_TOKENS = 256  # of several windows, computed at once by a core: what lies between two nodes stays in its cache
MASKS = np.array([[1], [2]])  # what the graph sees; 2 asks for the logits of the last position alone


class KVCache:
    """Keys and values of the first `length` positions, [B, H, length, D] each: what the graph returned.

    Of a mixed model they are float32; of an integer model codes, int8, with their scales, float32 [B, H, length, 1].
    """

    def __init__(self, values: list[npt.NDArray[Any]]) -> None:
        self.values, self.length = values, 0


class OnnxGPT:
    """The exported model.

    Attributes:
        config: the architecture.
        quantization: how it is quantized.
        training: where the model comes from; JSON values.
        vocabulary: as many entries as `config.vocab_size`.

    Args:
        model: the file, or its contents.
        threads: of one operation; None for what is fast (`picogpt_jax.runtimes.onnx_session`).

    Raises:
        UserError: it is no ONNX model, or not one that `onnx_export` wrote.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes, threads: int | None = None) -> None:
        self._session = Session(model, threads)
        self.config, self.quantization, self.training, self.vocabulary, self._is_integer = self._metadata()
        self.block_size, self.vocab_size = self.config.block_size, self.config.vocab_size
        self.digest = self._digest()
        layers = range(self.config.n_layer)
        kinds = ("key", "key_scale", "value", "value_scale") if self._is_integer else ("key", "value")
        parts = [f"{layer}.{kind}" for layer in layers for kind in kinds]
        self._past = [f"past_key_values.{part}" for part in parts]
        self._outputs = ["logits", *(f"present.{part}" for part in parts)]
        self._check_signature()
        # Inputs are taken from these: after a step, whose weights fill the cache, a new array takes 10 to 20 us.
        self._positions, self._masks = np.arange(self.block_size, dtype=np.int64)[None], MASKS
        self._no_positions = [np.zeros(0, "f4" if self._is_float(part) else "i1") for part in self._past]

    @classmethod
    def load(cls, folder: str | os.PathLike[str], threads: int | None = None) -> "OnnxGPT":
        """Reads an exported folder.

        Raises:
            UserError: it holds no `model.onnx` that `onnx_export` wrote.
        """
        path = Path(folder) / MODEL_FILE
        if not path.is_file():
            make = command("scripts/convert.py", input="INT8_FOLDER", to="onnx", output=folder)
            raise UserError(f"{path} does not exist; make it with: {make}")
        with errors_in(path):
            return cls(path, threads)

    @property
    def windows_at_once(self) -> int:
        """Windows that take as long as one; large ones have all cores to themselves."""
        return 1 if self._session.is_large(self.block_size) else self._session.side_by_side

    def _is_float(self, part: str) -> bool:
        return not self._is_integer or part.endswith("_scale")

    def _metadata(self) -> tuple[ModelConfig, Quantization, dict[str, Any], Vocabulary, bool]:
        try:
            metadata = json.loads(self._session.onnx.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "null"))
        except (ValueError, RecursionError):
            metadata = None
        if not isinstance(metadata, dict) or not {"config", "vocabulary"} <= set(metadata):
            raise UserError(f"has no metadata {METADATA_KEY!r} that can be read: it is no export of picogpt_jax")
        is_integer = check_version(metadata["config"], FORMAT_VERSION, INTEGER_VERSION) == INTEGER_VERSION
        if is_integer:
            model, granularity, training = integer_config_from_json(metadata["config"])
            quantization = Quantization(weight_granularity=granularity, activation_bits=8)
        else:
            model, quantization, training = config_from_json(metadata["config"])
        vocabulary = vocabulary_from_json(metadata["vocabulary"], "its vocabulary")
        if vocabulary.size != model.vocab_size:
            found = f"its vocabulary has {vocabulary.size} entries, but model.vocab_size={model.vocab_size}"
            raise UserError(f"{found}; export it again")
        return model, quantization, training, vocabulary, is_integer

    def _digest(self) -> bytes | None:
        """`IntegerModel.digest` of the model that was exported; None of one of mixed arithmetic."""
        if not self._is_integer:
            return None
        digest = json.loads(self._session.onnx.get_modelmeta().custom_metadata_map[METADATA_KEY]).get("digest")
        try:
            return bytes.fromhex(digest)
        except (TypeError, ValueError):
            raise UserError(f"its digest is {digest!r:.40}; export it again") from None

    def _check_signature(self) -> None:
        found = {value.name: value.type for value in self._session.onnx.get_inputs()}
        integers = dict.fromkeys(("input_ids", "attention_mask", "position_ids"), "tensor(int64)")
        types = {True: "tensor(float)", False: "tensor(int8)"}
        expected = integers | {part: types[self._is_float(part)] for part in self._past}
        outputs = [value.name for value in self._session.onnx.get_outputs()]
        if found != expected or outputs != self._outputs:
            names = f"its inputs are {sorted(found)!s:.120} and its outputs {outputs!s:.120}"
            raise UserError(f"{names}; export it again")

    def new_cache(self, batch: int) -> KVCache:
        """A cache of no positions."""
        heads, size = self.config.n_head, self.config.head_size
        sizes = (1 if part.endswith("_scale") else size for part in self._past)
        empty = zip(self._no_positions, sizes, strict=True)
        return KVCache([array.reshape(batch, heads, 0, size) for array, size in empty])

    def forward(
        self, tokens_BT: npt.NDArray[np.int64], cache: KVCache | None = None, last_only: bool = False
    ) -> npt.NDArray[np.float32]:
        """Logits of the next token at every position, float32 [B, T, V]; see `picogpt_jax.runtimes.loop.Runtime`.

        Raises:
            ValueError: the positions do not fit into `block_size`.
        """
        batch, queries = tokens_BT.shape
        past = cache or self.new_cache(batch)
        if past.length + queries > self.block_size:
            raise ValueError(f"{past.length + queries} positions do not fit into block_size={self.block_size}")
        if cache is None and batch > 1 and self.windows_at_once > 1:
            logits = self._windows(tokens_BT, last_only)
        else:
            outputs = self._outputs[:1] if cache is None else self._outputs
            logits, *past.values = self._session.run(outputs, self._feeds(tokens_BT, past, last_only))
            past.length += queries
        return logits[:, -1:] if last_only else logits  # a file of an earlier release gives all

    def _windows(self, tokens_BT: npt.NDArray[np.int64], last_only: bool) -> npt.NDArray[np.float32]:
        """`forward` of several windows without a cache, in parts that are computed side by side."""
        batch, queries = tokens_BT.shape
        rows = min(-(-batch // self.windows_at_once), max(PART_TOKENS // queries, 1))
        parts = [tokens_BT[first : first + rows] for first in range(0, batch, rows)]
        feeds = [functools.partial(self._feeds, part, self.new_cache(len(part)), last_only) for part in parts]
        return np.concatenate([logits for (logits,) in self._session.run_all(self._outputs[:1], feeds)])

    def _feeds(self, tokens_BT: npt.NDArray[np.int64], past: KVCache, last_only: bool) -> dict[str, npt.NDArray[Any]]:
        """The graph's inputs."""
        batch, queries = tokens_BT.shape
        end = past.length + queries
        masks = self._masks  # which another thread may replace
        if batch * end > masks.shape[1]:
            masks = self._masks = MASKS.repeat(batch * self.block_size, 1)
        feeds: dict[str, npt.NDArray[Any]]
        feeds = {"input_ids": tokens_BT, "attention_mask": masks[int(last_only), : batch * end].reshape(batch, end)}
        feeds["position_ids"] = self._positions[:, past.length : end].repeat(batch, 0)
        return feeds | dict(zip(self._past, past.values, strict=True))
