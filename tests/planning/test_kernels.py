"""Which kernels compute the products of a program for a GPU; one small step is really compiled, where the extra is."""

import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_config

from picogpt_jax.devices.sharding import batch_sharding
from picogpt_jax.planning import gpus, plan
from picogpt_jax.planning.hlo import parse_module
from picogpt_jax.planning.kernels import ProductKernels, product_kernels, read_ptx
from picogpt_jax.training.trainer import Trainer

IS_INSTALLED = all(map(gpus._is_installed, gpus.PACKAGES))
# What a compiler for one H100 wrote, shortened: two Triton fusions, a library's calls, and a product that none took.
PROGRAM = r"""
%gemm_computation (p0: s8[64,32], p1: s8[32,16]) -> s32[64,16] {
  %p0 = s8[64,32]{1,0} parameter(0)
  %p1 = s8[32,16]{1,0} parameter(1)
  ROOT %dot = s32[64,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%loop_computation (p0: f32[64,32], p1: f32[32,16]) -> f32[64,16] {
  %p0 = f32[64,32]{1,0} parameter(0)
  %p1 = f32[32,16]{1,0} parameter(1)
  ROOT %dot = f32[64,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: s8[64,32], b: s8[32,16], c: f32[64,32], d: f32[32,16]) -> s32[64,16] {
  %a = s8[64,32]{1,0} parameter(0)
  %b = s8[32,16]{1,0} parameter(1)
  %c = f32[64,32]{1,0} parameter(2)
  %d = f32[32,16]{1,0} parameter(3)
  %gemm_fusion_dot.41 = s32[64,16]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm_computation, backend_config={"operation_queue_id":"0","fusion_backend_config":{"kind":"__triton_nested_gemm_fusion","block_level_fusion_config":{"num_warps":"2"}}}
  %gemm_fusion_dot.42 = s32[64,16]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm_computation, backend_config={"fusion_backend_config":{"kind":"__triton_gemm","triton_gemm_config":{"block_m":"64"}}}
  %custom = s32[64,16]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm_computation, backend_config={"fusion_backend_config":{"kind":"__custom_fusion"}}
  %loop = f32[64,16]{1,0} fusion(%c, %d), kind=kLoop, calls=%loop_computation
  %lt = (s32[64,16]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %old = (f32[64,16]{1,0}, s8[4194304]{0}) custom-call(%c, %d), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  ROOT %end = s32[64,16]{1,0} add(%gemm_fusion_dot.41, %gemm_fusion_dot.42)
}
"""  # noqa: E501
INT8_MMA = "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {%r1};"
FLOPS = 2.0 * 64 * 32 * 16


def kernels(code: dict[str, str]) -> set[tuple[str, str, bool | None, int]]:
    rows = product_kernels(parse_module(textwrap.dedent(PROGRAM)), code)
    assert all(row.flops == FLOPS * row.count for row in rows)
    return {(row.precision, row.origin, row.tensor_cores, row.count) for row in rows}


def test_each_product_has_the_origin_that_the_program_names() -> None:
    assert kernels({}) == {
        ("int8", "Triton", None, 2),
        ("int8", "CUTLASS", None, 1),
        ("int8", "cuBLASLt", None, 1),
        ("float32", "cuBLAS", None, 1),
        ("float32", "loop", False, 1),
    }


@pytest.mark.parametrize(
    ("instruction", "is_int8"),
    [
        (INT8_MMA, True),
        ("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {%r1};", True),
        ("tcgen05.mma.cta_group::1.kind::i8 [%r1];", True),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1};", False),  # the codes made floats
        ("dp4a.s32.s32 %r1, %r2;", False),
    ],
)
def test_the_code_tells_whether_int8_products_are_on_tensor_cores(instruction: str, is_int8: bool) -> None:
    found = kernels({"gemm_fusion_dot_41": instruction, "gemm_fusion_dot_42": INT8_MMA})
    triton = {row for row in found if row[1] == "Triton"}
    assert triton == (
        {("int8", "Triton", True, 2)} if is_int8 else {(*("int8", "Triton"), on, 1) for on in (True, False)}
    )


def test_the_code_is_read_kernel_by_kernel(tmp_path: Path) -> None:
    (tmp_path / "module_0001.1.ptx").write_text(
        ".version 8.7\n.visible .entry one(\n) { add; }\n.visible .entry two(\n) { mul; }"
    )
    (tmp_path / "module_0001.2.ptx").write_text(".version 8.7\n.visible .entry three(\n) { c }")
    (tmp_path / "module_0001.2.ir-no-opt.ll").write_text(".entry four(")
    code = read_ptx(tmp_path)
    assert set(code) == {"one", "two", "three"}
    assert ["add" in code["one"], "mul" in code["one"]] == [True, False]


@pytest.mark.skipif(not IS_INSTALLED, reason="pip install 'picogpt_jax[gpu-plan]' to run this test")
@pytest.mark.parametrize(("arithmetic", "remat"), [("mixed", "none"), ("integer", "dots")])
def test_a_step_for_one_h100_has_its_int8_products_on_tensor_cores(tmp_path: Path, arithmetic: str, remat: str) -> None:
    model = dict(n_layer=1, n_head=1, n_embd=64, block_size=64, vocab_size=64, dropout=0.0)
    size = {f"model__{name}": value for name, value in model.items()}
    config = tiny_config(**size, train__dtype="bfloat16", train__remat=remat, quant__arithmetic=arithmetic)
    trainer = Trainer(config, plan.topology_devices("h100:1"))
    batches = jax.ShapeDtypeStruct((1, 8, 65), jnp.uint16, sharding=batch_sharding(trainer.mesh, 1))
    with gpus.without_cudnn():
        lowered = trainer.steps.lower(trainer.abstract_state, None, batches, "train")
    program = lowered.compile({"xla_dump_to": str(tmp_path)})
    rows = product_kernels(parse_module(program.as_text()), read_ptx(tmp_path))
    int8 = [row for row in rows if row.precision == "int8"]
    # Under remat the wide layers are multiplied again, by kernels that share their twins' code; attention's 5 are not.
    again, in_attention = (2, 5) if remat == "dots" else (0, 0)
    counts = {(row.origin, row.tensor_cores): row.count for row in int8}
    assert counts.pop(("Triton", None), 0) == again
    assert counts == {("Triton", True): 4 + 1 + in_attention}
    tokens, width = 8 * 64, 64
    outputs = 3 * width + width + 2 * 2 * width + 64 + (again and 3 * width + 2 * width) + 64 * in_attention
    assert sum(row.flops for row in int8) == 2.0 * tokens * width * outputs
    assert {row.origin for row in rows} == {"Triton", "cuDNN"}
    assert ProductKernels("bfloat16", "cuDNN", None, 7, pytest.approx(7 * 2 * 8 * 64**3 * 65 / 128)) in rows
