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


def test_a_program_without_matmuls() -> None:
  program = 'ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8] parameter(0)\n}'
  assert hlo.matmul_flops(program) is None
