"""A run of seconds, to see that everything works; the text it writes is noise.

    python data/stdlib_char/prepare.py
    python scripts/train.py --config=configs/debug.py --workdir=runs/debug

Half a minute, most of it compilation; validation loss 2.919 nats.
"""

from ml_collections import ConfigDict

from configs.base import get_config as get_base


def get_config() -> ConfigDict:
    config = get_base()
    config.data.dir = "data/stdlib_char"
    config.model.n_layer = 2
    config.model.n_head = 2
    config.model.n_embd = 32
    config.model.block_size = 32
    config.train.batch_size = 8
    config.train.max_iters = 100
    config.train.eval_interval = 50
    config.train.eval_iters = 10
    config.optimizer.warmup_iters = 10
    config.optimizer.lr_decay_iters = 100
    return config
