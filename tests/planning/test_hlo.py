"""What a program computes: the compiler's estimate, and a GPU's matmuls."""

from moe_jax.planning import hlo
from tests.helpers.gpu_program import GPU_PROGRAM


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
