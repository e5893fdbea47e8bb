"""PyTorch's container: which file is which, and that a hostile or damaged one is refused and runs nothing."""

import os
import random
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_int8_model import random_model
from test_torch_checkpoint import rewrite, save_float
from test_torch_int8_checkpoint import picogpt_file

from picogpt_jax.errors import UserError
from picogpt_jax.formats.torch_checkpoint import load_float_checkpoint
from picogpt_jax.formats.torch_file import checkpoint_kind, is_torch_checkpoint, load_content
from picogpt_jax.formats.torch_int8_checkpoint import load_int8_checkpoint, load_picogpt_int8, save_int8_checkpoint


@pytest.fixture
def int8_file(tmp_path: Path) -> Path:
    save_int8_checkpoint(random_model(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.fixture
def float_file(tmp_path: Path) -> Path:
    save_float(tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


def test_the_kinds_are_told_apart(int8_file: Path, float_file: Path, tmp_path: Path) -> None:
    def kind(path: Path) -> str:
        return checkpoint_kind(load_content(path), path)

    assert kind(int8_file) == "torch-int8"
    assert kind(float_file) == "torch-float"
    picogpt_file(tmp_path / "picogpt.pt")
    assert kind(tmp_path / "picogpt.pt") == "picogpt-int8"
    with pytest.raises(UserError, match="this is a float checkpoint; expected an int8 one"):
        load_int8_checkpoint(float_file)
    with pytest.raises(UserError, match="this is an int8 checkpoint; expected a float one"):
        load_float_checkpoint(int8_file)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other.pt is no model that is known: it has the keys weights; exp"):
        kind(tmp_path / "other.pt")
    torch.save([1], tmp_path / "other.pt")
    with pytest.raises(UserError, match="holds a list; expected a dict"):
        kind(tmp_path / "other.pt")


def test_a_torch_file_is_recognised(int8_file: Path, tmp_path: Path) -> None:
    assert is_torch_checkpoint(int8_file)
    renamed = int8_file.rename(tmp_path / "model.bin")
    assert is_torch_checkpoint(renamed)
    np.savez(tmp_path / "arrays.npz", np.ones(3))
    (tmp_path / "text.txt").write_text("no zip")
    (tmp_path / "damaged.pt").write_text("no zip")
    assert is_torch_checkpoint(tmp_path / "damaged.pt")  # so that loading it says what is wrong
    for name in ("arrays.npz", "text.txt", ".", "nothing.pt"):
        assert not is_torch_checkpoint(tmp_path / name)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("load", [load_int8_checkpoint, load_float_checkpoint, load_picogpt_int8, load_content])
def test_no_code_of_a_file_is_run(tmp_path: Path, load: Callable[[Path], object]) -> None:
    for zipped in (True, False):
        torch.save({"model": Malicious(tmp_path / "pwned")}, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            UserError,
            match=r"m\.pt (holds a Python object, posix.mkdir; |is in the format that PyTorch wrote before)",
        ):
            load(tmp_path / "m.pt")
        assert not (tmp_path / "pwned").exists()
    torch.load(tmp_path / "m.pt", weights_only=False)  # the control: the file is a live one
    assert (tmp_path / "pwned").exists()


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10 << 20))
    with pytest.raises(UserError, match="declares 10485760, or is compressed"):
        load_int8_checkpoint(tmp_path / "bomb.pt")


def test_a_few_nested_lists_that_stand_for_billions_are_refused(float_file: Path) -> None:
    laughs: list[Any] = ["ha"]
    for _ in range(40):
        laughs = [laughs, laughs]
    rewrite(float_file, lambda content: content.update(config={"laughs": laughs}))
    with pytest.raises(UserError, match="config has more than 1048576 values"):
        load_float_checkpoint(float_file)


def test_damaged_files_are_refused(int8_file: Path, tmp_path: Path) -> None:
    data = int8_file.read_bytes()
    for size in (0, 1, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.pt").write_bytes(data[:size])
        with pytest.raises(UserError, match=r"cut\.pt is no PyTorch checkpoint, or is truncated"):
            load_int8_checkpoint(tmp_path / "cut.pt")
    with pytest.raises(UserError, match=r"nothing\.pt does not exist"):
        load_int8_checkpoint(tmp_path / "nothing.pt")


def test_a_flipped_byte_is_refused_or_harmless(int8_file: Path, tmp_path: Path) -> None:
    """Wherever it lies, in the zip's tables or in the pickle: a UserError, or a model that passed every check."""
    data, generator = int8_file.read_bytes(), random.Random(0)
    start, end = data.index(b"data.pkl"), data.index(b"PK", data.index(b"data.pkl"))
    places = [*range(start, end, 60), *range(len(data) - 3000, len(data), 60)]
    refused = 0
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << generator.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(changed)
        try:
            load_int8_checkpoint(tmp_path / "flipped.pt")
        except UserError:
            refused += 1
    assert refused > len(places) / 4


def test_an_unsafe_torch_is_refused(int8_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(UserError, match=r"torch 2.9.1\+cpu .*CVE-2026-24747.*install torch >= 2.10"):
        load_int8_checkpoint(int8_file)


def test_a_file_from_before_pytorch_1_6_says_how_to_write_it_anew(float_file: Path) -> None:
    before = load_float_checkpoint(float_file)
    torch.save(torch.load(float_file, weights_only=True), float_file, _use_new_zipfile_serialization=False)
    with pytest.raises(
        UserError, match=r"ckpt\.pt is in the format that PyTorch wrote before 1\.6, .* safetensors"
    ) as told:
        load_float_checkpoint(float_file)
    python, option, code = shlex.split(str(told.value).partition("write it again with: ")[2])
    assert (python, option) == ("python", "-c")
    exec(code, {})
    after = load_float_checkpoint(float_file)
    for name, array in before.tensors.items():
        np.testing.assert_array_equal(after.tensors[name], array, err_msg=name, strict=True)
