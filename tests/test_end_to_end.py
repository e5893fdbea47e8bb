"""The commands one after another, as a user runs them: text, training, int8 model, PyTorch files, losses, samples."""

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, SHAKESPEARE

VAL_TOKENS = 111_540
BLOCK = 64
STEPS = 300
MODEL_FLAGS = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": BLOCK, "dropout": 0.0}
TRAIN_FLAGS = {"batch_size": 32, "max_iters": STEPS, "eval_interval": STEPS // 2, "eval_iters": 20}
OPTIMIZER_FLAGS = {"learning_rate": 4e-3, "warmup_iters": 20, "lr_decay_iters": STEPS}

Done = subprocess.CompletedProcess[str]
Command = Callable[..., Done]


def overrides(section: str, values: dict[str, object]) -> list[str]:
    return [f"--config.{section}.{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every command of this file runs; names in the tests are relative to it."""
    return tmp_path_factory.mktemp("end_to_end")


@pytest.fixture(scope="module")
def command(folder: Path) -> Command:
    """`command("scripts/sample.py", "--model=run")` runs a script; it must end with `status`."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",  # PyTorch's threads would wait for each other longer than they compute
    }

    def run(script: str, *arguments: str, status: int = 0) -> Done:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def data(folder: Path, command: Command, shakespeare_text: str) -> Path:
    command("data/shakespeare_char/prepare.py", f"--input_file={SHAKESPEARE}", "--out_dir=data")
    return folder / "data"


@pytest.fixture(scope="module")
def train(data: Path, command: Command) -> Callable[..., Done]:
    def run(workdir: str, *changes: str) -> Done:
        flags = [
            *overrides("model", MODEL_FLAGS),
            *overrides("train", TRAIN_FLAGS),
            *overrides("optimizer", OPTIMIZER_FLAGS),
        ]
        config = f"--config={ROOT / 'configs' / 'base.py'}"
        return command("scripts/train.py", config, f"--workdir={workdir}", "--config.data.dir=data", *flags, *changes)

    return run


@pytest.fixture(scope="module")
def run(folder: Path, train: Callable[..., Done]) -> Path:
    """The workdir of a small QAT run."""
    train("run")
    return folder / "run"


@pytest.fixture(scope="module")
def quantized(run: Path, command: Command) -> Done:
    return command("scripts/quantize.py", "--workdir=run", "--output=run/int8")


@pytest.fixture(scope="module")
def int8(run: Path, quantized: Done) -> Path:
    """The int8 folder of that run."""
    return run / "int8"


@pytest.fixture(scope="module")
def int8_pt(int8: Path, command: Command) -> Path:
    """The same model as picoGPT's int8 file."""
    command("scripts/convert.py", "--input=run/int8", "--to=torch-int8", "--output=run/int8.pt")
    return int8.parent / "int8.pt"


@pytest.fixture(scope="module")
def loss(folder: Path, command: Command) -> Callable[..., float]:
    """The loss on the whole validation split, by `scripts/evaluate.py`, whose output is checked."""

    def evaluate(model: str, runtime: str = "jax", *flags: str) -> float:
        arguments = [f"--model={model}", "--data=data", f"--runtime={runtime}", "--json=loss.json", *flags]
        done = command("scripts/evaluate.py", *arguments)
        result = json.loads((folder / "loss.json").read_text())
        assert list(result) == ["loss", "bits_per_char", "tokens", "runtime", "model"]
        assert (result["tokens"], result["runtime"], result["model"]) == (VAL_TOKENS - 1, runtime, model)
        assert result["bits_per_char"] == pytest.approx(result["loss"] / math.log(2))
        assert done.stdout.startswith(
            f"loss {result['loss']:.6f} nats, {result['bits_per_char']:.4f} bits per character"
        )
        return result["loss"]

    return evaluate


@pytest.fixture(scope="module")
def qat_loss(run: Path, loss: Callable[..., float]) -> float:
    """Of the forward pass that was trained."""
    return loss("run")


@pytest.fixture(scope="module")
def float_loss(run: Path, loss: Callable[..., float]) -> float:
    """Of the same parameters without quantization."""
    return loss("run", "jax", "--forward=float")


# -------------------------------------------------------------------------------------------------------- the pipeline


def test_training_leaves_what_the_contract_says(run: Path) -> None:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {event["step"]: event["loss"] for event in events if event["split"] == "val"}
    assert list(losses) == [STEPS // 2, STEPS]
    assert losses[STEPS] < losses[STEPS // 2] < math.log(65)
    train_keys = {"step", "split", "loss", "step_time_ms", "tokens_per_second", "learning_rate", "grad_norm"}
    assert all(set(event) >= train_keys for event in events if event["split"] == "train")
    assert {int(path.name) for path in (run / "checkpoints").iterdir()} == set(losses)
    config = json.loads((run / "config.json").read_text())
    assert config["model"].items() >= MODEL_FLAGS.items()
    assert (config["model"]["vocab_size"], config["train"]["batch_size"], config["data"]["dir"]) == (65, 32, "data")
    assert len(json.loads((run / "vocab.json").read_text())["itos"]) == 65


def test_training_draws_its_loss(run: Path) -> None:
    png = (run / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB\x60\x82"), "it is complete"
    width, height = struct.unpack(">II", png[16:24])
    assert min(width, height) >= 300


def test_the_model_has_learned(qat_loss: float) -> None:
    assert qat_loss < 2.6  # a character says 3.3 nats where only the frequencies are known


def test_what_is_served_is_what_was_trained(
    int8: Path, qat_loss: float, float_loss: float, loss: Callable[..., float]
) -> None:
    assert loss("run/int8") == pytest.approx(qat_loss, abs=1e-6)
    assert float_loss != pytest.approx(qat_loss, abs=1e-6), "a control: float is another loss"


@pytest.mark.parametrize(
    ("runtime", "model"),
    [("torch", "run/int8"), ("torch", "run/int8.pt"), ("onnx", "run/onnx"), ("numpy", "run/int8")],
)
def test_the_other_runtimes_have_the_same_loss(
    int8_pt: Path,
    command: Command,
    runtime: str,
    model: str,
    qat_loss: float,
    float_loss: float,
    loss: Callable[..., float],
) -> None:
    if runtime == "onnx":
        command("scripts/convert.py", "--input=run/int8", "--to=onnx", "--output=run/onnx")
    assert loss(model, runtime) == pytest.approx(qat_loss, abs=1e-4)
    assert float_loss != pytest.approx(qat_loss, abs=1e-4), "a control: float is further away"


def test_the_int8_model_says_where_it_comes_from(int8: Path, quantized: Done) -> None:
    training = json.loads((int8 / "config.json").read_text())["training"]
    assert training["step"] == STEPS
    assert training["val_loss"] < 2.6
    assert training["dataset"] == "data"
    assert training["quantization_aware"] is True
    assert training["curve"]["train"]["step"][-1] == STEPS
    assert len(training["weight_errors"]) == 2 + 4 * json.loads((int8 / "config.json").read_text())["model"]["n_layer"]
    how = "trained with quantization (QAT); mixed arithmetic, weights per_channel, activation_bits 8"
    assert how in quantized.stdout
    size = sum((int8 / name).stat().st_size for name in ("model.safetensors", "config.json", "vocab.json"))
    assert f"wrote run/int8: {size:,} bytes" in quantized.stdout


def test_the_float_file_has_the_float_loss(
    folder: Path, int8: Path, command: Command, float_loss: float, loss: Callable[..., float]
) -> None:
    command("scripts/convert.py", "--input=run", "--to=torch", "--output=run/ckpt.pt")
    assert loss("run/ckpt.pt") == pytest.approx(float_loss, abs=1e-6)
    done = command("scripts/quantize.py", "--workdir=run/ckpt.pt", "--output=again")
    assert "trained with quantization (QAT)" in done.stdout, "its configuration came along"
    assert (folder / "again/model.safetensors").read_bytes() == (int8 / "model.safetensors").read_bytes()


def test_one_scale_for_each_matrix_is_made_and_measured(
    int8: Path, command: Command, qat_loss: float, loss: Callable[..., float]
) -> None:
    arguments = ["--input=run/int8", "--to=torch-int8", "--output=run/tensor.pt", "--requantize=per_tensor"]
    done = command("scripts/convert.py", *arguments, "--data=data")
    words = done.stdout.splitlines()[-1].replace(",", "").split()
    assert words[:2] == ["loss", "per_channel"]
    assert float(words[2]) == pytest.approx(qat_loss, abs=1e-4)
    assert words[3] == "per_tensor"
    assert float(words[4]) == pytest.approx(loss("run/tensor.pt"), abs=1e-4), "JAX measures the same"
    assert float(words[4]) == pytest.approx(qat_loss, abs=0.05)
    assert float(words[4]) != pytest.approx(qat_loss, abs=1e-5)
    arguments = ["--input=run/tensor.pt", "--to=torch-int8", "--output=run/same.pt", "--requantize=per_tensor"]
    done = command("scripts/convert.py", *arguments, "--data=data")
    assert done.stdout.splitlines()[-1] == f"loss per_tensor {words[4]}, per_tensor {words[4]} nats: +0.000000"


def test_a_float_run_is_quantized_after_training(folder: Path, train: Callable[..., Done], command: Command) -> None:
    changes = ["--config.quant.mode=none", "--config.train.max_iters=2", "--config.train.eval_interval=2"]
    train("float_run", *changes, "--config.train.eval_iters=1", "--config.model.n_layer=1")
    done = command("scripts/quantize.py", "--workdir=float_run", "--output=float_int8")
    assert "trained in float: post-training quantization" in done.stdout
    assert json.loads((folder / "float_int8/config.json").read_text())["training"]["quantization_aware"] is False
    other = ["--output=float_other", "--weight_granularity=per_tensor", "--activation_bits=none"]
    assert (
        "weights per_tensor, activation_bits None"
        in command("scripts/quantize.py", "--workdir=float_run", *other).stdout
    )
    quantization = json.loads((folder / "float_other/config.json").read_text())["quantization"]
    assert (quantization["weight_granularity"], quantization["activation_bits"]) == ("per_tensor", None)


# ----------------------------------------------------------------------------------------------------------- samples


def check_text(text: str, start: str, drawn: int, data: Path) -> None:
    assert text.startswith(start)
    assert len(text) == len(start) + drawn
    assert set(text) <= set(json.loads((data / "meta.json").read_text())["itos"])


def test_a_workdir_writes_text(run: Path, data: Path, command: Command) -> None:
    done = command("scripts/sample.py", "--model=run", "--start=ROMEO:", "--max_new_tokens=100")
    check_text(done.stdout.removesuffix("\n"), "ROMEO:", 100, data)
    assert done.stderr == ""


@pytest.mark.parametrize("overflow", ["slide", "refill"])
def test_the_int8_model_writes_several_texts(
    int8: Path, folder: Path, data: Path, command: Command, overflow: str
) -> None:
    (folder / "start.txt").write_text("ROMEO:\nO", encoding="utf-8-sig")  # prepare.py leaves the mark out as well
    arguments = ["--model=run/int8", "--num_samples=2", "--max_new_tokens=100", f"--overflow={overflow}"]
    done = command("scripts/sample.py", *arguments, "--start=FILE:start.txt", "--show_stats")
    first, second = done.stdout.removeprefix("--- sample 1\n").removesuffix("\n").split("\n--- sample 2\n")
    for text in (first, second):
        check_text(text, "ROMEO:\nO", 100, data)
    assert first != second
    check_stats(done.stderr, "numpy")  # without --runtime


def test_pytorch_writes_text(int8_pt: Path, data: Path, command: Command) -> None:
    arguments = ["--model=run/int8.pt", "--runtime=torch", "--max_new_tokens=100", "--top_k=5", "--show_stats"]
    done = command("scripts/sample.py", *arguments)
    check_text(done.stdout.removesuffix("\n"), "\n", 100, data)
    check_stats(done.stderr, "torch")


def check_stats(stderr: str, runtime: str) -> None:
    size, speed = stderr.splitlines()
    assert size.startswith("--- 74,112 parameters, 99.57% int8, ")
    assert size.endswith(f", runtime {runtime}")
    assert "tokens/s" in speed


# --------------------------------------------------------------------------------------------------------- the mistakes


@pytest.fixture(scope="module")
def other_data(folder: Path, command: Command) -> Path:
    (folder / "other.txt").write_text("another alphabet\n" * 50)
    command("data/text_char/prepare.py", "--input_file=other.txt", "--out_dir=other_data")
    return folder / "other_data"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "scripts/sample.py --model=run/int8 --start=ROMEO€",
            "--start has the character '€' (U+20AC) at position 5, which is not in the vocabulary of 65; ",
        ),
        ("scripts/sample.py --model=run/int8 --start=", "--start is empty; give at least one character"),
        ("scripts/sample.py --model=run/int9", "run/int9 does not exist; expected a workdir, an int8 folder or "),
        (
            "scripts/sample.py --model=run --runtime=torch",
            "run holds float parameters; make an int8 model of it with: ",
        ),
        ("scripts/sample.py --model=run/int8 --temprature=1", "Unknown command line flag 'temprature'. Did you mean: "),
        ("scripts/sample.py --model=run/int8 --overflow=wrap", "flag --overflow=wrap: "),
        (
            "scripts/evaluate.py --model=run/int8 --data=other_data",
            "--data=other_data has another vocabulary than --model=run/int8; give its own data",
        ),
        ("scripts/evaluate.py --model=run/int8 --data=no_data", "no_data has no meta.json (nor nanoGPT's meta.pkl); "),
        (
            "scripts/evaluate.py --model=run/int8 --data=data --forward=float",
            "--forward=float: run/int8 has int8 codes only; give --model=WORKDIR, or leave --forward out",
        ),
        (
            "scripts/convert.py --input=run/int8 --to=unknown --output=model",
            "flag --to=unknown: value should be one of <torch|torch-int8",
        ),
        (
            "scripts/convert.py --input=run/int8 --to=torch --output=model",
            "run/int8 is an int8 model; its float parameters are gone: give the workdir it was made from",
        ),
        (
            "scripts/convert.py --input=run/int8 --to=torch-int8 --output=m --requantize=per_tensor --data=other_data",
            "--data=other_data has another vocabulary than --input=run/int8; give its own data",
        ),
        (
            "scripts/convert.py --input=run/int8 --to=torch-int8 --output=model --data=data",
            "--data goes with --requantize=per_tensor, whose cost it measures; leave it out",
        ),
        ("scripts/quantize.py --workdir=run/int8 --output=new", "run/int8 is an int8 model; its float parameters "),
        (
            "scripts/quantize.py --workdir=run --output=run",
            "--output=run is a folder of other files, which it would replace; name a new one",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    int8: Path, other_data: Path, command: Command, line: str, message: str
) -> None:
    script, *arguments = line.split(" ")
    done = command(script, *arguments, status=2)
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert (int8.parent / "checkpoints").is_dir(), "whatever was asked for, the training is still there"
