"""GPT-2 (124M) from scratch on GPT-2's byte pairs, with nanoGPT's recipe.

The data are the `train.bin` and `val.bin` that nanoGPT's `data/openwebtext/prepare.py` writes; GPT-2's `tokenizer.json`
beside them, where there is one, lets the model read and write text. Eight GPUs or TPU chips, then 256 chips:

    python scripts/train.py --config=configs/gpt2.py --config.data.dir=data/openwebtext --workdir=runs/gpt2
    python scripts/train.py --config=configs/gpt2.py --config.data.dir=data/openwebtext --workdir=runs/gpt2 \
        --config.train.gradient_accumulation_steps=1

No step of this size was run; the same code ran at a small width, on eight CPU devices (tests/test_mesh.py).
"""

from ml_collections import ConfigDict

from configs.base import get_config as get_base


def get_config() -> ConfigDict:
    config = get_base()
    config.model.n_layer = 12
    config.model.n_head = 12
    config.model.n_embd = 768
    config.model.block_size = 1024
    config.model.vocab_size = 50304  # GPT-2's 50,257, padded to a multiple of 128
    config.model.mlp_ratio = 4
    config.model.bias = True
    config.model.activation = "gelu_tanh"
    config.model.dropout = 0.0  # less than one pass over the text
    config.train.batch_size = 512  # half a million tokens; nanoGPT's 480 does not divide over 256 devices
    config.train.gradient_accumulation_steps = 4
    config.train.max_iters = 600_000
    config.train.eval_interval = 1000
    config.train.eval_iters = 10  # batches of 512
    config.train.dtype = "bfloat16"
    config.train.scan_layers = True
    config.train.remat = "dots"
    config.optimizer.learning_rate = 6e-4
    config.optimizer.min_lr = 6e-5
    config.optimizer.warmup_iters = 2000
    config.optimizer.lr_decay_iters = 600_000
    config.optimizer.beta2 = 0.95
    return config
