"""The wheel, built here and unpacked elsewhere: what it holds, and that it works without the repository."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from test_int8_model import random_model

from picogpt_jax import __version__
from picogpt_jax.int8.folder import save_int8_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="needs setuptools: pip install setuptools"
)
LIGHT = """
import sys
import picogpt_jax
print(picogpt_jax.__file__, picogpt_jax.__version__)
print(sorted({"jax", "torch", "numpy", "flax", "onnxruntime", "tqdm"} & set(sys.modules)))
model = picogpt_jax.load("int8", runtime="numpy")
print(sorted({"jax", "torch", "flax", "onnxruntime", "tqdm"} & set(sys.modules)))
print(len(model.generate("abc", max_new_tokens=5)))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel is made of: a copy, because building leaves files behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "picogpt_jax", folder / "picogpt_jax", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "picogpt_jax" / "int8" / "README.md").touch()  # every room has such a page
    return folder


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("target")
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True, timeout=300)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_the_wheel_holds_every_room_and_its_pages(source: Path, installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in (folder / "picogpt_jax").rglob("*") if path.is_file()}

    assert files(installed) == files(source)
    assert files(source) >= {"picogpt_jax/py.typed", "picogpt_jax/int8/README.md", "picogpt_jax/formats/loading.py"}
    metadata = next(installed.glob("*.dist-info")) / "METADATA"
    assert f"\nVersion: {__version__}\n" in metadata.read_text(encoding="utf-8")


def test_the_installed_package_is_light_and_works(installed: Path, tmp_path: Path) -> None:
    save_int8_model(random_model(), tmp_path / "int8")
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", LIGHT]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"{installed}/picogpt_jax/__init__.py {__version__}", "[]", "[]", "5"]
