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
def resumable(tmp_path: Path) -> Callable[..., None]:
    """Writes a run's folder, then asks whether a run with these changes may go on there."""
    config = tiny_config("data")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, {"x": np.zeros(1)}, {"config": config.to_dict()}, 1.5)
    write_json(tmp_path / "config.json", config.to_dict())
    VOCABULARY.save(tmp_path / "vocab.json")

    def check(resume: bool | None = None, vocabulary: Vocabulary = VOCABULARY, **changes: Any) -> None:
        check_resumable(tmp_path, tiny_config(**{"data_dir": "data", **changes}), vocabulary, resume)

    return check


def test_a_run_resumes_with_the_same_configuration(resumable: Callable[..., None]) -> None:
    resumable()
    resumable(resume=True)


@pytest.mark.parametrize(
    "changes",
    [
        dict(train__max_iters=100),
        dict(train__eval_interval=3, train__eval_iters=1, train__log_interval=1),
        dict(train__gradient_accumulation_steps=2),
        dict(data_dir="/moved"),
        dict(mesh__data=-1, mesh__fsdp=2, mesh__tensor=2),
        dict(train__scan_layers=True, train__remat="block", train__attention="plain"),
        dict(checkpoint__keep=5, log__tensorboard=True),
    ],
)
def test_what_moves_no_parameter_may_change(resumable: Callable[..., None], changes: dict[str, Any]) -> None:
    resumable(**changes)


def test_what_moves_a_parameter_may_not_change(resumable: Callable[..., None]) -> None:
    sections = tiny_config().to_dict()
    free = ("max_iters", "eval_interval", "eval_iters", "log_interval", "gradient_accumulation_steps")
    free += ("scan_layers", "remat", "attention")
    keys = [
        *(f"{section}.{key}" for section in ("model", "quant", "optimizer") for key in sections[section]),
        *(f"train.{key}" for key in sections["train"] if key not in free),
    ]
    assert not FREE_ON_RESUME & set(keys)
    known = {f"{section}.{key}" for section, values in sections.items() for key in values}
    assert set(keys) | FREE_ON_RESUME == known, "every key is on one side"
    message = (
        r"holds a run with another configuration: model\.n_layer \(1 there, 2 here\), "
        r"optimizer\.learning_rate \(0\.03 there, 0\.02 here\); use its values, or another --workdir"
    )
    with pytest.raises(UserError, match=message):
        resumable(model__n_layer=2, optimizer__learning_rate=0.02, train__max_iters=9)


def test_another_vocabulary_of_the_same_size_is_refused(resumable: Callable[..., None]) -> None:
    other = Vocabulary.from_text("0123456789\n\t")
    assert other.size == VOCABULARY.size
    with pytest.raises(UserError, match=r"was trained on another vocabulary than data; use another --workdir"):
        resumable(vocabulary=other)


def test_resume_and_noresume_insist(resumable: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--noresume: .* already holds a run; give another --workdir, or leave"):
        resumable(resume=False)
    empty = tmp_path / "empty"
    with pytest.raises(
        UserError, match=r"--resume: .*empty holds no run; give the --workdir of one, or leave --resume"
    ):
        check_resumable(empty, tiny_config(), VOCABULARY, True)
    check_resumable(empty, tiny_config(), VOCABULARY, False)
    check_resumable(empty, tiny_config(), VOCABULARY, None)


def test_a_run_without_a_finished_checkpoint_has_nothing_to_resume(
    resumable: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.rmtree(tmp_path / "checkpoints/4")
    resumable()
    with pytest.raises(UserError, match=r"--resume: .* holds no finished checkpoint yet; leave --resume out to start"):
        resumable(resume=True)
    trainer = Trainer(tiny_config("data"))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        state, *rest = begin(trainer, checkpoints, tmp_path)
    assert (int(state.step), rest) == (0, [0, math.inf, None])
    assert capsys.readouterr().out == f"{tmp_path} holds no checkpoint yet: starting at step 0\n"


def test_a_damaged_newest_checkpoint_is_no_import(resumable: Callable[..., None], tmp_path: Path) -> None:
    for path in (tmp_path / "checkpoints/4/meta").iterdir():
        path.unlink()
    resumable()
    with pytest.raises(UserError, match="holds a run with another configuration"):
        resumable(optimizer__learning_rate=0.02)


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
