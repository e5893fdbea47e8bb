"""Paul Graham's essays by characters, with the recipe of `shakespeare_char.py`.

python data/graham_char/prepare.py
python scripts/train.py --config=configs/graham_char.py --workdir=runs/graham
"""

from ml_collections import ConfigDict

from configs.base import get_config as get_base


def get_config() -> ConfigDict:
    config = get_base()
    config.data.dir = "data/graham_char"
    config.quant.arithmetic = "integer"
    return config
