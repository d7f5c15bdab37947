"""What a program computes: the compiler's estimate, and a GPU's matmuls."""

from moe_jax.planning import hlo


def fusion(name: str, count: int) -> str:
  config = f'{{"window_config":{{"estimated_cycles":"{count}"}}}}'
  return (
    f'  %{name} = f32[8] fusion(%p), kind=kLoop, calls=%inside,'
    f' backend_config={config}\n'
  )


PROGRAM = (
  'HloModule jit_step, is_scheduled=true\n\n'
  '%inside (p: f32[8]) -> f32[8] {\n  %p = f32[8] parameter(0)\n}\n\n'
  f'%dear (p: f32[8]) -> f32[8] {{\n{fusion("d", 50)}}}\n\n'
  f'%cheap (p: f32[8]) -> f32[8] {{\n{fusion("c", 3)}}}\n\n'
  f'%body (p: f32[8]) -> f32[8] {{\n{fusion("a", 7)}{fusion("b", 4)}}}\n\n'
  '%condition (p: f32[8]) -> pred[] {\n  %n = s32[] constant(10)\n'
  '  ROOT %lt = pred[] compare(%p, %n), direction=LT\n}\n\n'
  f'ENTRY %main (p: f32[8]) -> f32[8] {{\n{fusion("first", 1000)}'
  '  %w = f32[8] while(%p), condition=%condition, body=%body\n'
  '  %c = f32[8] conditional(%p, %p, %p), true_computation=%cheap,'
  ' false_computation=%dear\n}\n'
)


def test_fusions_count_as_often_as_they_run() -> None:
  assert hlo.estimated_cycles(PROGRAM) == 1000 + 10 * (7 + 4) + 50


def test_marks_are_no_numbers() -> None:
  marked = PROGRAM.replace('"1000"', '"9223372036854775807"')
  assert hlo.estimated_cycles(marked) == 10 * (7 + 4) + 50


def test_a_program_without_an_estimate() -> None:
  assert hlo.estimated_cycles(PROGRAM.replace('estimated_', '')) is None


# Of a step that XLA compiled for an H100: six layers in a loop, four sequences
# of 32 tokens, heads of 16; lines are shortened.
GPU_PROGRAM = r"""HloModule jit_train_step, is_scheduled=true

%gemm (p0: bf16[128,64], p1: bf16[64,96]) -> bf16[128,96] {
  %p0 = bf16[128,64]{1,0} parameter(0)
  %p1 = bf16[64,96]{1,0} parameter(1)
  ROOT %dot.1 = bf16[128,96]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%usual (a: bf16[8,128,64]) -> f32[] {
  %a = bf16[8,128,64]{2,1,0} parameter(0)
  %dot.2 = f32[8,128,128]{2,1,0} dot(%a, %a), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={2}
  ROOT %c0 = f32[] constant(0)
}

%rare (b: bf16[8,128,64]) -> f32[] {
  %b = bf16[8,128,64]{2,1,0} parameter(0)
  %dot.3 = f32[8,128,128]{2,1,0} dot(%b, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={2}
  %dot.4 = f32[8,128,128]{2,1,0} dot(%b, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={2}
  ROOT %c1 = f32[] constant(0)
}

%body (t: (s32[], bf16[128,64])) -> (s32[], bf16[128,64]) {
  %x = bf16[128,64]{1,0} get-tuple-element(%t), index=1
  %w = bf16[64,96]{1,0} constant({...})
  %q = bf16[4,32,2,16]{3,2,1,0} bitcast(%x)
  %banks = bf16[8,64,80]{2,1,0} constant({...})
  %sizes = s32[8]{0} constant({...})
  %projected = bf16[128,96]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %fwd = (bf16[4,2,32,16]{3,1,2,0}, f32[4,2,32]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="attention"}
  %bwd = (bf16[4,2,32,16]{3,1,2,0}, bf16[4,2,32,16]{3,1,2,0}, bf16[4,2,32,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q, %q, /*index=4*/%q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %rows = bf16[128,80]{1,0} custom-call(%x, %banks, %sizes, %sizes), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="tokamax:{\"op\":{\"__type\":\"PallasTritonRaggedDot\"}}/pallas_call"}
  %weights = bf16[8,64,80]{2,1,0} custom-call(%x, %rows, %sizes, %sizes), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="tokamax:{\"op\":{\"__type\":\"PallasTritonRaggedDot\"}}/pallas_call"}
  %other = bf16[128,64]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="a kernel of others"}
}

%condition (t: (s32[], bf16[128,64])) -> pred[] {
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(6)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: bf16[8,128,64]) -> f32[] {
  %p = bf16[8,128,64]{2,1,0} parameter(0)
  %start = (s32[], bf16[128,64]{1,0}) tuple(%p)
  %loop = (s32[], bf16[128,64]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %c = f32[] conditional(%p, %p, %p), true_computation=%usual, false_computation=%rare
}
"""  # noqa: E501


def test_matmuls_of_a_gpu() -> None:
  projections = 2 * 128 * 64 * 96
  # Scores and values, of half a square of 32 x 32; backward five products.
  attention = (2 + 5) * 2 * (4 * 2 * 32 * 32 * 16) // 2
  grouped = 2 * (2 * 128 * 64 * 80)  # rows, and the weights' gradient
  usual = 2 * 8 * 128 * 128 * 64
  in_all = 6 * (projections + attention + grouped) + usual
  assert hlo.matmul_flops(GPU_PROGRAM) == in_all


def test_a_program_without_matmuls() -> None:
  assert hlo.matmul_flops(PROGRAM) is None
