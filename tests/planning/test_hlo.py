import pytest

from picogpt_jax.planning.hlo import HloArray, parse_arrays, parse_module, replica_groups


def test_result_types_with_layouts_and_tuples() -> None:
    text = "(f32[2,3]{1,0:T(8,128)S(1)}, /*index=1*/s8[4]{0:T(128)(4,1)}, (bf16[]{:T(128)}, token[]))"
    assert parse_arrays(text) == (
        HloArray("f32", (2, 3), 1), HloArray("s8", (4,)), HloArray("bf16", ()), HloArray("token", ())
    )  # fmt: skip
    sizes = [array.n_bytes for array in parse_arrays("(f32[2,3], s4[3], pred[5], f8e4m3fn[7], token[])")]
    assert sizes == [24, 2, 5, 7, 0]


def test_an_instruction_with_a_tuple_result_and_attributes() -> None:
    module = parse_module("ENTRY %main (x: f32[4]) -> (f32[4], f32[4]) {\n"
                          "  %x = f32[4]{0} parameter(0)\n"
                          "  ROOT %pair = (f32[4]{0}, f32[4]{0}) custom-call(%x, /*index=1*/%x), "
                          'custom_call_target="A(b)", window={size=4x12 stride=3x11}, index=2\n}\n')  # fmt: skip
    pair = module.entry.root
    assert (pair.name, pair.opcode, pair.operands) == ("pair", "custom-call", ("x", "x"))
    assert len(pair.result) == 2
    assert pair.attribute("window") == "{size=4x12 stride=3x11}"
    assert pair.attribute("index") == "2"
    assert [user.name for user in module.entry.users["x"]] == ["pair"]


def test_a_text_without_a_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse_module("module @jit_step {\n}\n")


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], use_global_device_ids=true", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={1}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'c'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3]]),
    ],
)
def test_replica_groups_in_every_notation(attributes: str, groups: list[list[int]]) -> None:
    assert replica_groups(attributes, devices=4) == groups
