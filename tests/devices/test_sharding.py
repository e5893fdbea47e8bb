import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import tiny_config

from picogpt_jax.config import MeshConfig
from picogpt_jax.devices.sharding import batch_sharding, make_mesh, replicated
from picogpt_jax.errors import UserError
from picogpt_jax.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("compile_quickly_and_once")


def mesh_shape(data: int, fsdp: int, tensor: int, batch_size: int = 8, devices: int = 4) -> tuple[int, ...]:
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), batch_size, jax.devices()[:devices])
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    return mesh.devices.shape


@pytest.mark.parametrize(
    ("sizes", "batch_size", "devices", "expected"),
    [
        ((-1, 1, 1), 8, 4, (4, 1, 1)),
        ((-1, 1, 1), 8, 1, (1, 1, 1)),
        ((-1, 1, 1), 8, 3, (2, 1, 1)),  # three do not divide a batch of eight
        ((-1, 1, 1), 6, 4, (3, 1, 1)),
        ((-1, 1, 1), 7, 4, (1, 1, 1)),
        ((-1, 2, 1), 8, 4, (2, 2, 1)),
        ((-1, 2, 1), 2, 4, (1, 2, 1)),
        ((-1, 1, 2), 8, 4, (2, 1, 2)),
        ((2, -1, 1), 8, 4, (2, 2, 1)),
        ((1, -1, 1), 3, 4, (1, 3, 1)),
        ((1, 1, -1), 8, 4, (1, 1, 4)),
        ((2, 1, 2), 8, 4, (2, 1, 2)),
        ((2, 1, 1), 8, 4, (2, 1, 1)),
        ((1, 1, 1), 8, 4, (1, 1, 1)),
    ],
)
def test_the_mesh_takes_the_devices_that_divide_the_batch(
    sizes: tuple[int, int, int], batch_size: int, devices: int, expected: tuple[int, ...]
) -> None:
    assert mesh_shape(*sizes, batch_size=batch_size, devices=devices) == expected


def test_a_mesh_that_does_not_fit_the_devices_says_what_to_change() -> None:
    with pytest.raises(
        UserError, match=r"'tensor': 8\} needs 8 devices, found 4; change mesh\.\* .*JAX_NUM_CPU_DEVICES"
    ):
        mesh_shape(1, 1, 8)
    with pytest.raises(UserError, match=r"\{'data': -1, 'fsdp': 5, 'tensor': 1\} needs 5 devices, found 4"):
        mesh_shape(-1, 5, 1)


def test_a_batch_that_does_not_divide_says_what_to_change() -> None:
    with pytest.raises(
        UserError, match=r"a batch of 6 sequences .* over mesh\.data \* mesh\.fsdp = 2 \* 2; change one"
    ):
        mesh_shape(2, 2, 1, batch_size=6)
    with pytest.raises(UserError, match=r"a batch of 7 sequences .*mesh\.data \* mesh\.fsdp = 1 \* 2"):
        mesh_shape(-1, 2, 1, batch_size=7)


def test_the_batch_is_split_over_data_and_fsdp_and_copied_over_tensor() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), batch_size=8)
    batch = jax.device_put(jnp.arange(8 * 3).reshape(8, 3), batch_sharding(mesh))
    assert sorted(shard.index[0].start or 0 for shard in batch.addressable_shards) == [0, 0, 4, 4]
    steps = jax.device_put(jnp.zeros((5, 8, 3)), batch_sharding(mesh, 1))
    assert {shard.data.shape for shard in steps.addressable_shards} == {(5, 4, 3)}
    copied = jax.device_put(jnp.zeros((8, 3)), replicated(mesh))
    assert [shard.data.shape for shard in copied.addressable_shards] == [(8, 3)] * 4


def test_parameters_and_optimizer_state_are_really_sharded() -> None:
    """What each of the four devices holds of every array. A width of 16, 32 hidden units, a vocabulary of 12."""
    config = tiny_config(model__bias=True, mesh__data=1, mesh__fsdp=2, mesh__tensor=2)
    state = Trainer(config).init()
    expected = {
        "wte/embedding": ((12, 16), (6, 8)),  # vocabulary over tensor, width over fsdp
        "wpe/embedding": ((8, 16), (8, 8)),
        "h_0/attn/c_attn/kernel": ((16, 48), (8, 24)),
        "h_0/attn/c_attn/bias": ((48,), (24,)),
        "h_0/attn/c_proj/kernel": ((16, 16), (8, 8)),
        "h_0/attn/c_proj/bias": ((16,), (8,)),
        "h_0/mlp/c_fc/kernel": ((16, 32), (8, 16)),
        "h_0/mlp/c_fc/bias": ((32,), (16,)),
        "h_0/mlp/c_proj/kernel": ((32, 16), (16, 8)),
        "h_0/mlp/c_proj/bias": ((16,), (8,)),
        **{
            f"{norm}/{which}": ((16,), (16,))
            for norm in ("h_0/ln_1", "h_0/ln_2", "ln_f")
            for which in ("scale", "bias")
        },
    }
    adam = state.opt_state[1][0]
    for tree in (state.params, adam.mu, adam.nu):
        actual = {
            "/".join(key.key for key in path): (array.shape, array.addressable_shards[0].data.shape)
            for path, array in jax.tree_util.tree_leaves_with_path(tree)
        }
        assert actual == expected
    assert state.params["h_0"]["attn"]["c_proj"]["kernel"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert state.step.sharding.is_fully_replicated


def test_the_initial_parameters_do_not_depend_on_the_mesh() -> None:
    alone = Trainer(tiny_config()).init().params
    sharded = Trainer(tiny_config(mesh__fsdp=2, mesh__tensor=2)).init().params
    jax.tree.map(np.testing.assert_array_equal, alone, sharded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(model__vocab_size=11, mesh__tensor=2),
            r"dimension 0 \(vocab\) of .*wte.*embedding.*, of size 11, does not divide over mesh\.tensor=2; change "
            r"mesh\.tensor or model\.vocab_size",
        ),
        (
            dict(model__n_embd=18, mesh__fsdp=4),
            r"dimension \d \(embed\) of .*, of size 18, does not divide over mesh\.fsdp=4; change mesh\.fsdp or "
            r"model\.n_embd",
        ),
        (
            dict(model__n_head=2, mesh__tensor=4),
            r"the attention heads \(model\.n_head\), of size 2, does not divide over mesh\.tensor=4; change "
            r"mesh\.tensor or model\.n_head",
        ),
    ],
)
def test_a_dimension_that_does_not_divide_is_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(tiny_config(**changes))
