"""GPT-2 XL (1.5B) from scratch on GPT-2's byte pairs; data as for `gpt2.py`, parameters split over the devices (FSDP).

    python scripts/train.py --config=configs/gpt2_xl.py --config.data.dir=data/openwebtext --workdir=runs/gpt2_xl
    python scripts/train.py --config=configs/gpt2_xl.py --config.data.dir=data/openwebtext --workdir=runs/gpt2_xl \
        --config.mesh.fsdp=16 --config.train.gradient_accumulation_steps=1

The learning rate and the batch of a million tokens are those of the nearest size, 1.3B, in table 2.1 of the GPT-3 paper
(arXiv 2005.14165); GPT-2's own were never published. 25 heads divide over no power of two: keep mesh.tensor=1.

No step of this size was run: it was compiled only.
"""

from ml_collections import ConfigDict

from configs.gpt2 import get_config as get_gpt2


def get_config() -> ConfigDict:
    config = get_gpt2()
    config.model.n_layer = 48
    config.model.n_head = 25
    config.model.n_embd = 1600
    config.train.batch_size = 1024
    config.train.remat = "block"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.min_lr = 2e-5
    config.mesh.data = -1
    config.mesh.fsdp = 8  # up to 64: the width, 1600, divides by no higher power of two
    return config
