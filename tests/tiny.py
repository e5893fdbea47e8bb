"""A run so small that it compiles in a second or two, for the tests that train."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from configs.base import get_config
from picogpt_jax.config import Config
from picogpt_jax.devices import setup
from picogpt_jax.text.vocabulary import Vocabulary

VOCABULARY = Vocabulary.from_text("\n abcdefghij")  # 12 characters
TEXT = "abcdefghij" * 40  # each character tells the next one
TRAIN_BIN = VOCABULARY.encode(TEXT)
BATCHES = TRAIN_BIN[np.arange(32).reshape(4, 8, 1) + np.arange(9)]  # of four steps: uint16 [4, 8, 9]
TINY = {
    "model": dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=VOCABULARY.size),
    "train": dict(batch_size=8, max_iters=8, eval_interval=4, eval_iters=2, log_interval=2)
    | dict(dtype="float32", backward_dtype="same"),  # the same on every processor
    "optimizer": dict(learning_rate=3e-2, min_lr=3e-3, warmup_iters=2, lr_decay_iters=120),
    "mesh": dict(data=1),
}


def tiny_config(data_dir: Path | str = "", **changes: Any) -> Config:
    """The tiny run; `model__n_layer=2` changes a key."""
    sections = get_config().to_dict()
    for section, values in TINY.items():
        sections[section] |= values
    sections["data"]["dir"] = str(data_dir)
    for path, value in changes.items():
        section, key = path.split("__")
        assert key in sections[section], path
        sections[section][key] = value
    return Config.from_dict(sections)


def write_data(folder: Path, train: str, val: str | None = None) -> Path:
    """Writes what a prepare.py writes, with the tiny run's vocabulary; returns the folder."""
    folder.mkdir(exist_ok=True)
    VOCABULARY.encode(train).tofile(folder / "train.bin")
    VOCABULARY.encode(val or train).tofile(folder / "val.bin")
    VOCABULARY.save(folder / "meta.json")
    return folder


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Compiles in a third of the time, for tests that do not compare bits between two programs."""
    with mock.patch.dict(setup.COMPILER_OPTIONS, xla_backend_optimization_level="0"):
        yield


def same(one: Any, other: Any) -> bool:
    """Whether two trees hold the same bits."""
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), one, other)))
