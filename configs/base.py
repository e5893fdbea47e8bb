"""Every configuration key, declared once. The other files of this folder are short deltas on it.

`picogpt_jax/config.py` holds the types and the checks; `--config.<section>.<key>=value` overrides any key.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.n_layer = 3
    config.model.n_head = 4
    config.model.n_embd = 192  # width; a multiple of n_head
    config.model.block_size = 128  # tokens of context
    config.model.vocab_size = config_dict.placeholder(int)  # None: the data's; more rows pad the table in training
    config.model.mlp_ratio = 2  # hidden width of the MLP / n_embd: 2 in picoGPT, 4 in nanoGPT and GPT-2
    config.model.bias = False  # biases in the linear layers and LayerNorms
    config.model.activation = "gelu"  # gelu (exact, erf) | gelu_tanh (GPT-2's) | relu
    config.model.layer_norm_epsilon = 1e-5
    config.model.dropout = 0.1  # on embeddings, attention weights and residual branches

    config.quant = ConfigDict()
    config.quant.mode = "int8"  # int8: quantization-aware training | none: float
    config.quant.arithmetic = "mixed"  # between the products: mixed: floats | integer: the same bits on every device
    config.quant.weight_granularity = "per_channel"  # one scale per output channel | per_tensor
    # The type `object`: a flag of the type int would not take None.
    config.quant.activation_bits = config_dict.FieldReference(8, field_type=object)  # 8 | None: float activations
    config.quant.backward_bits = config_dict.placeholder(object)  # None: float gradients | 8: AQT, stochastic rounding
    config.quant.start_step = 0  # train in float before this step

    config.data = ConfigDict()
    config.data.dir = ""  # folder with train.bin, val.bin and meta.json

    config.train = ConfigDict()
    config.train.seed = 1337  # of the initialisation, the batches and dropout
    config.train.batch_size = 32  # sequences of one optimizer step, over all devices and accumulation steps
    config.train.max_iters = 8000  # optimizer steps
    config.train.gradient_accumulation_steps = 1  # the batch is computed in this many equal parts, to save memory
    config.train.eval_interval = 250  # steps between evaluations; a checkpoint is written at each
    config.train.eval_iters = 50  # random batches per evaluation
    config.train.log_interval = 10  # steps between training log lines
    config.train.dtype = "auto"  # compute type: float32 | bfloat16 | float16 (loss scaling) | auto (CPU: float32)
    # One block is compiled and run n_layer times, its parameters stacked: deep models compile too long unrolled.
    config.train.scan_layers = False
    # What the backward pass computes again: none | block (all but each block's input) | dots (all but the outputs of
    # linear layers; of int8 ones also the wide outputs)
    config.train.remat = "none"
    # What the operands of the backward pass's products are rounded to, where dtype is float32: same (not rounded) |
    # bfloat16 | auto: bfloat16 on a CPU with instructions for it, which is faster. quant.backward_bits goes before it.
    config.train.backward_dtype = "auto"
    config.train.attention = "auto"  # plain | cudnn (GPU) | splash (TPU) | auto: what is measured to be fastest

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 3e-3
    config.optimizer.min_lr = 3e-4
    config.optimizer.warmup_iters = 200  # steps of linear warm-up
    config.optimizer.lr_decay_iters = 8000  # step at which the cosine reaches min_lr
    config.optimizer.weight_decay = 0.1  # on matrices only
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.99
    config.optimizer.grad_clip = 1.0  # global norm; 0 turns it off

    config.mesh = ConfigDict()  # devices along each mesh axis; -1 takes all that are left
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.checkpoint = ConfigDict()
    config.checkpoint.keep = 2  # newest checkpoints kept, beside the best one

    config.log = ConfigDict()
    config.log.tensorboard = False  # extra: tensorboard
    config.log.wandb = False  # extra: wandb; WANDB_MODE=offline works without an account
    config.log.wandb_project = "picogpt_jax"

    return config
