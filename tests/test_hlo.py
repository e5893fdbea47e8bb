import textwrap

import pytest

from picogpt_jax.hlo import HloArray, Module, parse_arrays, parse_module, replica_groups

# A loop of three turns around a loop of five, as the TPU compiler prints them: no trip count is noted.
LOOPS = """
HloModule nested

%inner_body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8]{0:T(128)} get-tuple-element(%state), index=1
  %twice = f32[8]{0:T(128)} add(%x, %x)
  ROOT %out = (s32[], f32[8]) tuple(%next, %twice)
}

%inner_condition (state: (s32[], f32[8])) -> pred[] {
  %state = (s32[], f32[8]) parameter(0)
  %bound = s32[] constant(5)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%outer_body (state: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %state = (s32[], f32[8], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8] get-tuple-element(%state), index=1
  %end = s32[] get-tuple-element(%state), index=2
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]) tuple(%zero, %x)
  %loop = (s32[], f32[8]) while(%start), condition=%inner_condition, body=%inner_body
  %y = f32[8] get-tuple-element(%loop), index=1
  %negated = f32[8] negate(%y)
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[8], s32[]) tuple(%next, %negated, %end)
}

%fused_less (p0: s32[], p1: s32[]) -> pred[] {
  %p0 = s32[] parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %less = pred[] compare(%p0, %p1), direction=LT
}

%outer_condition (state: (s32[], f32[8], s32[])) -> pred[] {
  %state = (s32[], f32[8], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %end = s32[] get-tuple-element(%state), index=2
  ROOT %compared = pred[] fusion(%i, %end), kind=kLoop, calls=%fused_less
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  %two = s32[] constant(2)
  %copied = s32[] copy(%two)
  %five = s32[] constant(5)
  %start = (s32[], f32[8], s32[]) tuple(%copied, %x, %five)
  %loop = (s32[], f32[8], s32[]) while(%start), condition=%outer_condition, body=%outer_body
  ROOT %y = f32[8] get-tuple-element(%loop), index=1
}
"""


def times(module: Module) -> dict[str, int]:
    executed, unknown = module.executed()
    assert unknown == []
    return {item.instruction.name: item.times for item in executed}


def test_instructions_are_counted_as_often_as_the_loops_around_them_run() -> None:
    counts = times(parse_module(LOOPS))
    assert counts["negated"] == 3, "from 2 to 5, both carried by the loop, compared in a fusion"
    assert counts["twice"] == 3 * 5
    assert counts["copied"] == 1


def test_a_trip_count_that_the_compiler_notes_is_taken() -> None:
    noted = LOOPS.replace(
        "body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"7"},"other":{}}'
    )
    assert times(parse_module(noted))["twice"] == 3 * 7


def test_a_loop_of_unknown_length_is_named_and_runs_once() -> None:
    unknown = LOOPS.replace("ROOT %less = pred[] compare(%i, %bound), direction=LT", "ROOT %less = pred[] not(%i)")
    executed, names = parse_module(unknown).executed()
    assert names == ["loop"]
    assert {item.instruction.name: item.times for item in executed}["twice"] == 3


def test_calls_and_branches_are_followed() -> None:
    text = """
    HloModule calls
    %double (p: f32[8]) -> f32[8] {
      %p = f32[8] parameter(0)
      ROOT %doubled = f32[8] add(%p, %p)
    }
    %keep (q: f32[8]) -> f32[8] {
      %q = f32[8] parameter(0)
      ROOT %kept = f32[8] negate(%q)
    }
    ENTRY %main (x: f32[8], b: pred[]) -> f32[8] {
      %x = f32[8] parameter(0)
      %b = pred[] parameter(1)
      %called = f32[8] call(%x), to_apply=%double
      ROOT %either = f32[8] conditional(%b, %called, %x), branch_computations={%double, %keep}
    }
    """
    executed, _ = parse_module(textwrap.dedent(text)).executed()
    names = [item.instruction.name for item in executed]
    assert (names.count("doubled"), names.count("kept")) == (2, 1)


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
