"""A model of integer arithmetic as its users meet it: one training, and every runtime says the same, to the letter."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, scripts_in

from picogpt_jax.runtimes import c_library

FLAGS = [
    *("--config.quant.arithmetic=integer", "--config.mesh.data=1"),
    *(f"--config.model.{item}" for item in ("n_layer=1", "n_head=2", "n_embd=16", "block_size=32")),
    *(f"--config.train.{item}" for item in ("batch_size=8", "max_iters=60", "eval_interval=60", "eval_iters=2")),
    *(f"--config.optimizer.{item}" for item in ("warmup_iters=5", "lr_decay_iters=60")),
]
MODELS = {"jax": "int8", "numpy": "int8", "torch": "int8", "onnx": "onnx"}
if c_library.compiler() is not None:
    MODELS["c"] = "int8"

Command = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every command of this file runs."""
    return tmp_path_factory.mktemp("integer")


@pytest.fixture(scope="module")
def command(folder: Path, data_dir: Path) -> Command:
    """Runs a script beside a run, its int8 folder and its ONNX folder; returns what it prints."""
    run_script = scripts_in(folder)

    def command(script: str, *arguments: str, status: int = 0) -> str:
        done = run_script(f"scripts/{script}.py", *arguments)
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    config = f"--config={ROOT / 'configs' / 'base.py'}"
    command("train", config, "--workdir=run", f"--config.data.dir={data_dir}", *FLAGS)
    quantized = command("quantize", "--workdir=run", "--output=int8")
    assert "trained with quantization (QAT); integer arithmetic, weights per_channel" in quantized
    (line,) = (line for line in quantized.splitlines() if line.startswith("loss: "))
    integer, mixed, difference = (float(line.split()[i].rstrip(",")) for i in (2, 4, 6))
    assert difference == pytest.approx(integer - mixed, abs=2e-6)
    assert 0 < abs(difference) < 0.01
    command("convert", "--input=int8", "--to=onnx", "--output=onnx")
    return command


def test_every_runtime_writes_the_same_texts(command: Command) -> None:
    flags = ["--num_samples=2", "--max_new_tokens=60", "--seed=7", "--temperature=0.9", "--top_k=8"]
    flags += ["--overflow=refill"]
    texts = {name: command("sample", f"--model={model}", f"--runtime={name}", *flags) for name, model in MODELS.items()}
    assert texts == dict.fromkeys(MODELS, texts["jax"])
    first, second = texts["jax"].removeprefix("--- sample 1\n").split("\n--- sample 2\n")
    assert first != second.removesuffix("\n"), "a control: texts differ where they may"


def test_compare_finds_no_difference(command: Command, folder: Path, data_dir: Path) -> None:
    size = ["--max_tokens=300", "--prompts=5", "--prompt_tokens=4", "--new_tokens=40", "--speed_tokens=0"]
    runtimes = f"--runtimes={','.join(MODELS)}"
    command("compare", "--model=int8", f"--data={data_dir}", "--output=all", runtimes, *size)
    rows = json.loads((folder / "all" / "compare.json").read_text())["runtimes"]
    for row in rows:
        assert (row["largest_difference"], row["same_next_token"], row["same_texts"]) == (0.0, 1.0, 1.0)
    assert {row["runtime"] for row in rows} == set(MODELS)


def test_what_one_runtime_compresses_another_brings_back(command: Command, folder: Path) -> None:
    plain = "abcdefghij" * 60 + "Whether 'tis nobler… \U0001f600\r\n"
    (folder / "plain.txt").write_bytes(plain.encode())
    for name, other in (("jax", "numpy"), ("onnx", "torch"), ("numpy", list(MODELS)[-1])):
        flags = [f"--model={MODELS[name]}", f"--runtime={name}", "--block_size=200"]
        printed = command("compress", *flags, "--input=plain.txt", f"--output={name}.pgz")
        size = (folder / f"{name}.pgz").stat().st_size
        bits = 8 * size / len(plain)
        assert (
            printed == f"wrote {name}.pgz: {len(plain.encode())} bytes -> {size} bytes, {bits:.4f} bits per character\n"
        )
        flags = [f"--model={MODELS[other]}", f"--runtime={other}", "--decompress"]
        command("compress", *flags, f"--input={name}.pgz", "--output=again.txt")
        assert (folder / "again.txt").read_bytes() == plain.encode()
    assert (folder / "jax.pgz").read_bytes() == (folder / "onnx.pgz").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model=int8 --input=nowhere", "cannot read --input=nowhere: No such file or directory; give a file that "),
        ("--model=int8 --decompress --input=int8/vocab.json", "int8/vocab.json: "),
        ("--model=run --input=int8/vocab.json", "run is no model of integer arithmetic; make one with: python "),
        ("--model=int8 --input=int8/vocab.json --runtime=c64", "flag --runtime=c64: value should be one of "),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(command: Command, folder: Path, arguments: str, message: str) -> None:
    error = command("compress", *arguments.split(), "--output=nothing", status=2)
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not list(folder.glob("nothing*"))
