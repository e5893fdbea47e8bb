import contextlib
import errno
import gc
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT
from jax.sharding import NamedSharding, PartitionSpec

from picogpt_jax.config import MeshConfig
from picogpt_jax.devices.sharding import make_mesh, replicated
from picogpt_jax.errors import UserError
from picogpt_jax.training import checkpoint, orbax_io
from picogpt_jax.training.checkpoint import Checkpoints, abstract, restore_best

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
MESH = make_mesh(MeshConfig(data=4, fsdp=1, tensor=1), batch_size=4)
SHARDINGS = {"kernel": NamedSharding(MESH, PartitionSpec("data")), "step": replicated(MESH)}


@pytest.fixture(autouse=True)
def collect_unfinished_reads() -> Iterator[None]:
    """Orbax leaves an unfinished coroutine behind a read that fails; its warning belongs to the test that caused it."""
    yield
    gc.collect()


def state(step: int) -> dict[str, jax.Array]:
    """1,000 random numbers, too many to be compressed away, and a count."""
    kernel = np.random.default_rng(step).normal(size=(8, 125)).astype(np.float32)
    return jax.device_put({"kernel": kernel, "step": np.int32(step)}, SHARDINGS)


ABSTRACT = abstract(state(0), SHARDINGS)


def save(workdir: Path, val_losses: dict[int, float | None], keep: int = 100) -> None:
    with Checkpoints(workdir, keep) as checkpoints:
        for step, val_loss in val_losses.items():
            checkpoints.save(step, state(step), {"best_val_loss": val_loss, "note": f"é{step}"}, val_loss)


def test_what_is_restored_is_what_was_saved_where_it_was(tmp_path: Path) -> None:
    save(tmp_path, {3: 1.5})
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(ABSTRACT, 3)
        assert restored.step == 3
        assert restored.meta == {"best_val_loss": 1.5, "note": "é3"} == checkpoints.meta(3)
    for name, array in state(3).items():
        np.testing.assert_array_equal(restored.state[name], array)
        assert restored.state[name].dtype == array.dtype
        assert restored.state[name].sharding == SHARDINGS[name]
    assert {shard.data.shape for shard in restored.state["kernel"].addressable_shards} == {(2, 125)}


def test_a_checkpoint_fits_another_number_of_devices(tmp_path: Path) -> None:
    save(tmp_path, {3: 1.5})
    alone = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), 1, jax.devices()[:1])
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(state(0), jax.tree.map(lambda _: replicated(alone), SHARDINGS)), 3)
    np.testing.assert_array_equal(restored.state["kernel"], state(3)["kernel"])
    assert restored.state["kernel"].sharding == replicated(alone)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    save(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: None, 6: 2.2}, keep=2)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [2, 5, 6]
        assert checkpoints.best_step() == 2


def test_without_a_validation_the_newest_is_the_best(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.best_step() is None
        assert checkpoints.restore_latest(lambda _: ABSTRACT) is None
    save(tmp_path, {4: None, 7: None})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() == 7


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state(1), {}, 1.0)
        checkpoints.save(1, state(2), {}, None)
    with Checkpoints(tmp_path) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(ABSTRACT, 1).state["kernel"], state(1)["kernel"])
        assert checkpoints.best_step() == 1


def test_an_older_step_can_be_saved_again_after_the_newer_ones_were_damaged(tmp_path: Path, caplog: Any) -> None:
    save(tmp_path, {1: 3.0, 2: 2.0, 3: 1.0})
    for step in (2, 3):
        shutil.rmtree(tmp_path / "checkpoints" / str(step) / "state")
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        restored = checkpoints.restore_latest(lambda _: ABSTRACT)
        assert restored is not None
        assert restored.step == 1
        checkpoints.save(2, state(20), {}, 5.0)
    assert caplog.text.count("trying the one before it") == 2
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1, 2]
        assert checkpoints.best_step() == 1, "the loss of the damaged one is forgotten"
        np.testing.assert_array_equal(checkpoints.restore(ABSTRACT, 2).state["kernel"], state(20)["kernel"])


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def largest(folder: Path) -> Path:
    return max(files(folder), key=lambda path: path.stat().st_size)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "every file is empty": lambda folder: [os.truncate(path, 0) for path in files(folder)],
    "every file is cut": lambda folder: [truncate(path) for path in files(folder)],
    "the arrays are cut": lambda folder: truncate(largest(folder / "state" / "d")),
    "a bit of the arrays is flipped": lambda folder: flip(largest(folder / "state" / "d")),
    "the state is missing": lambda folder: shutil.rmtree(folder / "state"),
    "the meta data are missing": lambda folder: shutil.rmtree(folder / "meta"),
    "the meta data are cut": lambda folder: [truncate(path) for path in files(folder / "meta")],
    "the validation loss is a list": lambda folder: (folder / "metrics" / "metrics").write_text("[1]"),
    "the validation loss is cut": lambda folder: [truncate(path) for path in files(folder / "metrics")],
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("two")
    save(workdir, {1: 2.0, 2: 1.0})
    return workdir


@pytest.fixture
def workdir(two_checkpoints: Path, tmp_path: Path) -> Iterator[Path]:
    return shutil.copytree(two_checkpoints, tmp_path / "run")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(
    workdir: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = workdir / "checkpoints" / "2"
    DAMAGES[damage](newest)
    with Checkpoints(workdir, keep=5) as checkpoints:
        restored = checkpoints.restore_latest(lambda _: ABSTRACT)
        assert restored is not None
        assert restored.step == 1
        assert checkpoints.steps == [1], "the damaged one is gone"
    np.testing.assert_array_equal(restored.state["kernel"], state(1)["kernel"])
    assert f"checkpoint {newest} is damaged" in caplog.text
    assert "trying the one before it" in caplog.text


@pytest.mark.parametrize("damage", ["every file is cut", "the arrays are cut", "the validation loss is cut"])
def test_nothing_is_removed_where_no_checkpoint_can_be_read(workdir: Path, damage: str) -> None:
    folders = [workdir / "checkpoints" / step for step in ("1", "2")]
    for folder in folders:
        DAMAGES[damage](folder)
    before = files(workdir)
    message = r"checkpoint .*checkpoints/[12] is damaged"
    with pytest.raises(UserError, match=message), Checkpoints(workdir, keep=5) as checkpoints:
        checkpoints.restore_latest(lambda _: ABSTRACT)
    assert files(workdir) == before


@pytest.mark.parametrize("damage", ["every file is cut", "the state is missing", "the validation loss is cut"])
def test_a_reader_names_the_damaged_checkpoint_and_leaves_it(workdir: Path, damage: str) -> None:
    newest = workdir / "checkpoints" / "2"
    DAMAGES[damage](newest)
    before = files(workdir)
    with pytest.raises(UserError, match=rf"checkpoint {newest} is damaged"), Checkpoints(workdir) as checkpoints:
        checkpoints.restore(ABSTRACT, 2)
    assert files(workdir) == before


@pytest.mark.parametrize("read", ["read_meta", "read_state", "open_manager"])
def test_a_reader_beside_a_training_takes_the_checkpoint_that_is_there_now(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    """The training saves a better one and removes the rest while they are read."""
    function, replaced = getattr(orbax_io, read), []

    def beside_a_training(*arguments: Any) -> Any:
        if not replaced:
            replaced.append(arguments)
            save(workdir, {3: 0.5}, keep=1)
        return function(*arguments)

    monkeypatch.setattr(orbax_io, read, beside_a_training)
    restored = restore_best(workdir, lambda _: ABSTRACT)
    assert restored is not None
    assert replaced
    assert restored.step == 3
    np.testing.assert_array_equal(restored.state["kernel"], state(3)["kernel"])


def test_a_damaged_best_checkpoint_stays_damaged(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.1)
    DAMAGES["the arrays are cut"](workdir / "checkpoints" / "2")
    with pytest.raises(UserError, match=r"checkpoints/2 is damaged"):
        restore_best(workdir, lambda _: ABSTRACT)


def test_damaged_meta_data_are_named(workdir: Path) -> None:
    DAMAGES["the meta data are cut"](workdir / "checkpoints" / "2")
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.meta(1)["note"] == "é1"
        with pytest.raises(UserError, match=r"checkpoint .*checkpoints/2 is damaged"):
            checkpoints.meta(2)


def test_no_damaged_file_is_read_as_if_it_were_whole(two_checkpoints: Path, tmp_path: Path) -> None:
    """Each file of a checkpoint is cut, emptied and flipped in turn: what is read is what was saved, or nothing is."""
    names = [path.relative_to(two_checkpoints) for path in files(two_checkpoints / "checkpoints" / "2")]
    assert len(names) > 5
    refused = set()
    for name in names:
        for damage in (truncate, flip, lambda path: os.truncate(path, 0)):
            copy = shutil.copytree(two_checkpoints, tmp_path / "run")
            damage(copy / name)
            try:
                with Checkpoints(copy) as checkpoints:
                    restored = checkpoints.restore(ABSTRACT, 2)
            except UserError as error:
                refused.add((name.parts[2], f"checkpoint {copy / 'checkpoints' / '2'} is damaged" in str(error)))
            else:
                assert (restored.meta["note"], restored.meta["best_val_loss"]) == ("é2", 1.0), name
                np.testing.assert_array_equal(restored.state["kernel"], state(2)["kernel"], err_msg=str(name))
            shutil.rmtree(copy)
    assert refused >= {("state", True), ("meta", True), ("metrics", True)}
    assert all(named for _, named in refused), "the message names the checkpoint"


def test_numbers_that_changed_on_the_disk_are_named(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What TensorStore reads without complaint need not be what was saved."""
    read_state = orbax_io.read_state

    def changed(*arguments: Any) -> Any:
        restored = read_state(*arguments)
        return restored | {"kernel": restored["kernel"].at[3, 7].multiply(-1)}

    monkeypatch.setattr(orbax_io, "read_state", changed)
    with Checkpoints(workdir) as checkpoints:
        with pytest.raises(UserError, match=r"checkpoints/2 is damaged: not the numbers that were saved: kernel"):
            checkpoints.restore(ABSTRACT, 2)


def test_a_checkpoint_without_a_manifest_is_read(workdir: Path) -> None:
    """As the versions before it wrote them."""
    with Checkpoints(workdir, keep=5) as checkpoints:
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state(3)), meta=ocp.args.JsonSave({"config": {}, "note": "old"})
        )
        checkpoints._manager.save(3, args=items, metrics={"val_loss": 0.5})
        checkpoints.wait()
        assert checkpoints.restore(ABSTRACT, 3).meta["note"] == "old"
        assert checkpoints.best_step() == 3


def test_entries_that_do_not_fit_are_named_and_nothing_is_removed(workdir: Path) -> None:
    place = SHARDINGS["kernel"]
    other = {"kernel": jax.ShapeDtypeStruct((8, 125), jnp.float16, sharding=place), "bias": ABSTRACT["step"]}
    message = (
        r"checkpoints/2 does not fit: missing: bias; unexpected: step; of another shape or type: "
        r"kernel \(float32\[8, 125\] there, float16\[8, 125\] here\)"
    )
    with Checkpoints(workdir, keep=5) as checkpoints:
        with pytest.raises(UserError, match=message):
            checkpoints.restore_latest(lambda _: other)
        assert checkpoints.steps == [1, 2]


def test_what_is_still_being_written_is_waited_for(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state(1), {"note": "é1"}, 1.0)
        assert checkpoints.meta(1) == {"note": "é1"}
        checkpoints.save(2, state(2), {}, 1.0)
        np.testing.assert_array_equal(checkpoints.restore(ABSTRACT, 2).state["kernel"], state(2)["kernel"])
        checkpoints.save(3, state(3), {}, 1.0)
        restored = checkpoints.restore_latest(lambda _: ABSTRACT)
        assert restored is not None
        assert restored.step == 3


def test_an_array_larger_than_what_is_on_its_way_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax_io, "WRITE_BYTES", 100)
    monkeypatch.setattr(orbax_io, "READ_BYTES", 100)
    save(tmp_path, {1: 2.0, 2: 1.0})
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            np.testing.assert_array_equal(checkpoints.restore(ABSTRACT, step).state["kernel"], state(step)["kernel"])


MEASURED = """
import os, sys
import jax, numpy as np
from pathlib import Path
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from picogpt_jax.training import integrity
from picogpt_jax.training.checkpoint import Checkpoints

def mib(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024

with Checkpoints(Path(sys.argv[2]) / f"first{os.getpid()}", keep=1) as checkpoints:  # what is done and kept once
    checkpoints.save(1, {"x": np.zeros(4, np.float32)}, {}, 1.0)
    alone = SingleDeviceSharding(jax.devices()[0])
    checkpoints.restore({"x": jax.ShapeDtypeStruct((4,), np.float32, sharding=alone)}, 1)
what, folder, n_devices, spec = sys.argv[1], sys.argv[2], int(sys.argv[3]), PartitionSpec(*eval(sys.argv[4]))
place = NamedSharding(jax.make_mesh((n_devices,), ("x",), devices=jax.devices()[:n_devices]), spec)
names = [f"{index:02}" for index in range(48)]
shape = (1024, 2048)
if what == "save":
    random = np.random.default_rng(0)
    state = {name: jax.device_put(random.standard_normal(shape, np.float32), place) for name in names}
    integrity.manifest(state)
    step = jax.jit(lambda state: jax.tree.map(lambda array: array * 1.01, state), donate_argnums=0)
    state = jax.block_until_ready(step(state))
else:
    state = {name: jax.ShapeDtypeStruct(shape, np.float32, sharding=place) for name in names}
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = mib("VmRSS")
with Checkpoints(folder, keep=1 if what == "save" else None) as checkpoints:
    if what == "save":
        checkpoints.save(1, state, {}, 1.0)
        state = jax.block_until_ready(step(state))  # training goes on
    else:
        kept = checkpoints.restore(state, 1)
print((mib("VmHWM") - before) / (4 * 1024 * 2048 * len(names) / 2**20))
"""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Peak memory of programs of their own, beyond what they began with, as a multiple of a state of 384 MiB."""
    folder = str(tmp_path_factory.mktemp("large"))

    def peak(what: str, n_devices: int, spec: str) -> float:
        command = [sys.executable, "-c", MEASURED, what, folder, str(n_devices), spec]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    return {
        "save": peak("save", 4, "['x']"),
        "restore, split otherwise": peak("restore", 4, "[None, 'x']"),
        "restore, on one device": peak("restore", 1, "[]"),
    }


def test_a_restore_holds_one_copy(peaks: dict[str, float]) -> None:
    """The state itself, and what is on its way: without the limit, or the checksums written down, it is two."""
    restores = {what: peak for what, peak in peaks.items() if what.startswith("restore")}
    assert max(restores.values()) < 1.45, restores
    assert min(restores.values()) > 0.95, restores


def test_a_save_holds_one_copy(peaks: dict[str, float]) -> None:
    """That of the step saved, while the next is computed, and what is on its way."""
    assert peaks["save"] < 1.6


# ------------------------------------------------------------------------------------------------- what cannot be saved


def test_a_checkpoint_that_cannot_be_read_now_is_left_alone(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one on a file system that is away for a moment: its files are not to blame."""

    def away(*_: Any, **__: Any) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with Checkpoints(workdir, keep=2) as checkpoints:
        steps = checkpoints.steps
        monkeypatch.setattr(ocp.Checkpointer, "restore", away)
        with pytest.raises(UserError, match=rf"{steps[-1]} cannot be read now: .*start again later"):
            checkpoints.restore_latest(lambda _: ABSTRACT)
        assert checkpoints.steps == steps


@contextlib.contextmanager
def no_file_larger_than(n_bytes: int) -> Iterator[None]:
    """The kernel refuses to let this process's files grow beyond that: what a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_background_save_is_reported_without_another_save(workdir: Path) -> None:
    message = r"cannot save step 3 in .*checkpoints: .*File too large.*; the last checkpoint is step 2\. Make room"
    with pytest.raises(UserError, match=message), Checkpoints(workdir, keep=5) as checkpoints:
        with no_file_larger_than(2000):
            checkpoints.save(3, state(3), {}, 0.5)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                checkpoints.check()
                time.sleep(0.01)
        pytest.fail("the error was never reported")
    with Checkpoints(workdir, keep=5) as checkpoints:
        assert checkpoints.steps == [1, 2]
        restored = checkpoints.restore_latest(lambda _: ABSTRACT)
        assert restored is not None
        assert restored.step == 2


def test_the_last_save_of_a_run_may_not_fail_unseen(workdir: Path) -> None:
    with pytest.raises(UserError, match=r"cannot save step 3 in .*File too large"):
        with no_file_larger_than(2000), Checkpoints(workdir, keep=5) as checkpoints:
            checkpoints.save(3, state(3), {}, 0.5)


@pytest.mark.parametrize("moment", ["before the save", "after it"])
def test_a_folder_that_has_vanished_is_not_made_again(workdir: Path, moment: str) -> None:
    with pytest.raises(UserError, match=r"cannot save step 3 in .*checkpoints.* has vanished; there is no earlier"):
        with Checkpoints(workdir, keep=5) as checkpoints:
            if moment == "before the save":
                shutil.rmtree(workdir)
            checkpoints.save(3, state(3), {}, 0.5)
            checkpoints._manager.wait_until_finished()
            shutil.rmtree(workdir)
    assert not workdir.exists()


def test_a_state_of_another_shape_does_not_fit(workdir: Path) -> None:
    other = {**ABSTRACT, "kernel": jax.ShapeDtypeStruct((8, 124), jnp.float32, sharding=SHARDINGS["kernel"])}
    with Checkpoints(workdir) as checkpoints:
        with pytest.raises(UserError, match=r"checkpoints/2 does not fit: "):
            checkpoints.restore(other, 2)
        with pytest.raises(UserError, match=r"checkpoints/2 does not fit: "):
            checkpoints.restore({**ABSTRACT, "extra": ABSTRACT["step"]}, 2)


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no checkpoints; expected a workdir that scripts/train\.py has written"):
        Checkpoints(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file: Not a directory; give another --workdir"):
        Checkpoints(tmp_path / "file", keep=1)
