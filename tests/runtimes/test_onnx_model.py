"""The ONNX Runtime runner against the other runtimes, damaged folders, and the scripts that use it."""

import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, RunScript
from onnx import helper
from test_int8_model import random_model
from test_numpy_model import assert_same_logits, numpy_model, random_tokens

from picogpt_jax.errors import UserError
from picogpt_jax.formats.onnx_export import onnx_model as export
from picogpt_jax.formats.onnx_export import save_onnx
from picogpt_jax.int8.folder import save_int8_model
from picogpt_jax.runtimes import loop, onnx_session
from picogpt_jax.runtimes.jax_generator import Generator
from picogpt_jax.runtimes.onnx_model import OnnxGPT
from picogpt_jax.runtimes.torch_model import Int8GPT

# Float activations, where the last bit of a sum cannot become a whole step of the grid and another token.
WEIGHT_ONLY = random_model(activation_bits=None)


@functools.cache
def exported(activation_bits: int | None = 8) -> OnnxGPT:
    return OnnxGPT(export(random_model(activation_bits=activation_bits)).SerializeToString())


def test_the_logits_are_those_of_the_reference() -> None:
    tokens_BT = random_tokens(16, 16)
    reference = numpy_model(random_model()).forward(tokens_BT)
    assert_same_logits(exported().forward(tokens_BT), reference)
    assert_same_logits(exported().forward(tokens_BT, last_only=True), reference[:, -1:])


@pytest.mark.parametrize("pieces", [[16], [5, 1, 1, 4, 5], [1] * 16])
def test_a_cached_computation_is_the_whole_one(pieces: list[int]) -> None:
    model, tokens_BT = exported(None), random_tokens(3, 16)
    cache, starts = model.new_cache(3), np.cumsum([0, *pieces])
    parts = [model.forward(tokens_BT[:, start:end], cache) for start, end in itertools.pairwise(starts)]
    assert cache.length == 16
    np.testing.assert_allclose(np.concatenate(parts, 1), model.forward(tokens_BT), atol=1e-4)
    with pytest.raises(ValueError, match="17 positions do not fit into block_size=16"):
        model.forward(tokens_BT[:, :1], cache)


@pytest.mark.parametrize("overflow", ["slide", "refill"])
@pytest.mark.parametrize("prompt_length", [1, 21])
def test_greedy_text_is_the_same_in_every_runtime(overflow: Any, prompt_length: int) -> None:
    prompt_BT = random_tokens(2, prompt_length)
    settings: dict[str, Any] = dict(max_new_tokens=40, temperature=0.0, overflow=overflow)
    found_BT = loop.generate(exported(None), prompt_BT, **settings)
    by_torch = Int8GPT(WEIGHT_ONLY).generate(torch.from_numpy(prompt_BT), **settings).numpy()
    np.testing.assert_array_equal(found_BT, loop.generate(numpy_model(WEIGHT_ONLY), prompt_BT, **settings))
    np.testing.assert_array_equal(found_BT, by_torch)
    np.testing.assert_array_equal(found_BT, Generator.from_int8(WEIGHT_ONLY).generate(prompt_BT, **settings))


def test_windows_begun_early_draw_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt_BT, texts = random_tokens(1, 4), []
    for cores in (1, 2):
        monkeypatch.setattr(onnx_session, "cores", lambda cores=cores: cores)
        model = OnnxGPT(export(WEIGHT_ONLY).SerializeToString())
        assert model.windows_at_once == cores
        texts.append(loop.generate(model, prompt_BT, 60, seed=1))
    np.testing.assert_array_equal(*texts)


def test_the_same_seed_draws_the_same_text_and_the_loss_is_the_same() -> None:
    """With a seed of which no draw lies so close to a boundary that the last bits of the logits change it."""
    drawn = [
        loop.generate(model, random_tokens(2, 4), 30, seed=8) for model in (exported(None), numpy_model(WEIGHT_ONLY))
    ]
    np.testing.assert_array_equal(*drawn)
    data = random_tokens(1, 100)[0]
    losses = [loop.evaluate(model, data, 16) for model in (exported(None), numpy_model(WEIGHT_ONLY))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("has_vnni", [False, True])
def test_the_exact_kernel_is_taken_where_the_fast_one_could_saturate(
    monkeypatch: pytest.MonkeyPatch, has_vnni: bool
) -> None:
    """Its integers are the same; a processor with VNNI computes them right either way."""
    entries = []

    class Options(onnx_session.onnxruntime.SessionOptions):
        def add_session_config_entry(self, key: str, value: str) -> None:
            entries.append((key, value))
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(onnx_session, "has_vnni", lambda: has_vnni)
    monkeypatch.setattr(onnx_session.onnxruntime, "SessionOptions", Options)
    model = OnnxGPT(export(random_model()).SerializeToString())
    assert (("session.x64quantprecision", "1") in entries) is not has_vnni
    tokens_BT = random_tokens(4, 16)
    assert_same_logits(model.forward(tokens_BT), numpy_model(random_model()).forward(tokens_BT))


def rewrite(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    proto = onnx.load(folder / "model.onnx")
    change(proto)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())


def set_metadata(**changes: Any) -> Callable[[Path], None]:
    """Changes keys of the metadata; None takes one away."""

    def change(proto: onnx.ModelProto) -> None:
        metadata = json.loads(proto.metadata_props[0].value) | changes
        text = json.dumps({key: value for key, value in metadata.items() if value is not None})
        helper.set_model_props(proto, {"picogpt_jax": text})

    return lambda folder: rewrite(folder, change)


def rename_output(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
    proto.graph.output[0].name = "scores"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.onnx").unlink(), r"model.onnx does not exist; make it with: .* --to=onnx"),
        (
            lambda folder: (folder / "model.onnx").write_bytes(b"no model"),
            "is no ONNX model that onnxruntime .* can read",
        ),
        (
            lambda folder: (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-500]),
            "is no ONNX model that onnxruntime .* can read",
        ),
        (
            lambda folder: rewrite(folder, lambda proto: proto.ClearField("metadata_props")),
            "has no metadata 'picogpt_jax' that can be read: it is no export of picogpt_jax",
        ),
        (
            lambda folder: rewrite(folder, lambda proto: helper.set_model_props(proto, {"picogpt_jax": "[1"})),
            "has no metadata 'picogpt_jax' that can be read",
        ),
        (set_metadata(vocabulary=None), "has no metadata 'picogpt_jax' that can be read"),
        (set_metadata(config={"format": "other"}), "format is 'other'; expected 'picogpt-int8'"),
        (set_metadata(vocabulary={"type": "bpe"}), "its vocabulary is not a character vocabulary"),
        (
            set_metadata(vocabulary={"type": "char", "itos": ["a"]}),
            "its vocabulary has 1 entries, but model.vocab_size=11",
        ),
        (lambda folder: rewrite(folder, rename_output), r"its outputs \['scores', .*export it again"),
    ],
)
def test_a_folder_that_cannot_be_run_is_refused(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    save_onnx(random_model(), tmp_path / "onnx")
    change(tmp_path / "onnx")
    with pytest.raises(UserError, match=message):
        OnnxGPT.load(tmp_path / "onnx")


def test_the_runner_needs_neither_onnx_nor_jax_nor_pytorch(tmp_path: Path) -> None:
    """This is what keeps the first character of sample.py below a second."""
    save_onnx(random_model(), tmp_path / "onnx")
    heavy = {"jax", "torch", "onnx", "flax", "transformers", "scipy"}
    code = (
        f"import atexit, runpy, sys; atexit.register(lambda: print(sorted({heavy} & set(sys.modules)))); "
        f"sys.argv = ['sample.py', '--model={tmp_path}/onnx', '--runtime=onnx', '--max_new_tokens=3']; "
        "runpy.run_path('scripts/sample.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr


def test_the_scripts_export_sample_and_evaluate(run_script: RunScript, tmp_path: Path) -> None:
    model = random_model()
    save_int8_model(model, tmp_path / "int8")
    (tmp_path / "data").mkdir()
    model.vocabulary.save(tmp_path / "data" / "meta.json")
    random_tokens(1, 200).astype(np.uint16).tofile(tmp_path / "data" / "val.bin")
    done = run_script("scripts/convert.py", "--input=int8", "--to=onnx", "--output=onnx")
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "onnx" / "model.onnx").stat().st_size
    assert done.stdout == f"wrote onnx: model.onnx of {size:,} bytes, int8, with its tokenizer\n"

    texts, losses = [], []
    for name, path in (("onnx", "onnx"), ("numpy", "int8")):
        arguments = [f"--model={path}", f"--runtime={name}"]
        done = run_script("scripts/sample.py", *arguments, "--start=ab", "--max_new_tokens=5", "--show_stats")
        assert done.returncode == 0, done.stderr
        assert "tokens/s" in done.stderr
        texts.append(done.stdout)
        done = run_script("scripts/evaluate.py", *arguments, "--data=data", "--json=loss.json")
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / "loss.json").read_text())
        assert (result["runtime"], result["tokens"]) == (name, 199)
        losses.append(result["loss"])
    assert texts[0].startswith("ab")
    assert len(texts[0]) == len("ab") + 5 + 1
    assert losses[0] == pytest.approx(losses[1], abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "sample.py --model=int8 --runtime=onnx",
            "takes an ONNX folder, not int8 (int8); make one with: python ",
        ),
        (
            "sample.py --model=onnx --runtime=numpy",
            "takes an int8 folder, not onnx (onnx); make one with: python ",
        ),
        (
            "sample.py --model=onnx --runtime=jax",
            "onnx is an ONNX folder, which --runtime=onnx runs; here, give the int8 folder",
        ),
        ("evaluate.py --model=onnx --runtime=torch --data=x", "onnx is an ONNX folder, which --runtime=onnx runs"),
        ("convert.py --input=onnx --to=gguf --output=x", "onnx is an ONNX folder, which --runtime=onnx runs"),
        ("evaluate.py --model=onnx --runtime=onnx --data=x", "x has no meta.json"),
    ],
)
def test_a_runtime_that_does_not_fit_is_one_line(
    run_script: RunScript, tmp_path: Path, arguments: str, message: str
) -> None:
    save_int8_model(random_model(), tmp_path / "int8")
    save_onnx(random_model(), tmp_path / "onnx")
    script, *flags = arguments.split()
    done = run_script(f"scripts/{script}", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
