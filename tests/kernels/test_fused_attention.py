"""The choice of a fused kernel, and that it computes the plain form."""

import functools
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax.sharding import NamedSharding
from test_distributed import Site, ended, finish, free_port
from tiny import quick_compilation, tiny_config

from picogpt_jax.config import MeshConfig
from picogpt_jax.devices import sharding
from picogpt_jax.errors import UserError
from picogpt_jax.kernels import fused_attention
from picogpt_jax.model.attention import causal
from picogpt_jax.training.trainer import Trainer

CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
V100 = SimpleNamespace(platform="gpu", device_kind="Tesla V100", compute_capability="7.0")
MODEL = dict(model__n_head=2, model__n_embd=128, model__block_size=128, model__dropout=0.0)


Measure = Callable[[str], float]


def choose(wanted: str, device: Any, dtype: str = "bfloat16", measure: Measure | None = None, **changes: Any) -> str:
    return fused_attention.choose(wanted, tiny_config(**MODEL | changes).model, jnp.dtype(dtype), device, measure)


def taking(**seconds: float | Exception) -> Measure:
    """A measurement with these results, which notes what was asked for."""

    def measure(form: str) -> float:
        measure.asked.append(form)
        if isinstance(result := seconds[form], Exception):
            raise result
        return result

    measure.asked = []
    return measure


def test_what_is_only_compiled_for_takes_the_kernel_of_the_device_where_it_can_serve() -> None:
    assert choose("auto", CPU) == "plain"
    assert choose("auto", H100) == "cudnn"
    assert choose("auto", TPU) == "splash"
    assert choose("plain", TPU) == choose("plain", H100) == "plain"
    for device in (TPU, H100):
        assert choose("auto", device, model__dropout=0.1) == "plain"
    assert choose("auto", TPU, "float32") == "splash"
    assert choose("auto", TPU, model__block_size=64) == "plain"
    assert choose("auto", H100, model__block_size=64) == "cudnn"
    assert choose("auto", H100, "float32") == choose("auto", V100) == "plain"
    assert choose("auto", H100, model__n_embd=20) == choose("auto", H100, model__n_embd=512) == "plain"


@pytest.mark.parametrize(
    ("kernel", "plain", "chosen"),
    [(1.0, 2.0, "cudnn"), (2.0, 1.0, "plain"), (1.049, 1.0, "cudnn"), (1.051, 1.0, "plain")],
)
def test_auto_takes_the_fastest_and_of_two_alike_the_kernel(
    kernel: float, plain: float, chosen: str, capfd: pytest.CaptureFixture[str]
) -> None:
    measure = taking(cudnn=kernel, plain=plain)
    assert choose("auto", H100, measure=measure) == chosen
    assert measure.asked == ["cudnn", "plain"]
    said = f"attention: {chosen} (forward and backward: cudnn {1e3 * kernel:.3f} ms, plain {1e3 * plain:.3f} ms)\n"
    assert capfd.readouterr() == (said, "")


def test_a_form_that_fails_is_passed_over_and_said_so(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    refused, full = RuntimeError("CUDNN_STATUS:\nnot supported"), MemoryError("full")
    assert choose("auto", TPU, measure=taking(splash=refused, plain=1.0)) == "plain"
    assert caplog.messages == ["train.attention=auto passes splash over: RuntimeError: CUDNN_STATUS: not supported"]
    assert choose("auto", TPU, measure=taking(splash=1.0, plain=full)) == "splash"
    assert caplog.messages[1:] == ["train.attention=auto passes plain over: MemoryError: full"]
    assert choose("auto", TPU, measure=taking(splash=refused, plain=full)) == "plain"
    assert capfd.readouterr().out.splitlines() == [
        "attention: plain (forward and backward: plain 1000.000 ms)",
        "attention: splash (forward and backward: splash 1000.000 ms)",
        "attention: plain (forward and backward: nothing could be measured)",
    ]


@pytest.mark.parametrize(
    ("wanted", "device", "chosen"),
    [("plain", H100, "plain"), ("cudnn", H100, "cudnn"), ("splash", TPU, "splash"), ("auto", CPU, "plain")],
)
def test_a_name_is_not_measured_nor_is_what_has_no_kernel(
    wanted: str, device: Any, chosen: str, capfd: pytest.CaptureFixture[str]
) -> None:
    measure = taking()
    assert choose(wanted, device, measure=measure) == chosen
    assert measure.asked == []
    assert capfd.readouterr() == ("", "")


def test_a_trainer_measures_a_devices_share_where_its_devices_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The devices of a plan are not here: nothing is measured, by any name."""
    shares = []

    def seconds(attend: Any, shape_BHTD: tuple[int, ...], dtype: jnp.dtype) -> float:
        form = "plain" if attend is causal else attend.args[0]
        shares.append((form, shape_BHTD, dtype))
        return 1.0 if form == "cudnn" else 2.0

    monkeypatch.setattr(fused_attention, "seconds", seconds)
    monkeypatch.setattr(fused_attention, "why_not", lambda *_: None)
    changes = dict(model__n_head=4, model__n_embd=64, train__batch_size=16, train__gradient_accumulation_steps=2)
    config = tiny_config(**changes, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    trainer = Trainer(config)
    assert trainer.attention == trainer.model("float").numerics.attention == "cudnn"
    expected = ((2, 2, 8, 16), jnp.float32)  # 16 sequences in two parts, over 2 x 2 devices; 4 heads over 2
    assert shares == [("cudnn", *expected), ("plain", *expected)]
    assert trainer.stored_as(True).attention == "cudnn"
    devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda: [])
    assert Trainer(config, devices).attention == "cudnn"
    assert len(shares) == 2


@pytest.mark.parametrize("form", ["plain", "splash"])
def test_measuring_runs_a_form_and_its_gradient(form: str) -> None:
    with quick_compilation():
        attend = causal if form == "plain" else functools.partial(fused_attention.fused, form, interpret=True)
        assert 0 < fused_attention.seconds(attend, (1, 2, 128, 8), jnp.dtype("bfloat16")) < math.inf


PROCESS = """
import sys
from types import SimpleNamespace
import jax.numpy as jnp
from picogpt_jax.devices import distributed
from picogpt_jax.kernels import fused_attention
from tiny import tiny_config
index = int(sys.argv[2])
distributed.initialize(sys.argv[1], 2, index)
device = SimpleNamespace(platform="gpu", device_kind="", compute_capability="9.0")
model = tiny_config(model__dropout=0.0).model
def never(form):
    raise AssertionError("only the first process measures")
for fast in ("cudnn", "plain"):
    times = dict(cudnn=1.0, plain=1.0) | {fast: 0.5}
    measure = times.__getitem__ if index == 0 else never
    print("chosen:", fused_attention.choose("auto", model, jnp.dtype("bfloat16"), device, measure))
"""


def test_the_first_process_measures_for_all(tmp_path: Path) -> None:
    site = Site(tmp_path, tmp_path)
    address, search = f"localhost:{free_port()}", os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    started = [
        site._popen([sys.executable, "-c", PROCESS, address, str(i)], site.environment(1, PYTHONPATH=search))
        for i in (0, 1)
    ]
    with ended(*started):
        answers = [finish(process)[0] for process in started]
    assert [re.findall("^chosen: (.*)", answer, re.MULTILINE) for answer in answers] == [["cudnn", "plain"]] * 2
    assert [answer.count("attention: ") for answer in answers] == [2, 0], "one line a choice, of the first process"


@pytest.mark.parametrize(
    ("wanted", "device", "changes", "message"),
    [
        ("cudnn", CPU, {}, r"train\.attention=cudnn: it runs on a GPU, the devices are cpu; .* train\.attention=auto"),
        ("splash", H100, {}, r"splash: it runs on a TPU, the devices are NVIDIA H100"),
        ("splash", TPU, dict(model__dropout=0.1), r"it has no dropout, and model\.dropout=0\.1"),
        ("splash", TPU, dict(model__block_size=192), r"model\.block_size=192 is not a multiple of 128"),
        ("splash", TPU, dict(model__n_embd=2048, model__n_head=2), r"head size n_embd / n_head = 1024 is above 512"),
        ("cudnn", H100, dict(dtype="float32"), r"computes in half precision, and train\.dtype is float32"),
        ("cudnn", H100, dict(model__n_embd=20), r"head size n_embd / n_head = 10 is not a multiple of 8 up to 128"),
        ("cudnn", V100, {}, r"needs compute capability 8\.0, and Tesla V100 has 7\.0"),
    ],
)
def test_a_kernel_asked_for_by_name_says_why_it_cannot_serve(
    wanted: str, device: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose(wanted, device, **changes)


@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
def test_the_tpu_kernel_computes_the_plain_form(
    mesh_shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, by Pallas' interpreter, in two blocks; on a mesh each device has its rows and heads."""
    monkeypatch.setattr(fused_attention, "MAX_BLOCK", 128)
    data, fsdp, tensor = mesh_shape
    mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), 2, jax.devices()[: data * fsdp * tensor])
    shape = (2, 2, 256, 8)
    q, k, v, weights = jax.random.normal(jax.random.key(0), (4, *shape))

    def outputs(form: str) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            with sharding.on(mesh):
                y = causal(q, k, v) if form == "plain" else fused_attention.fused(form, q, k, v, interpret=True)
            return (y * weights).sum(), y

        place = NamedSharding(mesh, sharding.partition_spec(("batch", "heads")))
        with quick_compilation():
            step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
            return step(*jax.device_put((q, k, v), place))

    ((_, y), gradients), ((_, y_splash), gradients_splash) = outputs("plain"), outputs("splash")
    np.testing.assert_allclose(y_splash, y, atol=2e-5)
    for actual, expected in zip(gradients_splash, gradients, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)
