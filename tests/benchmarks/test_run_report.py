import dataclasses
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT, RunScript
from tiny import TRAIN_BIN, VOCABULARY, tiny_config

from picogpt_jax.benchmarks import run_page, run_report
from picogpt_jax.errors import UserError
from picogpt_jax.files import MARK_WITHIN, check_own_page, write_json
from picogpt_jax.formats import loading, sources
from picogpt_jax.formats.sources import load_float
from picogpt_jax.text.vocabulary import Vocabulary
from picogpt_jax.training.checkpoint import Checkpoints
from picogpt_jax.training.metrics import metrics_writer
from picogpt_jax.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("compile_quickly_and_once")


@pytest.fixture(scope="module")
def workdir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves, without its minutes."""
    folder = tmp_path_factory.mktemp("report") / "run"
    config = tiny_config(data_dir, quant__arithmetic="integer")
    with Checkpoints(folder, keep=1) as checkpoints:
        meta = {"config": config.to_dict(), "vocab": VOCABULARY.to_json(), "val_loss": 1.5, "best_val_loss": 1.5}
        checkpoints.save(8, Trainer(config).init(), meta, 1.5)
    write_json(folder / "config.json", config.to_dict())
    with metrics_writer(folder, config.log, config.to_dict()) as write:
        for step in (2, 4, 6, 8):
            write(step, "train", {"loss": 2.0 - step / 10, "learning_rate": step * 1e-3})
            if step in (4, 8):
                write(step, "val", {"loss": 2.0 - step / 16, "bits_per_char": (2.0 - step / 16) / math.log(2)})
    return folder


@pytest.fixture(scope="module")
def history(workdir: Path) -> run_report.History:
    return run_report.read_history(workdir, "run")


@pytest.fixture(scope="module")
def measured(history: run_report.History) -> run_report.Measurement:
    with mock.patch.object(run_report, "SAMPLING", dataclasses.replace(run_report.SAMPLING, max_new_tokens=5)):
        return run_report.measure(history, start="abc", max_tokens=100)


def test_the_history_is_what_was_written(history: run_report.History) -> None:
    assert history.train[0].tolist() == history.rate[0].tolist() == [2, 4, 6, 8]
    assert history.val[0].tolist() == [4, 8]
    assert history.unit == "bits per character"
    assert history.bits == pytest.approx(1 / math.log(2))
    assert history.best == (8, 1.5)


def test_the_forms_are_those_that_the_other_scripts_have(
    workdir: Path, history: run_report.History, measured: run_report.Measurement
) -> None:
    assert list(measured.losses) == list(measured.samples) == [run_report.FLOAT, "QAT forward pass", "int8 model"]
    model = loading.load(workdir, "jax")
    assert measured.losses[run_report.FLOAT] == pytest.approx(model.engine.loss(TRAIN_BIN[:101]), rel=1e-6)
    assert measured.samples[run_report.FLOAT] == model.generate("abc", max_new_tokens=5)
    assert measured.targets == (100, len(TRAIN_BIN) - 1)
    assert measured.losses["int8 model"] == measured.losses["QAT forward pass"] != measured.losses[run_report.FLOAT]
    assert measured.samples["int8 model"] == measured.samples["QAT forward pass"]
    assert measured.is_trained
    assert measured.arithmetic == "integer"
    assert [row.name for row in measured.rows] == list(history.config.model.matrix_shapes())


def test_a_run_whose_data_are_not_at_hand_has_no_losses(workdir: Path, tmp_path: Path) -> None:
    source = load_float(workdir)
    ids = sources.validation_ids(source)
    np.testing.assert_array_equal(ids, TRAIN_BIN)
    assert sources.example(source, ids)[1] == "tokens of the validation text"
    away = tiny_config(tmp_path / "away")
    assert sources.validation_ids(dataclasses.replace(source, run=away)) is None
    (tmp_path / "away").mkdir()
    Vocabulary.from_text("xyz").save(tmp_path / "away/meta.json")
    assert sources.validation_ids(dataclasses.replace(source, run=away)) is None, "another text"
    tokens_BT, text = sources.example(source, None)
    assert (tokens_BT.shape, text) == ((128, 8), "tokens drawn at random")


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    assert list(run_report.named(["a/run", "b/other/"], 6)) == ["run", "other"]
    assert run_report.named(["a/run", "b/run"], 6) == {"a/run": Path("a/run"), "b/run": Path("b/run")}
    with pytest.raises(UserError, match="/run twice; give each run once"):
        run_report.named(["run", "other/../run/"], 6)
    with pytest.raises(UserError, match="7 runs; a page can show 6: give fewer"):
        run_report.named(list("abcdefg"), 6)


def test_a_folder_that_is_no_workdir_is_refused(workdir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no workdir of .*: it has no folder checkpoints/"):
        run_report.read_history(tmp_path, "run")
    copy = shutil.copytree(workdir, tmp_path / "copy")
    (copy / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl: No such file"):
        run_report.read_history(copy, "run")
    (copy / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: config lacks the keys"):
        run_report.read_history(copy, "run")


def test_only_a_report_is_replaced(
    history: run_report.History, measured: run_report.Measurement, tmp_path: Path
) -> None:
    page = run_page.page([(history, measured)], history.config.to_dict())
    file = tmp_path / "report.html"
    check_own_page(file, run_report.MARK, "report")
    file.write_text(page, encoding="utf-8")
    check_own_page(file, run_report.MARK, "report")
    file.write_text("<html>my notes</html>")
    with pytest.raises(UserError, match="another file than a report, which would be replaced; name a new one"):
        check_own_page(file, run_report.MARK, "report")
    with pytest.raises(UserError, match="is a folder; a file is written there"):
        check_own_page(tmp_path, run_report.MARK, "report")


def test_the_script_refuses_in_one_line_and_leaves_nothing(run_script: RunScript, tmp_path: Path) -> None:
    (tmp_path / "no_run").mkdir()
    done = run_script("scripts/report.py", "--workdir=no_run", "--output=new/report.html")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no_run is no workdir of scripts/train.py")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


SCRIPT = """
import pickle, runpy, sys
from picogpt_jax.benchmarks import run_report
def measure(history, start, max_tokens):
    assert (history.name, start, max_tokens) == ("run", "abc", 100)
    return pickle.load(open("measured", "rb"))
run_report.measure = measure
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_the_script_writes_the_page(
    run_script: RunScript, workdir: Path, measured: run_report.Measurement, tmp_path: Path
) -> None:
    (tmp_path / "measured").write_bytes(pickle.dumps(measured))  # the script's own would compile it all again
    (tmp_path / "script.py").write_text(SCRIPT.replace("sys.argv[1]", repr(str(ROOT / "scripts/report.py"))))
    arguments = [f"--workdir={workdir}", "--output=new/report.html", "--start=abc", "--max_tokens=100"]
    done = run_script(tmp_path / "script.py", *arguments)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "new/report.html").read_text(encoding="utf-8")
    assert done.stdout == f"wrote new/report.html: {len(page.encode()):,} bytes\n"
    assert run_report.MARK in page[:MARK_WITHIN]
    assert "the first 100 of 399 targets" in page
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_the_script_finds_the_configurations_by_itself(tmp_path: Path) -> None:
    """Where the library alone is installed, as with pip."""
    (tmp_path / "picogpt_jax").symlink_to(ROOT / "picogpt_jax")
    command = [sys.executable, str(ROOT / "scripts/report.py"), "--workdir=nowhere", "--output=report.html"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: nowhere ")
