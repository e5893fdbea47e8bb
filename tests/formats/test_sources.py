import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_folder import random_integer_model
from test_int8_model import random_model
from test_torch_int8_checkpoint import picogpt_file
from tiny import VOCABULARY, tiny_config

from picogpt_jax.errors import UserError
from picogpt_jax.files import write_json
from picogpt_jax.formats import loading
from picogpt_jax.formats.gpt2_tensors import FloatCheckpoint
from picogpt_jax.formats.hf_documents import tokenizer_files
from picogpt_jax.formats.onnx_export import save_onnx
from picogpt_jax.formats.sources import load_float, load_int8, load_numpy, load_onnx, recognise
from picogpt_jax.formats.torch_checkpoint import save_float_checkpoint
from picogpt_jax.formats.torch_int8_checkpoint import save_int8_checkpoint
from picogpt_jax.int8.convert import float_arrays
from picogpt_jax.int8.folder import save_int8_model
from picogpt_jax.int8.integer_model import IntegerModel
from picogpt_jax.runtimes.numpy_integer import NumpyIntegerGPT
from picogpt_jax.text.vocabulary import TokenIds
from picogpt_jax.training.checkpoint import Checkpoints
from picogpt_jax.training.trainer import Trainer

INT8 = random_model()
TEXT_VOCABULARY = VOCABULARY


def write_run(workdir: Path, losses: dict[int, float | None], **changes: Any) -> dict[int, Any]:
    """Writes a checkpoint for each step, as a training does; returns their parameters."""
    config = tiny_config("some_data", train__eval_interval=1, **changes)
    trainer = Trainer(config)
    state = trainer.init()
    written = {}
    with Checkpoints(workdir, keep=len(losses)) as checkpoints:
        for step, loss in losses.items():
            written[step] = jax.tree.map(lambda array, step=step: array + step, state.params)
            meta = {"config": config.to_dict(), "vocab": VOCABULARY.to_json(), "val_loss": loss, "best_val_loss": 0.0}
            checkpoints.save(step, state.replace(params=written[step]), meta, loss)
    return written


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each: run/, int8/, onnx/, int8.pt, ckpt.pt, picogpt.pt, hf/."""
    folder = tmp_path_factory.mktemp("models")
    write_run(folder / "run", {4: 1.5, 8: 1.25, 12: 1.75})
    save_int8_model(INT8, folder / "int8")
    save_onnx(INT8, folder / "onnx")
    save_int8_checkpoint(INT8, folder / "int8.pt")
    write_ckpt(folder / "run", folder / "ckpt.pt")
    picogpt_file(folder / "picogpt.pt")
    write_json(folder / "hf/config.json", {"model_type": "gpt2"})
    return folder


def write_ckpt(workdir: Path, path: Path, config: dict[str, Any] | None = None) -> None:
    source = load_float(workdir)
    loss = float("inf") if source.val_loss is None else source.val_loss
    tensors = float_arrays(source.config, source.params)
    checkpoint = FloatCheckpoint(source.config, tensors, source.step, loss, config or {}, source.vocabulary)
    save_float_checkpoint(checkpoint, path)


# ------------------------------------------------------------------------------------------------------- recognise


def test_each_kind_is_recognised(models: Path) -> None:
    kinds = {"run": "workdir", "int8": "int8", "onnx": "onnx", "int8.pt": "torch-int8", "ckpt.pt": "torch-float"}
    kinds |= {"picogpt.pt": "picogpt-int8", "hf": "huggingface"}
    assert {name: recognise(models / name) for name in kinds} == kinds


def test_a_pytorch_file_is_recognised_under_any_name(models: Path, tmp_path: Path) -> None:
    shutil.copy(models / "int8.pt", tmp_path / "model.bin")
    assert recognise(tmp_path / "model.bin") == "torch-int8"


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"runs/typo does not exist; expected a workdir, an int8 folder or a PyTorch"):
        recognise(tmp_path / "runs/typo")


@pytest.mark.parametrize("name", ["empty", "run/checkpoints", "notes.txt", "run/config.json"])
def test_what_is_no_model_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(UserError, match=rf"{name} is not a model: expected a workdir of scripts/train.py"):
        recognise(tmp_path / name)


def test_a_damaged_pytorch_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"truncated")
    with pytest.raises(UserError, match=r"model.pt is no PyTorch checkpoint, or is truncated"):
        recognise(tmp_path / "model.pt")


def test_an_int8_folder_is_loaded_without_jax_and_pytorch(models: Path) -> None:
    code = (
        "import sys; from picogpt_jax.formats import sources; sources.load_int8(sys.argv[1]); "
        "sys.exit(str({'jax', 'torch'} & set(sys.modules) or ''))"
    )
    command = [sys.executable, "-c", code, str(models / "int8")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stderr.strip(), done.stdout) == ("", "")


# ------------------------------------------------------------------------------------------------- float parameters


def test_the_best_checkpoint_of_a_workdir_is_loaded(tmp_path: Path) -> None:
    written = write_run(tmp_path / "run", {4: 1.5, 8: 1.25, 12: 1.75})
    source = load_float(tmp_path / "run")
    assert (source.step, source.val_loss, source.qat) == (8, 1.25, True)
    assert source.vocabulary == VOCABULARY
    assert source.run is not None
    assert source.run.data.dir == "some_data"
    assert source.config == source.run.model
    jax.tree.map(np.testing.assert_array_equal, source.params, written[8])
    assert len(next(iter(jax.tree.leaves(source.params))).sharding.device_set) == 1


def test_a_tokenizer_beside_a_run_on_token_ids_gives_it_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "VOCABULARY", TokenIds.of_size(VOCABULARY.size, "a test"))
    write_run(tmp_path / "run", {4: 1.5})
    assert load_float(tmp_path / "run").vocabulary == TokenIds.of_size(12, "a test")
    write_json(tmp_path / "run" / "tokenizer.json", tokenizer_files(TEXT_VOCABULARY, 8)["tokenizer.json"])
    assert load_float(tmp_path / "run").vocabulary == TEXT_VOCABULARY


@pytest.mark.parametrize(
    ("changes", "qat"),
    [
        (dict(quant__mode="none"), False),
        (dict(quant__start_step=8), False),  # these eight steps were float ones
        (dict(quant__start_step=7), True),
    ],
)
def test_a_model_counts_as_quantization_aware_once_a_step_was(tmp_path: Path, changes: Any, qat: bool) -> None:
    write_run(tmp_path / "run", {8: 1.25}, **changes)
    assert load_float(tmp_path / "run").qat is qat


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run holds no finished checkpoint yet; train until the first evaluation"):
        load_float(tmp_path / "run")


def test_a_float_file_holds_the_parameters_of_its_workdir(models: Path) -> None:
    workdir, file = load_float(models / "run"), load_float(models / "ckpt.pt")
    assert jax.tree.structure(file.params) == jax.tree.structure(workdir.params)
    jax.tree.map(np.testing.assert_array_equal, file.params, workdir.params)
    assert file.config == workdir.config
    assert (file.step, file.val_loss, file.vocabulary) == (8, 1.25, VOCABULARY)
    assert (file.run, file.qat) == (None, False)


def test_a_float_file_says_how_it_was_trained(models: Path, tmp_path: Path) -> None:
    workdir = load_float(models / "run")
    assert workdir.run is not None
    write_ckpt(models / "run", tmp_path / "ckpt.pt", workdir.run.to_dict())
    file = load_float(tmp_path / "ckpt.pt")
    assert (file.run, file.quant, file.qat) == (workdir.run, workdir.run.quant, True)
    write_ckpt(models / "run", tmp_path / "ckpt.pt", {"quant": {"mode": "int4"}})
    with pytest.raises(UserError, match=r"ckpt.pt: config lacks the keys"):
        load_float(tmp_path / "ckpt.pt")


def test_a_run_that_was_never_evaluated_has_no_loss(tmp_path: Path) -> None:
    """A ckpt.pt must hold a number: it says infinity, which no JSON file of ours could."""
    write_run(tmp_path / "run", {3: None})
    write_ckpt(tmp_path / "run", tmp_path / "ckpt.pt")
    for name in ("run", "ckpt.pt"):
        source = load_float(tmp_path / name)
        assert (source.step, source.val_loss) == (3, None)


def test_a_float_file_of_another_program_has_no_vocabulary(models: Path, tmp_path: Path) -> None:
    content = torch.load(models / "ckpt.pt", weights_only=True)
    del content["picogpt_jax"]
    torch.save(content, tmp_path / "nanogpt.pt")
    assert recognise(tmp_path / "nanogpt.pt") == "torch-float"
    with pytest.raises(UserError, match=r"nanogpt.pt holds no vocabulary; a workdir has one: make one of it, D"):
        load_float(tmp_path / "nanogpt.pt")


@pytest.mark.parametrize("name", ["int8", "int8.pt"])
def test_an_int8_model_has_no_float_parameters(models: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} is an int8 model; its float parameters are gone: give the workdir"):
        load_float(models / name)


# ------------------------------------------------------------------------------------------------------ int8 models


@pytest.mark.parametrize("name", ["int8", "int8.pt"])
def test_both_files_hold_the_same_int8_model(models: Path, name: str) -> None:
    loaded = load_int8(models / name)
    assert (loaded.model, loaded.quantization, loaded.training) == (INT8.model, INT8.quantization, INT8.training)
    tensors = loaded.tensors()
    assert set(tensors) == set(INT8.tensors())
    for tensor, array in INT8.tensors().items():
        np.testing.assert_array_equal(tensors[tensor], array, err_msg=tensor)


@pytest.mark.parametrize("name", ["run", "ckpt.pt"])
def test_float_parameters_are_not_quantized_in_passing(models: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} holds float parameters; .*make .* with: python scripts/"):
        load_int8(models / name)


# ------------------------------------------------------------------------------------- what one runtime alone can run


def test_the_runtimes_load_their_own_folders(models: Path) -> None:
    tokens_BT = np.array([[1, 2, 3]])
    by_onnx, (by_numpy, vocabulary) = load_onnx(models / "onnx"), load_numpy(models / "int8")
    assert by_onnx.vocabulary == vocabulary == INT8.vocabulary
    assert (by_onnx.config, by_onnx.quantization, by_onnx.training) == (INT8.model, INT8.quantization, INT8.training)
    np.testing.assert_allclose(by_onnx.forward(tokens_BT), by_numpy.forward(tokens_BT), atol=0.5)


@pytest.mark.parametrize("load", [load_int8, load_float])
def test_an_onnx_folder_is_for_one_runtime(models: Path, load: Any) -> None:
    with pytest.raises(
        UserError, match=r"onnx is an ONNX folder, which --runtime=onnx runs; here, give the int8 folder"
    ):
        load(models / "onnx")


@pytest.mark.parametrize(("name", "source"), [("int8", ".*int8"), ("int8.pt", ".*int8.pt"), ("run", "INT8_FOLDER")])
def test_onnx_runtime_needs_an_export(models: Path, name: str, source: str) -> None:
    message = rf"--runtime=onnx takes an ONNX folder, not .*{name} \(.*convert.py --input={source} --to=onnx --output="
    with pytest.raises(UserError, match=message):
        load_onnx(models / name)


@pytest.mark.parametrize("name", ["onnx", "int8.pt", "run", "ckpt.pt"])
def test_numpy_needs_an_int8_folder(models: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"--runtime=numpy takes an int8 folder, not .*{name} \(.*quantize.py"):
        load_numpy(models / name)


def test_a_vocabulary_of_another_size_is_refused_for_numpy(tmp_path: Path) -> None:
    save_int8_model(INT8, tmp_path / "int8")
    VOCABULARY.save(tmp_path / "int8" / "vocab.json")
    with pytest.raises(UserError, match=r"int8: the vocabulary has 12 entries, but model.vocab_size=11"):
        load_numpy(tmp_path / "int8")


# --------------------------------------------------------------------------------------------------------- integers


def test_a_folder_of_integers_is_recognised_and_runs_in_numpy(tmp_path: Path) -> None:
    model = random_integer_model()
    save_int8_model(model, tmp_path / "int8")
    assert recognise(tmp_path / "int8") == "int8"
    assert isinstance(load_int8(tmp_path / "int8"), IntegerModel)
    runtime, vocabulary = load_numpy(tmp_path / "int8")
    assert isinstance(runtime, NumpyIntegerGPT)
    assert vocabulary == model.vocabulary
    loaded = loading.load(tmp_path / "int8", "numpy")
    assert loaded.runtime == "numpy"
    assert f"{model.n_bytes:,} bytes" in loaded.description
    np.testing.assert_array_equal(loaded.logits([1, 2, 3]), runtime.forward(np.array([[1, 2, 3]]))[0])
    assert len(loaded.generate("abc", 40)) == 40


def test_what_knows_no_integer_functions_takes_the_same_codes(tmp_path: Path) -> None:
    model = random_integer_model(bias=True)
    save_int8_model(model, tmp_path / "int8")
    save_int8_checkpoint(load_int8(tmp_path / "int8").mixed(), tmp_path / "int8.pt")
    mixed = load_int8(tmp_path / "int8.pt")
    for name, matrix in mixed.matrices.items():
        np.testing.assert_array_equal(matrix.codes, model.tensors[f"{name}.weight"], err_msg=name)
    assert mixed.mixed() is mixed
    difference = loading.load(tmp_path / "int8.pt", "torch").logits([1, 2, 3])
    difference -= loading.load(tmp_path / "int8", "numpy").logits([1, 2, 3])
    assert 0 < np.abs(difference).max() < 0.25, "functions between the products are float ones"


@pytest.mark.parametrize("tensor", [1, 2])
def test_integers_in_jax_have_the_bits_of_numpy(tmp_path: Path, tensor: int) -> None:
    save_int8_model(random_integer_model(), tmp_path / "int8")
    ids = np.arange(8)
    expected = loading.load(tmp_path / "int8", "numpy").logits(ids)
    np.testing.assert_array_equal(loading.load(tmp_path / "int8", "jax", tensor=tensor).logits(ids), expected)
