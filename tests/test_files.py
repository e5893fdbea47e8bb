import contextlib
import errno
import json
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from tiny import VOCABULARY, tiny_config

from picogpt_jax.errors import UserError
from picogpt_jax.files import atomic_folder, atomic_path, check_replaceable, disk_failure, locked, read_json, write_json
from picogpt_jax.formats import huggingface
from picogpt_jax.int8.folder import save_int8_model
from picogpt_jax.int8.int8_model import Int8Model, Int8Tensor, Quantization


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


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may be larger than `room` bytes; what writes more fails as on a full disk, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def int8_model(extra: int) -> Int8Model:
    """Of random codes; `extra` makes the model another one."""
    config = tiny_config(model__n_embd=64, model__bias=True).model
    matrices = {
        name: Int8Tensor(np.full(shape, extra, np.int8), np.ones((shape[0], 1), np.float32))
        for name, shape in config.matrix_shapes().items()
    }
    return Int8Model(
        model=config,
        quantization=Quantization(weight_granularity="per_channel", activation_bits=8),
        training={},
        vocabulary=VOCABULARY,
        matrices=matrices,
        vectors={name: np.ones(shape, np.float32) for name, shape in config.vector_shapes().items()},
    )


def save_huggingface(model: Int8Model, path: Path) -> None:
    huggingface.save_huggingface(model.model, huggingface.dequantized(model), model.vocabulary, path)


def save_torch(model: Int8Model, path: Path) -> None:
    from picogpt_jax.formats.gpt2_tensors import FloatCheckpoint
    from picogpt_jax.formats.torch_checkpoint import save_float_checkpoint

    arrays = huggingface.dequantized(model)
    save_float_checkpoint(FloatCheckpoint(model.model, arrays, vocabulary=model.vocabulary), path)


def save_torch_int8(model: Int8Model, path: Path) -> None:
    from picogpt_jax.formats.torch_int8_checkpoint import save_int8_checkpoint

    save_int8_checkpoint(model, path)


def save_onnx(model: Int8Model, path: Path) -> None:
    from picogpt_jax.formats.onnx_export import save_onnx

    save_onnx(model, path)


def save_gguf(model: Int8Model, path: Path) -> None:
    from picogpt_jax.formats.gguf_export import save_gguf

    save_gguf(model, path)


def save_ids(model: Int8Model, path: Path) -> None:
    """Only the last bytes do not fit, which NumPy does not notice."""
    with atomic_path(path) as temporary:
        np.full(5_050, model.matrices["transformer.wpe"].codes[0, 0], np.uint16).tofile(temporary)


def save_text(model: Int8Model, path: Path) -> None:
    write_json(path, [int(model.matrices["transformer.wpe"].codes[0, 0])] * 30_000)


WRITERS: dict[str, tuple[Callable[[Int8Model, Path], None], str | None]] = {  # and the package that is needed
    "int8": (save_int8_model, None),
    "huggingface": (save_huggingface, None),
    "torch": (save_torch, "torch"),
    "torch-int8": (save_torch_int8, "torch"),
    "onnx": (save_onnx, "onnx"),
    "gguf": (save_gguf, "gguf"),
    "ids": (save_ids, None),
    "json": (save_text, None),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path, name: str) -> None:
    write, package = WRITERS[name]
    if package:
        pytest.importorskip(package)
    target = tmp_path / "model"

    def content() -> dict[str, bytes]:
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        return {str(path.relative_to(tmp_path)): path.read_bytes() for path in files}

    write(int8_model(1), target)
    before = content()
    with pytest.raises(UserError) as caught, full_disk(10_000):
        write(int8_model(2), target)
    assert re.fullmatch(
        rf"cannot write {target}: (File too large|No space left on device); make room there, or choose another place",
        str(caught.value),
    )
    assert content() == before
    write(int8_model(2), target)
    assert content() != before, "a control"


def test_an_error_that_is_not_the_disks_stays_what_it_is() -> None:
    assert disk_failure(ValueError("no space")) is None
    assert disk_failure(FileNotFoundError(errno.ENOENT, "No such file or directory")) is None
    quoted = RuntimeError("I/O error: No space left on device (os error 28)")
    assert disk_failure(quoted) == "No space left on device"


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
