import importlib
import math
from typing import Any

import pytest
from conftest import ROOT

from picogpt_jax.config import Config, ModelConfig, section_from_dict
from picogpt_jax.errors import UserError

CONFIG_FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def sections(name: str = "base", **changes: Any) -> dict[str, dict[str, Any]]:
    """The file's values as plain dicts, with a vocabulary; `model__n_layer=2` changes a key."""
    values = importlib.import_module(f"configs.{name}").get_config().to_dict()
    if values["model"]["vocab_size"] is None:
        values["model"]["vocab_size"] = 65
    for path, value in changes.items():
        section, key = path.split("__")
        assert key in values[section], path
        values[section][key] = value
    return values


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_every_file_in_configs_builds_a_valid_configuration(name: str) -> None:
    base = importlib.import_module("configs.base").get_config()
    values = sections(name)
    if name == "finetune":  # its model is the workdir's
        values["model"] = {key: base.model[key] if value is None else value for key, value in values["model"].items()}
    built = Config.from_dict(values)
    assert {section: set(values) for section, values in built.to_dict().items()} == {
        section: set(values) for section, values in base.to_dict().items()
    }, "a delta may change values, never add keys"


def test_from_dict_and_to_dict_are_inverses() -> None:
    values = sections(model__dropout=0.25, quant__backward_bits=8, train__seed=2**32 - 1, mesh__fsdp=2)
    config = Config.from_dict(values)
    assert config.to_dict() == values
    assert Config.from_dict(config.to_dict()) == config


def test_the_default_model_has_the_documented_number_of_parameters() -> None:
    assert Config.from_dict(sections()).model.n_parameters == 923_136


def test_the_flops_of_a_token_follow_palm() -> None:
    model = Config.from_dict(sections()).model
    matmuls = 65 * 192 + 3 * (
        4 * 192 * 192 + 2 * 2 * 192 * 192
    )  # tied head; per layer qkv + projection, two of the MLP
    assert model.flops_per_token == 6 * matmuls + 12 * 3 * 128 * 192


@pytest.mark.parametrize("bias", [True, False])
def test_every_parameter_is_either_a_matrix_or_a_vector(bias: bool) -> None:
    model = Config.from_dict(sections(model__bias=bias, model__n_layer=1)).model
    vectors = model.vector_shapes()
    weights = {"transformer.h.0.ln_1.weight", "transformer.h.0.ln_2.weight", "transformer.ln_f.weight"}
    linear = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    biases = {name.replace(".weight", ".bias") for name in weights} | {
        f"transformer.h.0.{name}.bias" for name in linear
    }
    assert set(vectors) == (weights | biases if bias else weights)
    if bias:
        assert vectors["transformer.h.0.attn.c_attn.bias"] == (3 * 192,)
        assert vectors["transformer.h.0.mlp.c_fc.bias"] == (2 * 192,)
    assert len(model.matrix_shapes()) == 6


def test_none_is_spelled_as_the_flags_of_the_scripts_spell_it() -> None:
    values = sections()
    values["quant"] |= {"activation_bits": "none", "backward_bits": "none"}
    config = Config.from_dict(values)
    assert (config.quant.activation_bits, config.quant.backward_bits, config.train.remat) == (None, None, "none")
    assert config.to_dict()["quant"]["activation_bits"] is None


def test_an_unknown_or_missing_key_or_section_is_named() -> None:
    with pytest.raises(
        UserError, match=r"train has unknown keys \['lr'\]; it knows \['attention', 'backward_dtype', 'batch_size', "
    ):
        Config.from_dict({**sections(), "train": {**sections()["train"], "lr": 1.0}})
    incomplete = sections()
    del incomplete["optimizer"]["beta1"], incomplete["optimizer"]["beta2"]
    with pytest.raises(UserError, match=r"optimizer lacks the keys \['beta1', 'beta2'\]"):
        Config.from_dict(incomplete)
    before_scan = sections()
    del before_scan["train"]["scan_layers"], before_scan["train"]["remat"], before_scan["train"]["attention"]
    assert Config.from_dict(before_scan) == Config.from_dict(sections()), "runs from before there were these keys"
    with pytest.raises(UserError, match=r"config has unknown keys \['extra'\]"):
        Config.from_dict({**sections(), "extra": {}})
    without_mesh = sections()
    del without_mesh["mesh"]
    with pytest.raises(UserError, match=r"config lacks the keys \['mesh'\]"):
        Config.from_dict(without_mesh)
    with pytest.raises(UserError, match=r"mesh must be a mapping of keys to values, found list"):
        Config.from_dict({**sections(), "mesh": [1, 1, 1]})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model__n_layer", 0, r"model\.n_layer=0 is not between 1 and"),
        ("model__n_layer", 10**400, r"model\.n_layer=10+ is not between 1 and"),
        ("model__n_layer", 2.0, r"model\.n_layer=2\.0 is a float; expected int"),
        ("model__n_layer", True, r"model\.n_layer=True is a bool; expected int"),
        ("model__n_embd", -192, r"model\.n_embd=-192 is not between"),
        ("model__n_head", 5, r"model\.n_embd=192 is not a multiple of model\.n_head=5; change one"),
        ("model__block_size", "128", r"model\.block_size='128' is a str; expected int"),
        ("model__vocab_size", None, r"model\.vocab_size=None is a NoneType; expected int"),
        ("model__bias", 1, r"model\.bias=1 is a int; expected bool"),
        ("model__activation", "swish", r"model\.activation='swish' is not one of 'gelu', 'gelu_tanh', 'relu'"),
        ("model__activation", ["gelu"], r"model\.activation=\['gelu'\] is not one of"),
        ("model__layer_norm_epsilon", 0.0, r"model\.layer_norm_epsilon=0\.0 is not in \(0, 1\)"),
        ("model__layer_norm_epsilon", math.nan, r"model\.layer_norm_epsilon=nan is not in \(0, 1\)"),
        ("model__dropout", 1.0, r"model\.dropout=1\.0 is not in \[0, 1\)"),
        ("model__dropout", -0.1, r"model\.dropout=-0\.1 is not in"),
        ("model__dropout", math.nan, r"model\.dropout=nan is not in"),
        ("quant__mode", "int4", r"quant\.mode='int4' is not one of 'int8', 'none'"),
        ("quant__weight_granularity", "", r"quant\.weight_granularity='' is not one of 'per_channel', 'per_tensor'"),
        ("quant__activation_bits", 4, r"quant\.activation_bits=4 is not one of 8, None"),
        ("quant__activation_bits", 8.0, r"quant\.activation_bits=8\.0 is not one of 8, None"),
        ("quant__backward_bits", 0, r"quant\.backward_bits=0 is not one of 8, None"),
        ("quant__start_step", -1, r"quant\.start_step=-1 is not between 0 and"),
        ("data__dir", None, r"data\.dir=None is a NoneType; expected str"),
        ("train__seed", -1, r"train\.seed=-1 is not between 0 and 4294967295"),
        ("train__seed", 2**32, r"train\.seed=4294967296 is not between"),
        ("train__batch_size", 0, r"train\.batch_size=0 is not between 1 and"),
        ("train__max_iters", -1, r"train\.max_iters=-1 is not between 0 and"),
        ("train__gradient_accumulation_steps", 5, r"train\.batch_size=32 is not a multiple of .*_steps=5; change one"),
        ("train__eval_interval", 0, r"train\.eval_interval=0 is not between 1"),
        ("train__eval_iters", 0, r"train\.eval_iters=0 is not between 1"),
        ("train__log_interval", -10, r"train\.log_interval=-10 is not between 1"),
        ("train__dtype", "int8", r"train\.dtype='int8' is not one of 'float32', 'bfloat16', 'float16', 'auto'"),
        ("train__scan_layers", 1, r"train\.scan_layers=1 is a int; expected bool"),
        ("train__remat", "all", r"train\.remat='all' is not one of 'none', 'block', 'dots'"),
        ("train__attention", "fast", r"train\.attention='fast' is not one of 'auto', 'plain', 'cudnn', 'splash'"),
        ("optimizer__learning_rate", math.nan, r"optimizer\.learning_rate=nan is not a finite number >= 0"),
        ("optimizer__learning_rate", math.inf, r"optimizer\.learning_rate=inf is not a finite number >= 0"),
        ("optimizer__learning_rate", 10**400, r"optimizer\.learning_rate=10{19}\.\.\. is too large for a float"),
        ("optimizer__learning_rate", 1e-5, r"optimizer\.min_lr=0\.0003 is above optimizer\.learning_rate=1e-05"),
        ("optimizer__weight_decay", -0.1, r"optimizer\.weight_decay=-0\.1 is not a finite number >= 0"),
        ("optimizer__grad_clip", "1", r"optimizer\.grad_clip='1' is a str; expected float"),
        ("optimizer__beta1", 1.0, r"optimizer\.beta1=1\.0 is not in \[0, 1\)"),
        ("optimizer__beta2", -0.5, r"optimizer\.beta2=-0\.5 is not in \[0, 1\)"),
        ("optimizer__warmup_iters", 8000, r"optimizer\.warmup_iters=8000 must be below optimizer\.lr_decay_iters=8000"),
        ("optimizer__lr_decay_iters", 0, r"optimizer\.lr_decay_iters=0 is not between 1 and"),
        ("mesh__data", 0, r"mesh sizes \(0, 1, 1\) must be positive, or -1 to infer one"),
        ("mesh__tensor", -2, r"mesh sizes \(-1, 1, -2\) must be positive"),
        ("mesh__fsdp", -1, r"mesh sizes \(-1, -1, 1\) have more than one -1"),
        ("checkpoint__keep", 0, r"checkpoint\.keep=0 is not between 1 and"),
        ("log__tensorboard", "yes", r"log\.tensorboard='yes' is a str; expected bool"),
    ],
)
def test_an_absurd_value_is_refused_by_name(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config.from_dict(sections(**{key: value}))


def test_int8_gradients_need_int8_activations() -> None:
    with pytest.raises(UserError, match=r"quant\.backward_bits=8 needs quant\.activation_bits=8; set both, or"):
        Config.from_dict(sections(quant__backward_bits=8, quant__activation_bits=None))


def test_an_int_is_a_float_where_a_float_is_meant() -> None:
    config = Config.from_dict(sections(optimizer__grad_clip=0, model__dropout=0))
    assert type(config.optimizer.grad_clip) is float
    assert type(config.to_dict()["model"]["dropout"]) is float


def test_one_section_can_be_built_alone() -> None:
    """The int8 folder's config.json holds the model's section and no others."""
    model = section_from_dict(ModelConfig, "model", sections()["model"])
    assert isinstance(model, ModelConfig)
    assert model.head_size == 48
    assert model.n_hidden == 384
    with pytest.raises(UserError, match=r"model lacks the keys"):
        section_from_dict(ModelConfig, "model", {})


@pytest.mark.parametrize(("name", "n_parameters"), [("gpt2", 124_475_904), ("gpt2_xl", 1_557_686_400)])
def test_gpt2_is_of_its_size_and_its_batch_divides(name: str, n_parameters: int) -> None:
    """The published sizes, and 47 more rows of vocabulary."""
    config = Config.from_dict(sections(name))
    assert config.model.n_parameters == n_parameters
    assert config.train.batch_size % 256 == 0
    assert config.train.batch_size // config.train.gradient_accumulation_steps % 8 == 0


def test_base_declares_every_key_once() -> None:
    source = (ROOT / "configs" / "base.py").read_text(encoding="utf-8")
    declared = sorted(line.split("=")[0].strip() for line in source.splitlines() if line.startswith("    config."))
    keys = [f"config.{section}.{key}" for section, values in sections().items() for key in values]
    assert declared == sorted(keys + [f"config.{section}" for section in sections()])
