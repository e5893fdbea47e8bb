"""From a float model to an int8 one: a few hundred QAT steps on imported parameters.

    python scripts/convert.py --input=ckpt.pt --to=checkpoint --output=runs/tuned --data=data/shakespeare_char
    python scripts/train.py --config=configs/finetune.py --config.data.dir=data/shakespeare_char --workdir=runs/tuned
    python scripts/quantize.py --workdir=runs/tuned --output=runs/tuned/int8

`--data` tells the vocabulary where the file does not. The model is the workdir's; its dropout may be changed. Another
text must be prepared with the model's vocabulary:

    python data/text_char/prepare.py --input_file=my.txt --out_dir=data/mine --vocabulary=runs/tuned/vocab.json
"""

from ml_collections import ConfigDict, config_dict

from configs.base import get_config as get_base


def get_config() -> ConfigDict:
    config = get_base()
    for key, value in config.model.items():  # None: as the model in --workdir has it
        if value is not None:
            config.model[key] = config_dict.placeholder(type(value))
    config.train.max_iters = 500
    config.train.eval_interval = 100
    config.optimizer.learning_rate = 3e-4  # a tenth of a training's: where a training has ended
    config.optimizer.min_lr = 3e-5
    config.optimizer.warmup_iters = 20
    config.optimizer.lr_decay_iters = 500
    return config
