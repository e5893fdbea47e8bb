"""What every test shares: eight CPU devices, strict JAX, and ways to the data and the scripts."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

THREADS = str(min(4, os.cpu_count() or 1))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # sharding is exercised on every machine
os.environ.setdefault("NPROC", THREADS)  # XLA's thread pool
os.environ.setdefault("OMP_NUM_THREADS", THREADS)  # PyTorch's and NumPy's

import jax  # after the environment, which it reads when it is imported
from jax.experimental.compilation_cache import compilation_cache
from tiny import TEXT, quick_compilation, write_data

os.environ["JAX_NUM_CPU_DEVICES"] = "4"  # of the scripts under test, which inherit it: the fewer, the faster
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parents[1]
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"

RunScript = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def shakespeare_text() -> str:
    """Tiny Shakespeare, 1,115,394 characters; the test is skipped where the file is missing."""
    if not SHAKESPEARE.is_file():
        pytest.skip(f"{SHAKESPEARE} is missing: put tiny Shakespeare's input.txt there to run this test")
    return SHAKESPEARE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def compile_quickly_and_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that are needed again compile once, through the cache that the scripts use as well."""
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.getbasetemp() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with quick_compilation():
        yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a prepare.py leaves of `tiny.TEXT`."""
    return write_data(tmp_path_factory.mktemp("data"), TEXT)


@pytest.fixture
def run_script(tmp_path: Path) -> RunScript:
    """`run_script("scripts/train.py", "--flag=1", timeout=60)` runs in `tmp_path`; the output is captured."""
    return scripts_in(tmp_path)


def scripts_in(folder: Path) -> RunScript:
    """`run_script` in another folder."""

    def run(script: str, *arguments: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": search_path},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
