import textwrap

import pytest

from picogpt_jax.planning.hlo import Module, parse_module
from picogpt_jax.planning.loops import executed

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

# A ring over 16 chips on v5e:4x4, as the TPU compiler prints it, shapes and attributes shortened: eight steps in both
# directions at once, unrolled by two. The counter, an unsigned number, is copied where it begins.
RING = """
HloModule ring

%windowed_dot_general_body (param.20: (s8[100,48], s32[64,48], u32[], u32[])) -> (s8[100,48], s32[64,48], u32[], u32[]) {
  %constant.2..sunk = u32[]{:T(128)} constant(2)
  %constant.0..sunk = u32[]{:T(128)} constant(0)
  %constant.1..sunk = u32[]{:T(128)} constant(1)
  %param.20 = (s8[100,48]{1,0:T(8,128)(4,1)S(1)}, s32[64,48]{0,1:T(8,128)}, u32[]{:T(128)}, u32[]{:T(128)}) parameter(0)
  %gte.0 = s8[100,48]{1,0:T(8,128)(4,1)S(1)} get-tuple-element(%param.20), index=0
  %permuted = s8[100,48]{1,0:T(8,128)(4,1)S(1)} collective-permute(%gte.0), channel_id=4, source_target_pairs={{0,1},{1,0}}
  %gte.1 = s32[64,48]{0,1:T(8,128)} get-tuple-element(%param.20), index=1
  %gte.2 = u32[]{:T(128)} get-tuple-element(%param.20), index=2
  %compare.118 = pred[]{:T(512)S(6)} compare(%gte.2, %constant.0..sunk), direction=EQ
  %add.2856 = u32[]{:T(128)S(6)} add(%gte.2, %constant.1..sunk)
  %add.2858 = u32[]{:T(128)} add(%gte.2, %constant.2..sunk)
  %gte.3 = u32[]{:T(128)} get-tuple-element(%param.20), index=3
  ROOT %tuple.1 = (s8[100,48]{1,0:T(8,128)(4,1)S(1)}, s32[64,48]{0,1:T(8,128)}, u32[]{:T(128)}, u32[]{:T(128)}) tuple(%permuted, %gte.1, %add.2858, %gte.3)
}

%windowed_dot_general_cond (param.132: (s8[100,48], s32[64,48], u32[], u32[])) -> pred[] {
  %constant.2953 = u32[]{:T(128)} constant(8)
  %param.132 = (s8[100,48]{1,0:T(8,128)(4,1)S(1)}, s32[64,48]{0,1:T(8,128)}, u32[]{:T(128)}, u32[]{:T(128)}) parameter(0)
  %gte.4261 = u32[]{:T(128)} get-tuple-element(%param.132), index=2
  ROOT %compare.80 = pred[]{:T(512)} compare(%gte.4261, %constant.2953), direction=LT, backend_config={"flag_configs":[]}
}

%fused_add (param_0: u32[], param_1: u32[]) -> u32[] {
  %param_0 = u32[]{:T(128)} parameter(0)
  %param_1 = u32[]{:T(128)} parameter(1)
  ROOT %add.7 = u32[]{:T(128)} add(%param_1, %param_0)
}

ENTRY %main (x: s8[100,48], y: s32[64,48]) -> s32[64,48] {
  %x = s8[100,48]{1,0:T(8,128)(4,1)} parameter(0)
  %y = s32[64,48]{0,1:T(8,128)} parameter(1)
  %constant.3 = u32[]{:T(128)} constant(2)
  %constant.4 = u32[]{:T(128)} constant(0)
  %copy.1005 = u32[]{:T(128)} copy(%constant.4)
  %copy.610 = u32[]{:T(128)} copy(%copy.1005)
  %tuple.788 = (s8[100,48]{1,0:T(8,128)(4,1)}, s32[64,48]{0,1:T(8,128)}, u32[]{:T(128)}, u32[]{:T(128)}) tuple(%x, %y, %copy.610, %constant.3)
  %while.342 = (s8[100,48]{1,0:T(8,128)(4,1)}, s32[64,48]{0,1:T(8,128)}, u32[]{:T(128)}, u32[]{:T(128)}) while(%tuple.788), condition=%windowed_dot_general_cond, body=%windowed_dot_general_body
  ROOT %out = s32[64,48]{0,1:T(8,128)} get-tuple-element(%while.342), index=1
}
"""  # noqa: E501
SUM = "%add.2858 = u32[]{:T(128)} add(%gte.2, %constant.2..sunk)"


def times(module: Module) -> dict[str, int]:
    items, unknown = executed(module)
    assert unknown == []
    return {item.instruction.name: item.times for item in items}


def test_instructions_are_counted_as_often_as_the_loops_around_them_run() -> None:
    counts = times(parse_module(LOOPS))
    assert counts["negated"] == 3, "from 2 to 5, both carried by the loop, compared in a fusion"
    assert counts["twice"] == 3 * 5
    assert counts["copied"] == 1


def test_a_ring_that_is_unrolled_by_two_turns_half_as_often() -> None:
    assert times(parse_module(RING))["permuted"] == 4, "0, 2, 4 and 6 are less than 8"
    odd = RING.replace("u32[]{:T(128)} constant(8)", "u32[]{:T(128)} constant(7)")
    assert times(parse_module(odd))["permuted"] == 4
    over = RING.replace("u32[]{:T(128)} constant(8)", "u32[]{:T(128)} constant(0)")
    assert times(parse_module(over))["permuted"] == 0


@pytest.mark.parametrize(
    "lines",
    [
        "%add.2858 = u32[] fusion(%constant.2..sunk, %gte.2), kind=kLoop, calls=%fused_add",
        "%copy.1 = u32[] copy(%gte.2)\n  %bitcast.1 = u32[] bitcast(%copy.1)\n"
        "  %add.9 = u32[] add(%constant.2..sunk, %bitcast.1)\n  %add.2858 = u32[] copy(%add.9)",
        "%add.2858 = u32[] add(%gte.2, %gte.3)",  # by a number that the loop carries
    ],
)
def test_the_step_is_found_in_a_fusion_behind_copies_and_in_the_state(lines: str) -> None:
    assert SUM in RING
    assert times(parse_module(RING.replace(SUM, lines)))["permuted"] == 4


@pytest.mark.parametrize(
    "lines",
    [
        "%add.2858 = u32[] multiply(%gte.2, %constant.2..sunk)",
        "%add.2858 = u32[] add(%gte.3, %constant.2..sunk)",  # another element of the state
        "%add.2858 = u32[] add(%gte.2, %constant.0..sunk)",
        "%add.2858 = u32[] copy(%gte.2)",
    ],
)
def test_a_counter_that_cannot_be_followed_or_never_arrives_leaves_the_loop_unknown(lines: str) -> None:
    items, unknown = executed(parse_module(RING.replace(SUM, lines)))
    assert unknown == ["while.342"]
    assert {item.instruction.name: item.times for item in items}["permuted"] == 1


@pytest.mark.parametrize("direction", ["GT", "NE"])
def test_another_comparison_leaves_the_loop_unknown(direction: str) -> None:
    other = RING.replace("direction=LT", f"direction={direction}")
    assert executed(parse_module(other))[1] == ["while.342"]


def test_a_trip_count_that_the_compiler_notes_is_taken() -> None:
    noted = LOOPS.replace(
        "body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"7"},"other":{}}'
    )
    assert times(parse_module(noted))["twice"] == 3 * 7


def test_a_loop_of_unknown_length_is_named_and_runs_once() -> None:
    unknown = LOOPS.replace("ROOT %less = pred[] compare(%i, %bound), direction=LT", "ROOT %less = pred[] not(%i)")
    items, names = executed(parse_module(unknown))
    assert names == ["loop"]
    assert {item.instruction.name: item.times for item in items}["twice"] == 3


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
    items, _ = executed(parse_module(textwrap.dedent(text)))
    names = [item.instruction.name for item in items]
    assert (names.count("doubled"), names.count("kept")) == (2, 1)
