import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from picogpt_jax.errors import UserError
from picogpt_jax.files import atomic_folder, atomic_path, check_replaceable, locked, read_json, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "file.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert names(target.parent) == ["file.txt"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text("new")
        _ = 1 / 0
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("first", "second"):
        with atomic_folder(target) as temporary:
            (temporary / name).write_text(name)
            (temporary / name).chmod(0o600)
            assert not (target / name).exists()
    assert stat.S_IMODE((target / "second").stat().st_mode) == 0o644
    assert names(target) == ["second"], "nothing of the first call is left"
    assert names(tmp_path) == ["model"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "kept").touch()
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as temporary:
        (temporary / "lost").touch()
        _ = 1 / 0
    assert names(target) == ["kept"]
    assert names(tmp_path) == ["model"]


def test_a_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match=r"file is a file; a folder is written there: choose another path"):
        with atomic_folder(tmp_path / "file"):
            pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "new", {"model"})
    check_replaceable(tmp_path, {"model"})
    (tmp_path / "model").touch()
    check_replaceable(tmp_path, {"model", "config"})
    (tmp_path / "thesis").touch()
    with pytest.raises(
        UserError, match=r"is a folder of other files \(thesis\), which would be replaced; name a new one"
    ):
        check_replaceable(tmp_path, {"model", "config"})


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder is a folder; a file is written there: choose another path"):
        with atomic_path(tmp_path / "folder"):
            pytest.fail("the block must not run")


def test_a_path_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for write in (atomic_path, atomic_folder):
        with pytest.raises(UserError, match=r"cannot write .*/file/below: .*; choose a folder that can be written"):
            with write(tmp_path / "file" / "below"):
                pytest.fail("the block must not run")


def test_json_is_written_as_it_is_read(tmp_path: Path) -> None:
    value = {"text": "é\n日", "numbers": [1, 0.1, None, True], "empty": {}}
    write_json(tmp_path / "value.json", value)
    raw = (tmp_path / "value.json").read_text(encoding="utf-8")
    assert raw.endswith("}\n")
    assert "é" in raw, "readable, not escaped"
    assert json.loads(raw) == value == read_json(tmp_path / "value.json")


def test_json_that_cannot_be_encoded_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "value.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "value.json", {1, 2})
    assert read_json(tmp_path / "value.json") == 1
    assert names(tmp_path) == ["value.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=["empty", "half", "not UTF-8", "deep"]
)
def test_damaged_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "value.json").write_bytes(content)
    with pytest.raises(UserError, match=r"value\.json is not valid JSON \(.+\); write it again"):
        read_json(tmp_path / "value.json")


def test_missing_and_oversized_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.json does not exist"):
        read_json(tmp_path / "missing.json")
    with pytest.raises(UserError, match=rf"cannot read {tmp_path}: "):
        read_json(tmp_path)
    write_json(tmp_path / "value.json", "x" * 100)
    size = os.stat(tmp_path / "value.json").st_size
    with pytest.raises(UserError, match=rf"has {size} bytes; at most 50 were expected"):
        read_json(tmp_path / "value.json", max_bytes=50)


def test_a_locked_folder_is_refused_with_its_holder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with locked(folder, "training in"):
        program = f"from picogpt_jax.files import locked\nwith locked({str(folder)!r}, 'training in'): print('entered')"
        blocked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
        assert f"process {os.getpid()} on {socket.gethostname()} is training in {folder}; wait for it" in blocked.stderr
    with locked(folder, "training in"):
        pass


def test_a_lock_ends_with_its_program(tmp_path: Path) -> None:
    program = f"""
import os, signal
from picogpt_jax.files import locked
with locked({str(tmp_path)!r}, "training in"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == -signal.SIGKILL
    with locked(tmp_path, "training in"):
        pass


def test_a_folder_that_cannot_be_written_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file/run: Not a directory; give a folder that can be writ"):
        with locked(tmp_path / "file" / "run", "training in"):
            pass
