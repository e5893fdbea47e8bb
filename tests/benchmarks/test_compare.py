import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import RunScript
from tiny import VOCABULARY, tiny_config, write_data

from picogpt_jax.benchmarks import compare
from picogpt_jax.config import ModelConfig
from picogpt_jax.errors import UserError
from picogpt_jax.int8.folder import save_int8_model
from picogpt_jax.int8.int8_model import Int8Model, Int8Tensor, Quantization

IDS = np.random.default_rng(0).integers(0, 12, 100).astype(np.uint16)
TABLE_VV = np.random.default_rng(1).normal(size=(12, 12)).astype(np.float32)


def bigram(tokens_BT: np.ndarray) -> np.ndarray:
    return TABLE_VV[tokens_BT]


def test_every_target_counts_once_and_as_much_as_another() -> None:
    result = compare.agreement({"jax": bigram, "other": bigram}, IDS, block_size=7, failures={})
    logits_NV = TABLE_VV[IDS[:-1]].astype(np.float64)
    expected = np.mean(np.log(np.exp(logits_NV).sum(-1)) - logits_NV[np.arange(99), IDS[1:]])
    assert result["jax"].loss == pytest.approx(expected, rel=1e-12)
    assert result["other"] == result["jax"]
    assert (result["other"].largest_difference, result["other"].same_next_token) == (0.0, pytest.approx(1.0))


def test_one_differing_logit_is_found() -> None:
    def other(tokens_BT: np.ndarray) -> np.ndarray:
        logits_BTV = bigram(tokens_BT).copy()
        logits_BTV[tokens_BT == 3, 5] += 10.0
        return logits_BTV

    result = compare.agreement({"jax": bigram, "other": other}, IDS, block_size=7, failures={})["other"]
    assert result.largest_difference == pytest.approx(10.0, rel=1e-6)
    assert result.same_next_token == pytest.approx(np.mean(IDS[:-1] != 3)), "5 is the likeliest after a 3, and was not"
    assert result.loss != pytest.approx(compare.agreement({"jax": bigram}, IDS, 7, {})["jax"].loss)


def test_a_text_counts_as_the_same_only_as_a_whole() -> None:
    def count(prompts_BT: np.ndarray, new: int) -> np.ndarray:
        return np.concatenate([prompts_BT, np.zeros((len(prompts_BT), new), np.int64)], axis=1)

    def other(prompts_BT: np.ndarray, new: int) -> np.ndarray:
        texts = count(prompts_BT, new)
        texts[1, -1] = 1
        return texts

    shares = compare.same_texts(
        {"jax": count, "other": other}, IDS, prompts=4, prompt_tokens=5, new_tokens=3, failures={}
    )
    assert shares == {"jax": 1.0, "other": 0.75}
    with pytest.raises(UserError, match="100 tokens hold no 97 prompts of 5; ask for fewer"):
        compare.same_texts({"jax": count}, IDS, prompts=97, prompt_tokens=5, new_tokens=3, failures={})


RUNTIME = """
import os, signal
from picogpt_jax.errors import UserError

def load(path):
    if path.name == "refused":
        raise UserError("the model is refused")
    return forward, lambda prompts_BT, new_tokens: os.kill(os.getpid(), signal.SIGILL)

def forward(tokens_BT):
    if tokens_BT[0, 0] == 9:
        os.kill(os.getpid(), signal.SIGILL)
    return 2 * tokens_BT
"""


def test_a_runtime_that_dies_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "another_runtime.py").write_text(RUNTIME)
    monkeypatch.syspath_prepend(tmp_path)
    load = __import__("another_runtime").load
    dying, refused = compare.Apart(load, tmp_path), compare.Apart(load, tmp_path / "refused")
    forward, go_on = dying.passes
    np.testing.assert_array_equal(forward(np.array([[3, 4]])), [[6, 8]])
    ids = np.append(IDS, [9, 1]).astype(np.uint16)[::-1].copy()  # in the first window, and so in the first batch
    assert ids[1] == 9
    failures: dict[str, str] = {}
    forwards = {"jax": bigram, "dying": forward, "refused": refused.passes[0], "good": bigram}
    results = compare.agreement(forwards, ids[1:], 7, failures)
    assert set(results) == {"jax", "good"}
    assert failures == {"dying": "its process was ended by SIGILL", "refused": "the model is refused"}
    with pytest.raises(UserError, match="its process was ended by SIGILL"):
        go_on(np.array([[3]]), 1)
    with pytest.raises(UserError, match="jax, the reference: its process was ended by SIGILL"):
        compare.same_texts({"jax": go_on}, ids, 2, 3, 4, {})
    for process in (dying, refused):
        process.close()
    table = compare.format_table([{"runtime": "jax", "loss": 1.5}, {"runtime": "dying", "error": failures["dying"]}])
    assert table.splitlines()[3] == "dying  its process was ended by SIGILL"


def test_the_rate_is_that_of_the_characters_after_the_first_arrival() -> None:
    assert compare.Start.of([(2.0, 3), (2.5, 4), (4.0, 13)]) == compare.Start(2.0, 5.0)
    assert compare.Start.of([(2.0, 3)]) == compare.Start(2.0, 0.0)


def test_a_process_is_timed_by_what_it_prints_after_its_prompt() -> None:
    program = "import time; print('ab', end='', flush=True); time.sleep(0.5); print('c', end='', flush=True)"
    start = compare.time_process([sys.executable, "-c", program], prompt_characters=2)
    assert start.first_token_seconds >= 0.5
    with pytest.raises(UserError, match=r"the reason$"):
        compare.time_process([sys.executable, "-c", "import sys; sys.exit('error: the reason')"], prompt_characters=2)
    with pytest.raises(UserError, match="it printed nothing"):
        compare.time_process([sys.executable, "-c", "print('ab', end='')"], prompt_characters=2)


def test_the_table_leaves_out_what_was_not_measured() -> None:
    row = {"runtime": "jax", "loss": 1.5, "loss_difference": 0.0, "largest_difference": 0.0, "same_next_token": 1.0}
    lines = compare.format_table([row | {"bytes": 948_772}]).splitlines()
    assert lines[2].split() == ["jax", "1.500000", "+0.0e+00", "0.0e+00", "100.000%", "948,772"]
    assert "tokens/s" in lines[0]


def random_model(model: ModelConfig) -> Int8Model:
    generator = np.random.default_rng(2)
    matrices = {
        name: Int8Tensor(generator.integers(-127, 128, shape).astype(np.int8), np.full((shape[0], 1), 2e-3, np.float32))
        for name, shape in model.matrix_shapes().items()
    }
    vectors = {name: np.ones(shape, np.float32) for name, shape in model.vector_shapes().items()}
    quantization = Quantization(weight_granularity="per_channel", activation_bits=8)
    return Int8Model(
        model=model, quantization=quantization, training={}, vocabulary=VOCABULARY, matrices=matrices, vectors=vectors
    )


def test_the_script_compares_all_that_is_installed(run_script: RunScript, tmp_path: Path) -> None:
    config = tiny_config(model__n_embd=32, model__dropout=0.0).model
    save_int8_model(random_model(config), tmp_path / "int8")
    write_data(tmp_path / "data", "abcdefghij\n " * 20)
    arguments = ["--model=int8", "--data=data", "--output=all", "--prompts=3", "--prompt_tokens=4", "--new_tokens=12"]
    arguments += ["--speed_tokens=2000", "--runtimes=torch,onnx,numpy"]  # too many to arrive at once
    done = run_script("scripts/compare.py", *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "all/compare.json").read_text())
    assert report["tokens"] == 239
    assert [row["runtime"] for row in report["runtimes"]] == ["jax", "torch", "onnx", "numpy"]
    for row in report["runtimes"]:
        assert row["loss"] == pytest.approx(report["runtimes"][0]["loss"], abs=1e-3)  # of so few targets
        assert row["largest_difference"] < 0.1
        assert row["same_next_token"] > 0.98
        assert row["same_texts"] in ([1.0] if row["runtime"] == "jax" else [0.0, 1 / 3, 2 / 3, 1.0])
        assert row["tokens_per_second"] > 0
        assert row["first_token_seconds"] > 0
        assert row["bytes"] > 10_000  # codes and scales
    assert (tmp_path / "all/compare.png").read_bytes().startswith(b"\x89PNG")
    assert done.stdout.splitlines()[0] == "239 targets, 3 texts of 12 tokens at temperature 0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--model, --data and --output are needed"),
        ("--model=int8 --data=data --output=all --runtimes=tensorrt", "'tensorrt' is not one of jax, torch, onnx"),
        ("--model=nothing --data=data --output=all --runtimes=numpy", "nothing is not a folder"),
    ],
)
def test_a_mistake_is_one_line(run_script: RunScript, arguments: str, message: str) -> None:
    done = run_script("scripts/compare.py", *arguments.split())
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
