import textwrap

import pytest

from picogpt_jax.planning.cost import Collective, Cost, convolution_flops, cost_of
from picogpt_jax.planning.hlo import parse_module

SIGNATURE = "dim_labels=bf_io->bf"


def cost(text: str, devices: int = 4) -> Cost:
    return cost_of(parse_module(textwrap.dedent(text)), devices)


def only(found: Cost) -> Collective:
    (collective,) = found.collectives
    return collective


def test_products_are_told_apart_by_their_operands_and_found_inside_fusions() -> None:
    found = cost("""
    %fused (p: s8[16,32], q: s8[32,8]) -> s32[16,8] {
      %p = s8[16,32] parameter(0)
      %q = s8[32,8] parameter(1)
      ROOT %product = s32[16,8] convolution(%p, %q), dim_labels=bf_io->bf
    }
    ENTRY %main (a: s8[16,32], b: s8[32,8], c: bf16[4,2], d: f32[2,6]) -> s32[16,8] {
      %a = s8[16,32] parameter(0)
      %b = s8[32,8] parameter(1)
      %c = bf16[4,2] parameter(2)
      %d = f32[2,6] parameter(3)
      %mixed = f32[4,6] dot(%c, %d), lhs_contracting_dims={1}, rhs_contracting_dims={0}
      %float = f32[6,6] dot(%d, %d), lhs_contracting_dims={0}, rhs_contracting_dims={0}
      ROOT %f = s32[16,8] fusion(%a, %b), kind=kOutput, calls=%fused
    }
    """)
    assert found.flops("int8") == 2 * 16 * 32 * 8
    assert found.flops("bfloat16") == 2 * 4 * 2 * 6
    assert found.flops("float32") == 2 * 2 * 6 * 6
    assert [found.products(name) for name in ("int8", "bfloat16", "float32")] == [1, 1, 1]
    assert found.uncounted == []


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "flops"),
    [
        # [8, 64] x [64, 16]
        ((8, 64), (64, 16), (8, 16), "dim_labels=bf_io->bf", 2 * 8 * 64 * 16),
        # its transposes: contracted over the first dimension of both
        ((64, 8), (64, 16), (8, 16), "dim_labels=fb_io->bf", 2 * 8 * 64 * 16),
        # a batch of 4 x 12 products [10, 6] x [6, 10], as the TPU compiler writes them, in both of its forms
        ((4, 12, 10, 6), (4, 12, 10, 6), (4, 12, 10, 10),
         "window={size=4x12 stride=3x11 lhs_dilate=4x12}, dim_labels=01bf_01oi->01bf", 4 * 12 * 2 * 10 * 6 * 10),
        ((4, 12, 6, 10), (4, 12, 6, 10), (4, 12, 10, 6),
         "window={size=4x12 stride=4x12 pad=3_3x11_11 lhs_dilate=3x11 rhs_reversal=1x1}, dim_labels=01fb_01oi->01fb",
         None),
        # a window of 3 over 5 positions, padded by one at both ends: the outer two positions see 2 elements each
        ((1, 5, 1), (3, 1, 1), (1, 5, 1), "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * (3 + 3 + 3 + 2 + 2)),
    ],
)  # fmt: skip
def test_flops_of_a_convolution(
    left: tuple[int, ...], right: tuple[int, ...], result: tuple[int, ...], attributes: str, flops: float | None
) -> None:
    if flops is None:  # [10, 6]^T x ... : batch 4 x 12, result [6, 10] from a sum over 10
        flops = 4 * 12 * 2 * 6 * 10 * 10
    assert convolution_flops(left, right, result, attributes) == flops


def test_a_collective_started_and_finished_apart_counts_once_and_is_overlapped() -> None:
    found = only(
        cost("""
    ENTRY %main (a: bf16[16,8]) -> bf16[64,8] {
      %a = bf16[16,8] parameter(0)
      %begin = (bf16[16,8], bf16[64,8]) all-gather-start(%a), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
      %other = bf16[16,8] add(%a, %a)
      ROOT %end = bf16[64,8] all-gather-done(%begin)
    }
    """)
    )
    assert (found.kind, found.n_bytes, found.times, found.overlapped) == ("all-gather", 64 * 8 * 2, 1, True)
    assert (found.dtype, found.groups) == ("bf16", [[0, 1, 2, 3]])


def test_a_collective_spread_over_fusions_counts_once() -> None:
    found = only(
        cost("""
    %start (p: s8[16,8]) -> s8[64,8] {
      %p = s8[16,8] parameter(0)
      %g = s8[64,8] all-gather(%p), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
      ROOT %c = (s8[16,8], s8[64,8]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
    }
    %middle (p: s8[16,8], x: bf16[8,8]) -> bf16[8,8] {
      %p = s8[16,8] parameter(0)
      %x = bf16[8,8] parameter(1)
      %g = s8[64,8] all-gather(%p), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
      ROOT %d = bf16[8,8] convolution(%x, %x), dim_labels=bf_io->bf
    }
    ENTRY %main (a: s8[16,8], b: bf16[8,8]) -> bf16[8,8] {
      %a = s8[16,8] parameter(0)
      %b = bf16[8,8] parameter(1)
      %s = (s8[16,8], s8[64,8]) fusion(%a), kind=kCustom, calls=%start
      ROOT %m = bf16[8,8] fusion(%a, %b), kind=kCustom, calls=%middle
    }
    """)
    )
    assert (found.kind, found.n_bytes, found.overlapped) == ("all-gather", 64 * 8, True)


@pytest.mark.parametrize("is_fused", [False, True])
def test_collectives_that_share_a_channel_all_count(is_fused: bool) -> None:
    called = "fusion(OPERAND), kind=kCustom, calls=%{}"
    sums = "all-reduce(OPERAND), channel_id=1, replica_groups={{0,1}}, to_apply=%add"
    one, other = (called.format(name) if is_fused else sums for name in ("one", "other"))
    found = cost(f"""
    %one (p: f32[100]) -> f32[100] {{
      %p = f32[100] parameter(0)
      ROOT %sum = f32[100] {sums.replace("OPERAND", "%p")}
    }}
    %other (p: f32[64,8]) -> f32[64,8] {{
      %p = f32[64,8] parameter(0)
      ROOT %sum = f32[64,8] {sums.replace("OPERAND", "%p")}
    }}
    ENTRY %main (a: f32[64,8], b: f32[100]) -> f32[64,8] {{
      %a = f32[64,8] parameter(0)
      %b = f32[100] parameter(1)
      %psum.1 = f32[100] {one.replace("OPERAND", "%b")}
      ROOT %psum.2 = f32[64,8] {other.replace("OPERAND", "%a")}
    }}
    """).collectives
    assert [collective.n_bytes for collective in found] == [4 * 100, 4 * 64 * 8]


def test_an_all_reduce_of_several_arrays_and_one_fused_with_a_slice() -> None:
    reduced, scattered = cost("""
    %add (x: f32[], y: f32[]) -> f32[] {
      %x = f32[] parameter(0)
      %y = f32[] parameter(1)
      ROOT %sum = f32[] add(%x, %y)
    }
    %all-reduce-scatter.1 (p: f32[64,8]) -> f32[32,8] {
      %p = f32[64,8] parameter(0)
      %r = f32[64,8] all-reduce(%p), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
      %zero = s32[] constant(0)
      ROOT %part = f32[32,8] dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={32,8}
    }
    ENTRY %main (a: f32[64,8], b: f32[100]) -> f32[32,8] {
      %a = f32[64,8] parameter(0)
      %b = f32[100] parameter(1)
      %both = (f32[64,8], f32[100]) all-reduce(%a, %b), channel_id=1, replica_groups={{0,2},{1,3}}, to_apply=%add
      ROOT %f = f32[32,8] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
    }
    """).collectives
    assert (reduced.kind, reduced.n_bytes, reduced.overlapped) == ("all-reduce", 4 * (64 * 8 + 100), False)
    assert (scattered.kind, scattered.n_bytes, scattered.groups) == ("reduce-scatter", 4 * 64 * 8, [[0, 1], [2, 3]])


def test_a_collective_in_a_loop_counts_for_every_turn() -> None:
    found = only(
        cost("""
    %body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
      %s = (s32[], f32[8]) parameter(0)
      %i = s32[] get-tuple-element(%s), index=0
      %x = f32[8] get-tuple-element(%s), index=1
      %p = f32[8] collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
      %one = s32[] constant(1)
      %next = s32[] add(%i, %one)
      ROOT %out = (s32[], f32[8]) tuple(%next, %p)
    }
    %condition (s: (s32[], f32[8])) -> pred[] {
      %s = (s32[], f32[8]) parameter(0)
      %i = s32[] get-tuple-element(%s), index=0
      %n = s32[] constant(48)
      ROOT %less = pred[] compare(%i, %n), direction=LT
    }
    ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {
      %x = f32[8] parameter(0)
      %zero = s32[] constant(0)
      %start = (s32[], f32[8]) tuple(%zero, %x)
      ROOT %loop = (s32[], f32[8]) while(%start), condition=%condition, body=%body
    }
    """)
    )
    assert (found.kind, found.times, found.n_bytes) == ("collective-permute", 48, 32)
    assert found.groups == [[0, 1], [1, 2], [2, 3], [3, 0]]


def test_memory_traffic_leaves_out_what_stays_on_the_chip_and_what_a_slice_does_not_touch() -> None:
    found = cost("""
    %fused (stack: f32[48,10], i: s32[], x: f32[10], new: f32[1,10]) -> (f32[10], f32[48,10]) {
      %stack = f32[48,10] parameter(0)
      %i = s32[] parameter(1)
      %x = f32[10] parameter(2)
      %new = f32[1,10] parameter(3)
      %zero = s32[] constant(0)
      %row = f32[1,10] dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,10}
      %flat = f32[10] bitcast(%row)
      %sum = f32[10] add(%flat, %x)
      %kept = f32[48,10] dynamic-update-slice(%stack, %new, %i, %zero)
      ROOT %both = (f32[10], f32[48,10]) tuple(%sum, %kept)
    }
    ENTRY %main (stack: f32[48,10], i: s32[], x: f32[10], new: f32[1,10]) -> f32[10] {
      %stack = f32[48,10]{1,0} parameter(0)
      %i = s32[]{:S(2)} parameter(1)
      %x = f32[10]{0:T(128)S(1)} parameter(2)
      %new = f32[1,10]{1,0} parameter(3)
      %f = (f32[10]{0:T(128)S(1)}, f32[48,10]{1,0}) fusion(%stack, %i, %x, %new), kind=kLoop, calls=%fused
      %y = f32[10]{0:T(128)S(1)} get-tuple-element(%f), index=0
      ROOT %out = f32[10]{0:T(128)} copy(%y)
    }
    """)
    row = 40  # bytes
    by_name = {work.instruction.name: work.n_bytes for work in found.work}
    assert by_name == {"f": 3 * row, "out": row}, "a row read, one update read and written; the copy leaves the chip"


def test_a_scatter_reads_and_writes_only_what_it_adds_to() -> None:
    found = cost("""
    %fused (x: f32[50,10], rows: s32[3,1], new: f32[3,1,10]) -> f32[50,10] {
      %x = f32[50,10] parameter(0)
      %rows = s32[3,1] parameter(1)
      %new = f32[3,1,10] parameter(2)
      ROOT %sum = f32[50,10] scatter(%x, %rows, %new), update_window_dims={1,2}, to_apply=%add
    }
    ENTRY %main (x: f32[50,10], rows: s32[3,1], new: f32[3,1,10]) -> f32[50,10] {
      %x = f32[50,10]{1,0} parameter(0)
      %rows = s32[3,1]{1,0} parameter(1)
      %new = f32[3,1,10]{2,1,0} parameter(2)
      ROOT %f = f32[50,10]{1,0} fusion(%x, %rows, %new), kind=kInput, calls=%fused
    }
    """)
    assert found.n_bytes == 3 * 3 * 40 + 12, "rows of x, as it was and as it is, and of what is added; their numbers"


def test_a_prefetch_runs_beside_other_work() -> None:
    found = cost("""
    ENTRY %main (a: f32[100]) -> f32[100] {
      %a = f32[100]{0:T(128)} parameter(0)
      %begin = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) copy-start(%a)
      %part = ((f32[100]{0:T(128)}), f32[10]{0:T(128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:10]}
      ROOT %end = f32[100]{0:T(128)S(1)} copy-done(%begin)
    }
    """)
    assert [(work.n_bytes, work.asynchronous) for work in found.work] == [(400, True), (40, True)]


def test_a_kernel_counts_what_it_states_and_is_named_where_it_states_nothing() -> None:
    text = """
    ENTRY %main (a: bf16[8,8]) -> bf16[8,8] {
      %a = bf16[8,8] parameter(0)
      %k = bf16[8,8] custom-call(%a), custom_call_target="tpu_custom_call", backend_config={STATED"body": "x"}
      ROOT %m = bf16[8,8] custom-call(%k), custom_call_target="AllocateBuffer"
    }
    """
    stated = cost(text.replace("STATED", '"cost_estimate": {"flops": "12345", "bytes_accessed": "7"}, '))
    assert (stated.flops("bfloat16"), stated.products("bfloat16"), stated.uncounted) == (12345, 1, [])
    silent = cost(text.replace("STATED", ""))
    assert silent.flops("bfloat16") == 0
    assert silent.uncounted == ["kernel tpu_custom_call (k), 1 a step: its FLOPs are not known"]
    assert [work.n_bytes for work in silent.work] == [2 * 128], "its memory traffic counts; a marker's does not"


@pytest.mark.parametrize(
    ("call", "products", "blocks"),
    [
        ('%integer_attention_2x.3 = RESULT custom-call(%q, %q, %q), custom_call_target="tpu_custom_call"', 2, 4),
        ('%integer_attention_3x = RESULT custom-call(%q, %q, %q), custom_call_target="tpu_custom_call"', 3, 4),
        ('%pallas_call.3 = RESULT custom-call(%q, %q, %q), custom_call_target="__gpu$xla.gpu.triton", '
         'backend_config={debug = false, ir = "ML\\EF", name = "integer_attention_4x", num_warps = 4 : i32}', 4, 8),
    ],
)  # fmt: skip
def test_integer_attention_counts_int8_products_of_the_blocks_that_it_computes(
    call: str, products: int, blocks: int
) -> None:
    found = cost(f"""
    ENTRY %main (q: s8[2,3,512,64]) -> f32[2,3,512,64] {{
      %q = s8[2,3,512,64] parameter(0)
      ROOT {call.replace("RESULT", "f32[2,3,512,64]")}
    }}
    """)
    assert (found.uncounted, found.products("int8")) == ([], products)
    assert found.flops("int8") == products * 2 * 2 * 3 * 512 * 512 * 64 * (blocks + 1) / (2 * blocks)
    assert found.n_bytes == (1 + 4) * 2 * 3 * 512 * 64


# As the GPU compiler writes calls of libraries, shortened.
CUBLAS = """
    ENTRY %main (a: s8[256,512], b: s8[1024,512], x: bf16[4,64,32], c: bf16[64,64], bias: bf16[64]) -> bf16[4,64,64] {
      %a = s8[256,512]{1,0} parameter(0)
      %b = s8[1024,512]{1,0} parameter(1)
      %x = bf16[4,64,32]{2,1,0} parameter(2)
      %y = bf16[4,64,32]{2,1,0} bitcast(%x)
      %c = bf16[64,64]{1,0} parameter(3)
      %bias = bf16[64]{0} parameter(4)
      %plain = (s32[256,1024]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"DEFAULT"}}
      ROOT %gelu = (bf16[4,64,64]{2,1,0}, bf16[4,64,64]{2,1,0}, s8[512]{0}) custom-call(%x, %y, %c, %bias), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"beta":1,"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"],\
"rhs_batch_dimensions":["0"]},"epilogue":"BIAS_GELU_AUX"}}
    }
    """


def test_cublas_counts_its_product_and_what_it_reads_and_writes_with_it() -> None:
    plain, gelu = cost(CUBLAS).work
    assert [(item.flops, item.precision) for item in plain.products] == [(2.0 * 256 * 1024 * 512, "int8")]
    assert plain.n_bytes == 256 * 512 + 1024 * 512 + 4 * 256 * 1024, "the last result is its workspace"
    assert [(item.flops, item.precision) for item in gelu.products] == [(2.0 * 4 * 64 * 64 * 32, "bfloat16")]
    # Both operands, the array that is added, the bias; the result, and what the backward pass of GELU needs.
    assert gelu.n_bytes == 2 * (2 * 4 * 64 * 32 + 64 * 64 + 64 + 2 * 4 * 64 * 64)
    assert cost(CUBLAS).uncounted == []


@pytest.mark.parametrize(("mask", "part"), [("CAUSAL", 257 / 512), ("NO_MASK", 1.0)])
def test_attention_of_cudnn_counts_by_its_scores(mask: str, part: float) -> None:
    config = (
        'backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.125, "intermediate_tensor_shape": '
        '{"element_type": "BF16", "dimensions": ["2", "3", "256", "256"], "layout": {"minor_to_major": ["3", "2"]}}, '
        f'"mask_type": "{mask}"}}}}'
    )
    text = """
    ENTRY %main (q: bf16[2,256,3,64], k: bf16[2,256,3,64], v: bf16[2,256,3,64], s: f32[2,3,256]) -> bf16[2,3,256,64] {
      %q = bf16[2,256,3,64]{3,2,1,0} parameter(0)
      %k = bf16[2,256,3,64]{3,2,1,0} parameter(1)
      %v = bf16[2,256,3,64]{3,2,1,0} parameter(2)
      %s = f32[2,3,256]{2,1,0} parameter(3)
      %f = (bf16[2,3,256,64]{3,1,2,0}, f32[2,3,256]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %v), \
custom_call_target="__cudnn$fmhaSoftmax", CONFIG
      ROOT %b = (bf16[2,3,256,64]{3,1,2,0}, bf16[2,3,256,64]{3,1,2,0}, bf16[2,3,256,64]{3,1,2,0}, u8[99]{0}) \
custom-call(%q, %k, %v, %s, %v, %v), custom_call_target="__cudnn$fmhaSoftmaxBackward", CONFIG
    }
    """
    found = cost(text.replace("CONFIG", config))
    product = 2.0 * 2 * 3 * 256 * 256 * 64 * part
    assert [[item.flops for item in work.products] for work in found.work] == [[product] * 2, [product] * 5]
    heads, sums = 2 * 2 * 3 * 256 * 64, 4 * 2 * 3 * 256  # bytes of queries in bfloat16, and of the rows' sums
    assert [work.n_bytes for work in found.work] == [4 * heads + sums, 6 * heads + sums]
    assert found.uncounted == []
    silent = cost(text.replace("CONFIG", "backend_config={}"))
    assert silent.flops("bfloat16") == 0
    assert silent.uncounted == [
        "kernel __cudnn$fmhaSoftmax (f), 1 a step: its FLOPs are not known",
        "kernel __cudnn$fmhaSoftmaxBackward (b), 1 a step: its FLOPs are not known",
    ]


def test_a_call_that_is_not_understood_is_named_however_often_it_runs() -> None:
    found = cost("""
    ENTRY %main (a: f32[100]) -> f32[100] {
      %a = f32[100]{0} parameter(0)
      %custom-call.1 = f32[100]{0} custom-call(%a), custom_call_target="__cub$DeviceRadixSort"
      ROOT %custom-call.2 = f32[100]{0} custom-call(%custom-call.1), custom_call_target="__cub$DeviceRadixSort"
    }
    """)
    assert found.uncounted == ["kernel __cub$DeviceRadixSort (custom-call), 2 a step: its FLOPs are not known"]
    assert found.n_bytes == 2 * 800, "what it reads and writes is counted"


@pytest.mark.parametrize(("config", "overlapped"), [("true", False), ("false", True)])
def test_a_collective_that_is_started_and_waited_for_at_once_is_not_hidden(config: str, overlapped: bool) -> None:
    found = only(
        cost(
            """
    ENTRY %main (a: bf16[16,8]) -> bf16[64,8] {
      %a = bf16[16,8] parameter(0)
      %begin = (bf16[16,8], bf16[64,8]) all-gather-start(%a), channel_id=3, replica_groups=[1,4]<=[4], \
dimensions={0}, backend_config={"collective_backend_config":{"is_sync":SYNC,"is_pipelined":false}}
      ROOT %end = bf16[64,8] all-gather-done(%begin)
    }
    """.replace("SYNC", config)
        )
    )
    assert (found.overlapped, found.n_bytes) == (overlapped, 64 * 8 * 2)


@pytest.mark.parametrize("sequences", ["2,", ""])  # one sequence a device: the compiler drops the dimension
def test_attention_kernels_count_by_their_shapes_and_skip_what_causality_hides(sequences: str) -> None:
    found = cost(
        """
    ENTRY %main (m: s8[1,4,4], q: bf16[2,3,512,64]) -> bf16[2,3,512,64] {
      %m = s8[1,4,4] parameter(0)
      %q = bf16[2,3,512,64] parameter(1)
      %splash_mha_fwd_residuals.2 = bf16[2,3,512,64] custom-call(%m, %q, %q, %q), custom_call_target="tpu_custom_call"
      %splash_mha_dq_no_residuals.1 = bf16[2,3,512,64] custom-call(%m, %q, %q, %q), custom_call_target="tpu_custom_call"
      ROOT %splash_mha_dkv = bf16[2,3,512,64] custom-call(%m, %q, %q, %q), custom_call_target="tpu_custom_call"
    }
    """.replace("bf16[2,", f"bf16[{sequences}")
    )
    assert found.uncounted == []
    assert found.products("bfloat16") == 2 + 3 + 4
    one = 2 * (2 if sequences else 1) * 3 * 512 * 512 * 64
    assert found.flops("bfloat16") == 9 * one * 10 / 16, "10 of 4 x 4 blocks lie on or below the diagonal"
