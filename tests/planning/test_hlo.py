"""What a program computes: a GPU's matmuls."""

from moe_jax.planning import hlo
from tests.helpers.gpu_program import GPU_PROGRAM


def test_matmuls_of_a_gpu() -> None:
  projections = 2 * 128 * 64 * 96
  # Scores and values, of half a square of 32 x 32; backward five products.
  attention = (2 + 5) * 2 * (4 * 2 * 32 * 32 * 16) // 2
  grouped = 2 * (2 * 128 * 64 * 80)  # rows, and the weights' gradient
  usual = 2 * 8 * 128 * 128 * 64
  in_all = 6 * (projections + attention + grouped) + usual
  assert hlo.matmul_flops(GPU_PROGRAM) == in_all


def test_grouped_matmuls_of_mosaic() -> None:
  """Their operands are in another order, and the names of kernels too."""
  named = 'metadata={op_name="tokamax:PallasMosaicGpuRaggedDot/mosaic"}'
  target = f'custom_call_target="mosaic_gpu_v2", {named}'
  lines = (
    '%g = s32[19]{0} constant({...})',
    '%x = bf16[128,64]{1,0} constant({...})',
    '%xt = bf16[64,128]{1,0} constant({...})',
    '%w = bf16[8,64,80]{2,1,0} constant({...})',
    f'%rows = bf16[128,80]{{1,0}} custom-call(%g, %g, %x, %w), {target}',
    f'%back = bf16[8,64,80]{{2,1,0}} custom-call(%g, %xt, %rows), {target}',
  )
  body = ''.join(f'  {line}\n' for line in lines)
  program = f'HloModule step\n\nENTRY %main () -> f32[] {{\n{body}}}\n'
  assert hlo.matmul_flops(program) == 2 * (2 * 128 * 64 * 80)


def test_a_program_without_matmuls() -> None:
  program = 'ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8] parameter(0)\n}'
  assert hlo.matmul_flops(program) is None
