"""Tiny Shakespeare by characters, with picoGPT's recipe: 3 layers, width 192, 8,000 steps.

    python data/shakespeare_char/prepare.py
    python scripts/train.py --config=configs/shakespeare_char.py --workdir=runs/shakespeare

9 minutes at 61 to 70 ms a step on two cores with AVX-512 VNNI and bfloat16 (Zen 5), 16 to 22 at 116 to 164 ms on older
ones (Zen 4), best validation loss 1.477 to 1.485 nats; 44 minutes at 332 ms on two AVX2 cores, before steps became
shorter, 1.482. Float parameters and int8 model are within 0.001.
"""

from ml_collections import ConfigDict

from configs.base import get_config as get_base


def get_config() -> ConfigDict:
    config = get_base()
    config.data.dir = "data/shakespeare_char"
    config.quant.arithmetic = "integer"
    return config
