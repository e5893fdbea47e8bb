"""The order of the rooms: a room imports only from rooms below it, and nothing imports scripts or configs."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "picogpt_jax"
GROUND = ["errors", "files", "progress", "config", "cli"]  # below every room; `__init__` is above all
ROOMS = [
    *["text", "devices", "kernels", "model", "training"],
    *["int8", "runtimes", "formats", "planning", "benchmarks"],
]
RUNTIMES = ["jax", "numpy", "torch", "onnx", "llama_cpp", "c_"]  # what a runtime's files begin with
ONE_FILE = {"aqt": "model/quantization.py", "orbax": "training/orbax_io.py"}  # libraries that one file alone imports


def modules() -> dict[str, Path]:
    """picogpt_jax.room.file -> its path."""
    paths = {path: path.relative_to(ROOT).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in paths.items()}


def imports(source: str) -> Iterator[str]:
    """Every module that the source imports, in functions too; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports() -> dict[str, set[str]]:
    """Module of ours -> the modules of ours that it imports."""
    ours = modules()
    return {
        name: {other for other in imports(path.read_text(encoding="utf-8")) if other in ours and other != "picogpt_jax"}
        for name, path in ours.items()
    }


def room(module: str) -> str:
    """The room of a module, or the name of a file on the ground floor."""
    return module.split(".")[1] if "." in module else ""


def climbs(graph: dict[str, set[str]]) -> list[str]:
    """Imports from a room above."""
    order = {name: level for level, name in enumerate([*GROUND, *ROOMS, ""])}
    return sorted(
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if order[room(other)] > order[room(module)]
    )


def crossings(graph: dict[str, set[str]]) -> list[str]:
    """Runtimes that import another runtime's file."""

    def runtime(module: str) -> str | None:
        file = module.split(".")[-1]
        is_one = module.startswith("picogpt_jax.runtimes.")
        return next((name for name in RUNTIMES if is_one and file.startswith(name)), None)

    return sorted(
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if (runtime(module) and runtime(other)) and runtime(module) != runtime(other)
    )


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ROOMS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", *GROUND}


def test_imports_go_downwards() -> None:
    assert climbs(own_imports()) == []


def test_no_file_imports_itself_by_a_circle() -> None:
    TopologicalSorter(own_imports()).prepare()  # raises CycleError


def test_no_runtime_imports_another_one() -> None:
    assert crossings(own_imports()) == []
    files = {path.stem for path in (PACKAGE / "runtimes").glob("*.py")} - {"__init__", "engine", "draws", "loop"}
    assert all(file.startswith(tuple(RUNTIMES)) for file in files), "a file that belongs to no runtime"


@pytest.mark.parametrize(("library", "file"), ONE_FILE.items())
def test_one_file_alone_imports_the_library(library: str, file: str) -> None:
    importers = {
        str(path.relative_to(PACKAGE))
        for path in modules().values()
        if any(name.split(".")[0] == library for name in imports(path.read_text(encoding="utf-8")))
    }
    assert importers == {file}


def test_the_library_imports_neither_scripts_nor_configs_nor_private_modules() -> None:
    for name, path in modules().items():
        for imported in imports(path.read_text(encoding="utf-8")):
            assert imported.split(".")[0] not in ("scripts", "configs", "tests"), name
            assert not imported.startswith("jax._src"), name


def test_the_tests_mirror_the_rooms() -> None:
    """tests/ROOM/test_FILE.py is about picogpt_jax/ROOM/FILE.py."""
    for path in (ROOT / "tests").glob("*/test_*.py"):
        assert (PACKAGE / path.parent.name / path.name.removeprefix("test_")).is_file(), path


def test_no_file_is_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules().values()}
    assert not {str(path): length for path, length in lengths.items() if length > 350}


def test_the_checks_find_what_is_wrong() -> None:
    assert climbs({"picogpt_jax.text.a": {"picogpt_jax.model.b"}, "picogpt_jax.model.b": {"picogpt_jax.errors"}}) == [
        "picogpt_jax.text.a imports picogpt_jax.model.b"
    ]
    assert crossings({"picogpt_jax.runtimes.onnx_a": {"picogpt_jax.runtimes.torch_b", "picogpt_jax.runtimes.loop"}})
    assert "a.b" in imports("def f():\n    from a import b")
