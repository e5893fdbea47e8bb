import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import VOCABULARY, quick_compilation, same, tiny_config

from picogpt_jax.errors import UserError
from picogpt_jax.files import write_json
from picogpt_jax.text.vocabulary import Vocabulary
from picogpt_jax.training.checkpoint import Checkpoints
from picogpt_jax.training.resume import FREE_ON_RESUME, begin, check_resumable
from picogpt_jax.training.trainer import Trainer


@pytest.fixture
def resumable(tmp_path: Path) -> Callable[..., str]:
    """Writes a run's folder, then asks whether a run with these changes may go on there, and what it notes."""
    config = tiny_config("data")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, {"x": np.zeros(1)}, {"config": config.to_dict(), "data": ["text"]}, 1.5)
    write_json(tmp_path / "config.json", config.to_dict())
    VOCABULARY.save(tmp_path / "vocab.json")

    def check(
        resume: bool | None = None, vocabulary: Vocabulary = VOCABULARY, text: str = "text", **changes: Any
    ) -> str:
        return check_resumable(tmp_path, tiny_config(**{"data_dir": "data", **changes}), vocabulary, resume, [text])

    return check


def test_a_run_resumes_with_the_same_configuration(resumable: Callable[..., str]) -> None:
    resumable()
    resumable(resume=True)


@pytest.mark.parametrize(
    "changes",
    [
        dict(train__max_iters=100),
        dict(train__eval_interval=3, train__eval_iters=1, train__log_interval=1),
        dict(train__gradient_accumulation_steps=2),
        dict(mesh__data=-1, mesh__fsdp=2, mesh__tensor=2),
        dict(train__scan_layers=True, train__remat="block", train__attention="plain"),
        dict(checkpoint__keep=5, log__tensorboard=True),
    ],
)
def test_what_moves_no_parameter_may_change(
    resumable: Callable[..., str], changes: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    assert resumable(**changes) == "", "no note in the log, which is that of a run without a break"
    said = capsys.readouterr().out
    assert all(f"{name.replace('__', '.')} " in said for name in changes)


def test_what_the_advice_names_may_change_and_is_noted(
    resumable: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    note = resumable(optimizer__learning_rate=0.015, train__dtype="bfloat16", train__max_iters=9)
    assert note == "train.dtype 'float32' -> 'bfloat16', optimizer.learning_rate 0.03 -> 0.015"
    assert capsys.readouterr().out == (
        f"{tmp_path} goes on with train.max_iters 8 -> 9, train.dtype 'float32' -> 'bfloat16', "
        "optimizer.learning_rate 0.03 -> 0.015\n"
    )


def test_another_text_is_noted(resumable: Callable[..., str], capsys: pytest.CaptureFixture) -> None:
    assert resumable() == ""
    assert capsys.readouterr().out == ""
    assert resumable(data_dir="/moved") == "data.dir 'data' -> '/moved'"
    assert resumable(data_dir="/other", text="other") == "data.dir 'data' -> '/other' (another text)"
    assert resumable(text="other") == "data.dir 'data' (another text)"


def test_fewer_steps_than_there_are_is_refused(resumable: Callable[..., str]) -> None:
    resumable(train__max_iters=4)
    with pytest.raises(UserError, match=r"step 4 already, train\.max_iters=3 is less; give at least --config"):
        resumable(train__max_iters=3)


@pytest.mark.parametrize(("before", "after", "scale"), [("float32", "float16", 2.0**15), ("float16", "float32", 1.0)])
def test_the_loss_scale_is_that_of_the_new_type(tmp_path: Path, before: str, after: str, scale: float) -> None:
    config = tiny_config("data", train__dtype=before)
    trainer = Trainer(tiny_config("data", train__dtype=after))
    with quick_compilation(), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, Trainer(config).init(), {"config": config.to_dict(), "best_val_loss": 1.5}, 1.5)
        state, *_ = begin(trainer, checkpoints, tmp_path)
    assert float(state.loss_scale) == scale
    assert state.loss_scale.sharding == trainer.abstract_state.loss_scale.sharding


def test_what_moves_a_parameter_may_not_change(resumable: Callable[..., str]) -> None:
    sections = tiny_config().to_dict()
    keys = [
        *(f"{section}.{key}" for section in ("model", "quant") for key in sections[section]),
        *("train.seed", "train.batch_size"),
    ]
    assert not FREE_ON_RESUME & set(keys)
    known = {f"{section}.{key}" for section, values in sections.items() for key in values}
    assert set(keys) | FREE_ON_RESUME == known, "every key is on one side"
    message = (
        r"holds a run with another configuration: model\.n_layer \(1 there, 2 here\), "
        r"train\.seed \(1337 there, 1 here\); use its values, or another --workdir"
    )
    with pytest.raises(UserError, match=message):
        resumable(model__n_layer=2, train__seed=1, optimizer__learning_rate=0.02, train__max_iters=9)


def test_another_vocabulary_of_the_same_size_is_refused(resumable: Callable[..., str]) -> None:
    other = Vocabulary.from_text("0123456789\n\t")
    assert other.size == VOCABULARY.size
    with pytest.raises(UserError, match=r"was trained on another vocabulary than data; use another --workdir"):
        resumable(vocabulary=other)


def test_resume_and_noresume_insist(resumable: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--noresume: .* already holds a run; give another --workdir, or leave"):
        resumable(resume=False)
    empty = tmp_path / "empty"
    with pytest.raises(
        UserError, match=r"--resume: .*empty holds no run; give the --workdir of one, or leave --resume"
    ):
        check_resumable(empty, tiny_config(), VOCABULARY, True, [])
    for resume in (False, None):
        assert check_resumable(empty, tiny_config(), VOCABULARY, resume, []) == ""


def test_a_run_without_a_finished_checkpoint_has_nothing_to_resume(
    resumable: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.rmtree(tmp_path / "checkpoints/4")
    resumable(model__n_layer=2)  # nor anything that it would have to be the same as
    with pytest.raises(UserError, match=r"--resume: .* holds no finished checkpoint yet; leave --resume out to start"):
        resumable(resume=True)
    trainer = Trainer(tiny_config("data"))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        state, *rest = begin(trainer, checkpoints, tmp_path)
    assert (int(state.step), rest) == (0, [0, math.inf, None])
    assert capsys.readouterr().out == f"{tmp_path} holds no checkpoint yet: starting at step 0\n"


def test_a_damaged_newest_checkpoint_is_no_import(resumable: Callable[..., str], tmp_path: Path) -> None:
    for path in (tmp_path / "checkpoints/4/meta").iterdir():
        path.unlink()
    resumable()
    with pytest.raises(UserError, match="holds a run with another configuration"):
        resumable(train__seed=1)


def test_a_damaged_checkpoint_and_an_older_one_of_another_layer_layout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The layers are stacked in the newer one, which cannot be read; the run goes on in either layout."""
    config = {scan: tiny_config("data", train__scan_layers=scan) for scan in (False, True)}
    trainer = {scan: Trainer(config[scan]) for scan in config}
    with quick_compilation(), Checkpoints(tmp_path, keep=2) as checkpoints:
        older = trainer[False].init()
        expected = {False: older, True: trainer[True].adopt(older)}
        checkpoints.save(4, older, {"config": config[False].to_dict(), "best_val_loss": 1.5}, 1.5)
        checkpoints.save(8, expected[True], {"config": config[True].to_dict(), "best_val_loss": 1.0}, 1.0)
        checkpoints.wait()
        shutil.rmtree(tmp_path / "checkpoints/8/state")
        for scan in (True, False):
            state, step, best, resume_step = begin(trainer[scan], checkpoints, tmp_path)
            assert (step, best, resume_step) == (4, 1.5, 4)
            assert same(state, expected[scan])
    assert caplog.text.count("trying the one before it") == 1, "the damaged one was removed"


def test_a_checkpoint_whose_configuration_is_not_known_is_left_alone(tmp_path: Path) -> None:
    """Such as one of a later version: no damage, and no reason to go back to an older one."""
    later = tiny_config("data").to_dict()
    later["train"]["invented_later"] = 1
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(4, {"x": np.zeros(1)}, {"config": tiny_config("data").to_dict(), "best_val_loss": 1.5}, 1.5)
        checkpoints.save(8, {"x": np.zeros(1)}, {"config": later, "best_val_loss": 1.0}, 1.0)
        with pytest.raises(UserError, match=r"checkpoints/8 does not fit: train has unknown keys \['invented_later'\]"):
            begin(Trainer(tiny_config("data")), checkpoints, tmp_path)
        assert checkpoints.steps == [4, 8]
