"""Tiny Shakespeare by characters, with picoGPT's recipe: 3 layers, width 192, 8,000 steps.

    python data/shakespeare_char/prepare.py
    python scripts/train.py --config=configs/shakespeare_char.py --workdir=runs/shakespeare

21 minutes at 157 ms a step on two cores with bfloat16 (Zen 4), best validation loss 1.4805 nats; 44 minutes at 332 ms
on two AVX2 cores, before steps became shorter, 1.4824. Float parameters and int8 model are within 0.001.
"""

from ml_collections import ConfigDict

from configs.base import get_config as get_base


def get_config() -> ConfigDict:
    config = get_base()
    config.data.dir = "data/shakespeare_char"
    return config
