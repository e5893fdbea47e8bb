from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from tiny import quick_compilation, tiny_config

from picogpt_jax import attention, sharding
from picogpt_jax.config import MeshConfig
from picogpt_jax.errors import UserError

CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
V100 = SimpleNamespace(platform="gpu", device_kind="Tesla V100", compute_capability="7.0")
MODEL = dict(model__n_head=2, model__n_embd=128, model__block_size=128, model__dropout=0.0)


def choose(wanted: str, device: Any, dtype: str = "bfloat16", **changes: Any) -> str:
    return attention.choose(wanted, tiny_config(**MODEL | changes).model, jnp.dtype(dtype), device)


def test_auto_takes_the_kernel_of_the_device_where_it_can_serve() -> None:
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
    ("wanted", "device", "changes", "message"),
    [
        ("cudnn", CPU, {}, r"train\.attention=cudnn: it runs on a GPU, the devices are cpu; .* train\.attention=auto"),
        ("splash", H100, {}, r"splash: it runs on a TPU, the devices are NVIDIA H100"),
        ("splash", TPU, dict(model__dropout=0.1), r"it has no dropout, and model\.dropout=0\.1"),
        ("splash", TPU, dict(model__block_size=192), r"model\.block_size=192 is not a multiple of 128"),
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
    monkeypatch.setattr(attention, "MAX_BLOCK", 128)
    data, fsdp, tensor = mesh_shape
    mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), 2, jax.devices()[: data * fsdp * tensor])
    shape = (2, 2, 256, 8)
    q, k, v, weights = jax.random.normal(jax.random.key(0), (4, *shape))

    def outputs(form: str) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            with sharding.on(mesh):
                if form == "plain":
                    y = attention.plain(q, k, v, None, 0.0, None, "")
                else:
                    y = attention.fused(form, q, k, v, interpret=True)
            return (y * weights).sum(), y

        place = NamedSharding(mesh, sharding.partition_spec(("batch", "heads")))
        with quick_compilation():
            step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
            return step(*jax.device_put((q, k, v), place))

    ((_, y), gradients), ((_, y_splash), gradients_splash) = outputs("plain"), outputs("splash")
    np.testing.assert_allclose(y_splash, y, atol=2e-5)
    for actual, expected in zip(gradients_splash, gradients, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)
