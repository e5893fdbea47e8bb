"""Every key of the configuration with every command: what was trained is quantized, evaluated and sampled."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from conftest import ROOT
from tiny import TEXT, VOCABULARY, tiny_config, write_data

from picogpt_jax.devices import setup
from picogpt_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("compile_quickly_and_once")

# Each row is one run: together they change every key from what tests/tiny.py has.
RUNS: dict[str, dict[str, Any]] = {
    "another model on another mesh": dict(
        **dict(model__n_layer=2, model__n_head=4, model__n_embd=32, model__block_size=16, model__mlp_ratio=3),
        **dict(model__bias=True, model__activation="gelu_tanh", model__layer_norm_epsilon=1e-3, model__dropout=0.0),
        **dict(quant__weight_granularity="per_tensor", quant__activation_bits=None),
        **dict(mesh__data=1, mesh__fsdp=2, mesh__tensor=2, train__scan_layers=True, train__dtype="bfloat16"),
        **dict(train__gradient_accumulation_steps=2, train__backward_dtype="auto"),
    ),
    "int8 gradients": dict(
        **dict(quant__backward_bits=8, quant__arithmetic="integer", train__seed=1, train__batch_size=4),
        **dict(checkpoint__keep=1, log__wandb_project="other"),
    ),
    "float": dict(
        **dict(quant__mode="none", quant__start_step=1, train__dtype="float16"),
        **dict(train__remat="block", train__attention="plain", mesh__data=2),
        **dict(train__max_iters=3, train__eval_interval=2, train__eval_iters=1, train__log_interval=1),
        **dict(optimizer__learning_rate=1e-2, optimizer__min_lr=1e-3, optimizer__warmup_iters=1),
        **dict(optimizer__lr_decay_iters=9, optimizer__weight_decay=0.0, optimizer__beta1=0.8, optimizer__beta2=0.9),
        **dict(optimizer__grad_clip=0.0),
    ),
}
ELSEWHERE = {"model.vocab_size", "data.dir", "log.tensorboard", "log.wandb"}  # the data's; tests of the metrics


def test_every_key_is_in_the_table() -> None:
    known = {f"{section}.{key}" for section, values in tiny_config().to_dict().items() for key in values}
    assert {name.replace("__", ".") for changes in RUNS.values() for name in changes} == known - ELSEWHERE


def run_main(script: str, *arguments: str) -> None:
    """A script's `main` in this process; its flags are gone afterwards, so that the next script can define them."""
    before = set(flags.FLAGS)
    spec = importlib.util.spec_from_file_location(f"script_{script}", ROOT / "scripts" / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        flags.FLAGS([script, *arguments])
        module.main()
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


@pytest.mark.parametrize("name", RUNS)
def test_what_was_trained_is_evaluated_sampled_and_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str
) -> None:
    monkeypatch.setattr(setup, "set_up_jax", lambda *_, **__: None)  # this process has its devices
    data, run, int8 = (str(tmp_path / folder) for folder in ("data", "run", "int8"))
    write_data(Path(data), TEXT)
    changes = {"train__max_iters": 2, "train__eval_interval": 2, **RUNS[name]}
    result = train(tiny_config(data, **changes), VOCABULARY, run)
    run_main("quantize", f"--workdir={run}", f"--output={int8}")
    assert (Path(int8) / "model.safetensors").is_file()
    run_main("evaluate", f"--model={run}", f"--data={data}", f"--json={tmp_path / 'loss.json'}")
    loss = json.loads((tmp_path / "loss.json").read_text())["loss"]
    assert loss == pytest.approx(result.best_val_loss, rel=0.1), "of all the text, and in float32"
    capsys.readouterr()
    run_main("sample", f"--model={run}", "--start=abc", "--max_new_tokens=4")
    assert len(capsys.readouterr().out) == len("abc") + 4 + len("\n")
