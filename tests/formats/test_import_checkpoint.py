"""Imports: what comes in goes out again, bit for bit; a training starts from it; a failure leaves nothing behind."""

import json
import pickle
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
import torch
from conftest import ROOT, RunScript
from test_convert import DEFAULT, OTHER, model_of
from test_import_huggingface import random_gpt2
from test_int8_model import random_model
from test_sources import write_ckpt, write_run
from test_tokenizer import DEFINITION
from test_torch_checkpoint import NanoGPT
from test_torch_int8_checkpoint import picogpt_file
from tiny import VOCABULARY, quick_compilation, tiny_config, write_data

from configs.base import get_config
from picogpt_jax.errors import UserError
from picogpt_jax.files import write_json
from picogpt_jax.formats.import_checkpoint import float_model, load_for_import, write_workdir
from picogpt_jax.formats.sources import load_float
from picogpt_jax.formats.torch_checkpoint import load_float_checkpoint
from picogpt_jax.formats.torch_int8_checkpoint import save_int8_checkpoint
from picogpt_jax.int8 import convert
from picogpt_jax.int8.convert import float_arrays
from picogpt_jax.int8.folder import load_int8_model, save_int8_model
from picogpt_jax.int8.int8_model import Int8Model
from picogpt_jax.kernels import fused_attention
from picogpt_jax.text.prepare import prepare_text
from picogpt_jax.text.reading import load_vocabulary
from picogpt_jax.text.tokenizer import TokenizerVocabulary
from picogpt_jax.text.vocabulary import Vocabulary
from picogpt_jax.training.checkpoint import Checkpoints
from picogpt_jax.training.loop import train

ARGS = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, bias=True, vocab_size=VOCABULARY.size, dropout=0.1)


def nanogpt_file(path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """As nanoGPT's train.py saves it, without a vocabulary; returns its tensors."""
    args = ARGS | changes
    torch.manual_seed(0)
    state = NanoGPT(args).state_dict()
    content = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        "optimizer": {"state": {}},
        "model_args": args,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "abc"},
    }
    torch.save(content, path)
    return state


def import_to(workdir: Path, path: Path, data_dir: Path | None = None) -> Path:
    write_workdir(load_for_import(path, data_dir), get_config().to_dict(), workdir)
    return workdir


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", "abc abd\n" * 40)


# -------------------------------------------------------------------------------------------------------- round trips


def test_nanogpts_tensors_come_out_as_they_went_in(tmp_path: Path, data_dir: Path) -> None:
    state = nanogpt_file(tmp_path / "ckpt.pt")
    import_to(tmp_path / "run", tmp_path / "ckpt.pt", data_dir)
    source = load_float(tmp_path / "run")
    assert (source.step, source.val_loss, source.qat) == (2000, 1.5, False)
    assert (source.vocabulary, source.config.mlp_ratio, source.config.dropout) == (VOCABULARY, 2, 0.1)
    write_ckpt(tmp_path / "run", tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again["model"].keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(again["model"][name], tensor), name
    assert again["model_args"] == ARGS
    assert (again["iter_num"], again["best_val_loss"]) == (2000, 1.5)


def test_the_vocabulary_may_be_nanogpts_pickle(tmp_path: Path) -> None:
    nanogpt_file(tmp_path / "ckpt.pt")
    (tmp_path / "theirs").mkdir()
    itos = dict(enumerate(VOCABULARY.itos))
    meta = {"vocab_size": VOCABULARY.size, "itos": itos, "stoi": {char: index for index, char in itos.items()}}
    (tmp_path / "theirs/meta.pkl").write_bytes(pickle.dumps(meta))
    assert load_for_import(tmp_path / "ckpt.pt", tmp_path / "theirs").vocabulary == VOCABULARY


def test_rows_that_stand_for_no_token_are_left_out(tmp_path: Path, data_dir: Path) -> None:
    """As of a table padded to a multiple of 64; what is trained further, or exported, has none of them."""
    state = nanogpt_file(tmp_path / "ckpt.pt", vocab_size=64)
    workdir = import_to(tmp_path / "run", tmp_path / "ckpt.pt", data_dir)
    source = load_float(workdir)
    assert (source.vocabulary, source.config.vocab_size) == (VOCABULARY, 12)
    table = float_arrays(source.config, source.params)["transformer.wte.weight"]
    np.testing.assert_array_equal(table, state["transformer.wte.weight"][:12].numpy())
    with quick_compilation():
        train(tiny_config(data_dir, model__bias=True, train__max_iters=2), VOCABULARY, workdir)


def test_a_nanogpt_of_byte_pairs_takes_a_tokenizer(tmp_path: Path) -> None:
    """Its vocabulary is padded, as GPT-2's 50,257 tokens are to 50,304."""
    nanogpt_file(tmp_path / "ckpt.pt", vocab_size=320)
    (tmp_path / "tokenizer.json").write_text(json.dumps(DEFINITION))
    source = load_for_import(tmp_path / "ckpt.pt", tmp_path)
    assert (source.config.vocab_size, source.left_out) == (277, 43)
    vocabulary = source.vocabulary
    assert isinstance(vocabulary, TokenizerVocabulary)
    assert vocabulary.size == 277


@pytest.mark.parametrize(("config", "name"), [(DEFAULT, "int8"), (OTHER, "int8.pt")], ids=["per_channel", "per_tensor"])
def test_an_int8_model_has_the_same_codes_and_scales_again(tmp_path: Path, config: Any, name: str) -> None:
    model = model_of(config)
    save_int8_model(model, tmp_path / "int8")
    save_int8_checkpoint(model, tmp_path / "int8.pt")
    import_to(tmp_path / "run", tmp_path / name)
    source = load_float(tmp_path / "run")
    assert (source.step, source.val_loss) == (model.training["step"], model.training["val_loss"])
    again = convert.int8_model(source.config, source.quant, source.params, source.vocabulary, model.training)
    assert again.quantization == model.quantization
    for tensor, array in model.tensors().items():
        np.testing.assert_array_equal(again.tensors()[tensor], array, err_msg=tensor, strict=True)


def with_scales(scales: np.ndarray) -> Int8Model:
    """A model whose c_fc has these scales, every row with a code of 127."""
    model = random_model(mlp_ratio=len(scales) // 32)
    matrix = model.matrices["transformer.h.0.mlp.c_fc"]
    matrix.codes[:, 0], matrix.scale[:, 0] = 127, scales
    return model


def test_no_scale_is_lost_to_rounding() -> None:
    """127 * scale / 127 is another float in one row of 25, unless the product is chosen with that in mind."""
    absmax = np.random.default_rng(0).normal(1, 0.1, 4096).astype(np.float32)
    scales = np.asarray(jax.jit(lambda x: x / 127)(absmax))
    model = with_scales(scales)
    source = float_model(model)
    again = convert.int8_model(source.config, source.quant, source.params, source.vocabulary, {})
    name = "transformer.h.0.mlp.c_fc"
    np.testing.assert_array_equal(again.matrices[name].scale[:, 0], scales)
    np.testing.assert_array_equal(again.matrices[name].codes, model.matrices[name].codes)
    plain = model.matrices[name].dequantize()
    imported = convert.float_array(source.params, f"{name}.weight")
    np.testing.assert_allclose(imported, plain, rtol=2e-7, atol=0)
    assert (np.asarray(jax.jit(lambda x: x / 127)(plain[:, 0])) != scales).any(), (
        "a control: the plain product loses some"
    )


def test_an_int8_model_of_a_qat_run_counts_as_trained_with_quantization() -> None:
    model = random_model()
    source = float_model(model)
    assert (source.qat, source.quant.mode) == (False, "none")
    model.training["quantization_aware"] = True
    source = float_model(model)
    assert (source.qat, source.quant.mode) == (True, "int8")


def test_a_workdir_gives_its_best_parameters_and_its_configuration(tmp_path: Path) -> None:
    written = write_run(tmp_path / "old", {4: 1.5, 8: 1.25, 12: 1.75}, quant__weight_granularity="per_tensor")
    import_to(tmp_path / "run", tmp_path / "old")
    source = load_float(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, source.params, written[8])
    assert (source.step, source.val_loss, source.qat) == (8, 1.25, True)
    assert source.run == load_float(tmp_path / "old").run


def test_a_run_with_the_attention_of_another_device_is_read_here(tmp_path: Path) -> None:
    with mock.patch.object(fused_attention, "why_not", return_value=None):  # as on a TPU
        write_run(tmp_path / "old", {4: 1.5}, train__attention="splash")
    import_to(tmp_path / "run", tmp_path / "old")
    run = load_float(tmp_path / "run").run
    assert run is not None
    assert run.train.attention == "splash"


def test_picogpts_int8_file_becomes_a_workdir(tmp_path: Path, data_dir: Path) -> None:
    picogpt_file(tmp_path / "int8.pt", **ARGS)
    import_to(tmp_path / "run", tmp_path / "int8.pt", data_dir)
    source = load_float(tmp_path / "run")
    assert (source.step, source.val_loss, source.vocabulary) == (0, None, VOCABULARY)


@pytest.mark.parametrize("vocab_size", [277, 320])
def test_a_gpt2_becomes_a_workdir_with_its_tokenizer(tmp_path: Path, vocab_size: int) -> None:
    network = random_gpt2(vocab_size=vocab_size)
    network.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(DEFINITION))
    import_to(tmp_path / "run", tmp_path / "hf")
    source = load_float(tmp_path / "run")
    assert source.vocabulary.decode(source.vocabulary.encode("the fox")) == "the fox"
    theirs = network.state_dict()
    assert source.config.vocab_size == 277
    for name, array in float_arrays(source.config, source.params).items():
        is_linear = array.ndim == 2 and ".h." in name
        expected = theirs[name].numpy()[: 277 if "wte" in name else None]
        np.testing.assert_array_equal(array.T if is_linear else array, expected, err_msg=name)


# --------------------------------------------------------------------------------------------- a training starts there


def test_a_training_starts_from_the_imported_parameters(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    nanogpt_file(tmp_path / "ckpt.pt")
    workdir = import_to(tmp_path / "run", tmp_path / "ckpt.pt", data_dir)
    before = load_float(workdir).params
    still = dict(optimizer__learning_rate=0.0, optimizer__min_lr=0.0, optimizer__weight_decay=0.0)
    config = tiny_config(data_dir, model__bias=True, model__dropout=0.0, train__max_iters=4, **still)
    with quick_compilation():
        result = train(config, VOCABULARY, workdir, resume=True)
    assert f"starting from the parameters imported into {workdir}" in capsys.readouterr().out
    assert (result.step, result.best_val_loss) == (4, result.val_loss)
    after = load_float(workdir)
    jax.tree.map(np.testing.assert_array_equal, after.params, before)
    assert (after.step, after.qat, after.run) == (4, True, config)
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.steps == [0, 4]
        assert checkpoints.best_step() == 4, "the loss that the import had elsewhere does not count"


def test_a_training_of_imported_parameters_resumes_as_any(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    """From its first own checkpoint on it is a run, with one configuration; before, none has begun."""
    nanogpt_file(tmp_path / "ckpt.pt")
    workdir = import_to(tmp_path / "run", tmp_path / "ckpt.pt", data_dir)
    abandoned = tiny_config(data_dir, model__bias=True, train__seed=1)
    write_json(workdir / "config.json", abandoned.to_dict())  # as a training that ended before it saved
    config = tiny_config(data_dir, model__bias=True, train__max_iters=4, checkpoint__keep=1)
    with quick_compilation():
        train(config, VOCABULARY, workdir)
        assert train(config, VOCABULARY, workdir).step == 4
    assert f"resumed {workdir} at step 4" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds a run with another configuration: train.seed"):
        train(abandoned, VOCABULARY, workdir)


def test_another_shape_or_vocabulary_is_refused(tmp_path: Path, data_dir: Path) -> None:
    nanogpt_file(tmp_path / "ckpt.pt")
    workdir = import_to(tmp_path / "run", tmp_path / "ckpt.pt", data_dir)
    message = r"holds an imported model of another shape: model.n_layer \(1 there, 2 here\), model.bias \(True there, "
    with pytest.raises(UserError, match=message):
        train(tiny_config(data_dir, model__n_layer=2), VOCABULARY, workdir)
    other = Vocabulary.from_text("0123456789\n\t")
    with pytest.raises(UserError, match="was trained on another vocabulary than"):
        train(tiny_config(data_dir, model__bias=True), other, workdir)


# ------------------------------------------------------------------------------------------------------------ mistakes


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def with_nan(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["model"]["_orig_mod.transformer.ln_f.weight"][3] = torch.nan
    torch.save(content, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, "is no PyTorch checkpoint, or is truncated"),
        (with_nan, "transformer.ln_f.weight holds values that are not finite"),
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: shutil.copy(path.parent / "data/meta.json", path.parent / "data/train.bin"), None),
        (lambda path: (path.parent / "data/meta.json").unlink(), r"has no meta.json \(nor nanoGPT's meta.pkl\)"),
        (
            lambda path: Vocabulary.from_text("abcdefghijklmnopqrstuvwxyz").save(path.parent / "data/meta.json"),
            "is a model of 12 tokens, its vocabulary has 26; give --data the folder of the data",
        ),
    ],
)
def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, data_dir: Path, change: Callable[[Path], object], message: str | None
) -> None:
    nanogpt_file(tmp_path / "ckpt.pt")
    change(tmp_path / "ckpt.pt")
    before = sorted(path.name for path in tmp_path.iterdir())
    if message is None:  # the tokens themselves are not looked at
        import_to(tmp_path / "run", tmp_path / "ckpt.pt", data_dir)
        return
    with pytest.raises(UserError, match=message):
        import_to(tmp_path / "run", tmp_path / "ckpt.pt", data_dir)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_interrupted_write_leaves_nothing_behind(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nanogpt_file(tmp_path / "ckpt.pt")
    source = load_for_import(tmp_path / "ckpt.pt", data_dir)

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Vocabulary, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        write_workdir(source, get_config().to_dict(), tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "data"]


def test_a_workdir_that_holds_something_is_not_replaced(tmp_path: Path, data_dir: Path) -> None:
    nanogpt_file(tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"data is not empty; an import makes a new workdir: name a new --output"):
        import_to(data_dir, tmp_path / "ckpt.pt", data_dir)
    (tmp_path / "empty").mkdir()
    import_to(tmp_path / "empty", tmp_path / "ckpt.pt", data_dir)
    with pytest.raises(UserError, match=r"empty is not empty"):
        import_to(tmp_path / "empty", tmp_path / "ckpt.pt", data_dir)
    with pytest.raises(UserError, match=r"ckpt.pt is a file; a folder is written there"):
        import_to(tmp_path / "ckpt.pt", tmp_path / "ckpt.pt", data_dir)


def test_a_vocabulary_that_contradicts_the_models_own_is_refused(tmp_path: Path, data_dir: Path) -> None:
    save_int8_model(random_model(), tmp_path / "int8")
    with pytest.raises(UserError, match=r"int8 has another vocabulary than --data=.*data; leave --data out"):
        load_for_import(tmp_path / "int8", data_dir)


# ------------------------------------------------------------------------------------------------------- the commands


def test_from_nanogpts_file_to_an_int8_model_by_commands(tmp_path: Path, data_dir: Path, run_script: RunScript) -> None:
    nanogpt_file(tmp_path / "ckpt.pt")

    def run(script: str, *arguments: str, status: int = 0) -> str:
        done = run_script(f"scripts/{script}.py", *arguments)
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    data_dir = data_dir.rename(tmp_path / "its data")
    to_checkpoint = ("--input=ckpt.pt", "--to=checkpoint", "--output=a run")
    told = run("convert", *to_checkpoint, f"--data={data_dir.name}")
    assert "wrote a run: " in told
    python, script, *flags = shlex.split(told.partition("train it with: ")[2])
    assert (python, Path(script), len(flags)) == ("python", ROOT / "scripts/train.py", 3)
    short = ("--config.train.max_iters=2", "--config.train.eval_iters=1", "--config.train.log_interval=1")
    told = run("train", *flags, *short, "--config.model.dropout=0.0")
    assert "starting from the parameters imported into a run" in told
    stored = json.loads((tmp_path / "a run/config.json").read_text())
    assert stored["model"] == vars(load_float_checkpoint(tmp_path / "ckpt.pt").model) | {"dropout": 0.0}
    assert stored["data"]["dir"] == data_dir.name
    nowhere = run("train", flags[0], "--workdir=none", f"--config.data.dir={data_dir.name}", status=2)
    assert "leaves model.activation, model.bias, " in nowhere
    assert "to --workdir=none, which holds no model; import one with: python " in nowhere

    assert "trained with quantization (QAT)" in run("quantize", "--workdir=a run", "--output=int8")
    assert load_int8_model(tmp_path / "int8").training["step"] == 2


def test_an_imported_gpt2_speaks_and_is_measured_in_text(tmp_path: Path, run_script: RunScript) -> None:
    random_gpt2(vocab_size=277).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(DEFINITION))
    vocabulary = load_vocabulary(import_to(tmp_path / "run", tmp_path / "hf") / "vocab.json")
    meta = prepare_text("the quick brown fox and the other\n" * 20, tmp_path / "data", "foxes", "foxes", vocabulary)
    done = run_script("scripts/sample.py", "--model=run", "--start=the fox", "--max_new_tokens=20")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the fox")
    done = run_script("scripts/evaluate.py", "--model=run", "--data=data", "--json=loss.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "loss.json").read_text())
    assert result["tokens"] == meta["val_tokens"] - 1 < 40, "of 68 characters"
    text = vocabulary.decode(np.fromfile(tmp_path / "data/val.bin", np.uint16)[1:])
    assert result["bits_per_char"] == pytest.approx(result["loss"] / np.log(2) * result["tokens"] / len(text))
