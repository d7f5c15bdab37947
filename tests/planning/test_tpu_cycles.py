"""For how long TPUs compute: what runs of what their compiler estimates."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import SingleDeviceSharding

from moe_jax.planning import topologies, tpu_cycles
from moe_jax.training import device_peaks


def fusion(name: str, cycles: int, config: str = '') -> str:
  estimate = f'{{"window_config":{{"estimated_cycles":"{cycles}"{config}}}'
  return (
    f'  %{name} = f32[8] fusion(%p), kind=kLoop, calls=%inside,'
    f' backend_config={estimate}}}\n'
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
  always = 1000 + 10 * (7 + 4)
  assert tpu_cycles.estimated_cycles(PROGRAM) == always + 3
  assert tpu_cycles.estimated_cycles(PROGRAM, max) == always + 50


def test_marks_are_no_numbers() -> None:
  marked = PROGRAM.replace('"1000"', '"9223372036854775807"')
  assert tpu_cycles.estimated_cycles(marked) == 10 * (7 + 4) + 3


def test_a_program_without_an_estimate() -> None:
  assert tpu_cycles.estimated_cycles(PROGRAM.replace('estimated_', '')) is None


@pytest.mark.parametrize(
  'mode, cycles',
  [
    # Of 4 groups and 6 windows of rows, 9 of 24 pairs meet at most.
    ('ITERATION_SKIPPER_MODE_GROUP_STARTS', 9 * 100),
    ('ITERATION_SKIPPER_MODE_UNSPECIFIED', 24 * 100),
  ],
)
def test_what_a_grouped_product_skips_does_not_count(
  mode: str, cycles: int
) -> None:
  config = (
    ',"iteration_bounds":["5","4","1","1","6"]},"mask_aggregator_config":'
    '{"mask_dim_to_iteration_index":["1","4"],'
    f'"iteration_skipper_mode":"{mode}"'
  )
  first = fusion('first', 24 * 100, config)
  assert first != fusion('first', 24 * 100)
  program = PROGRAM.replace(fusion('first', 1000), first)
  assert tpu_cycles.estimated_cycles(program) == cycles + 113


def kernel(name: str, result: str, operands: str, config: str = '') -> str:
  return (
    f'  %{name} = {result} custom-call({operands}),'
    f' custom_call_target="tpu_custom_call", backend_config={{{config}}}\n'
  )


def test_kernels_count_what_they_state_and_what_attention_computes() -> None:
  query = 'bf16[4,256,64]{2,1,0:T(8,128)(2,1)S(1)}'
  read = '%mask, %q, %k, %k'
  stated = '"cost_estimate":{"flops":"1000","transcendentals":"0"}'
  body = kernel('ragged-dot-none.1', 'bf16[8,8]', '%q, %k', stated)
  body += kernel('ragged-dot-metadata', 's32[8]', '%mask')
  body += kernel('splash_mha_fwd_residuals.3', f'(f32[8,8], {query})', read)
  program = (
    'HloModule jit_step\n\n'
    f'%body (p: {query}) -> {query} {{\n  %mask = s8[1,8,8] parameter(0)\n'
    f'  %q = {query} parameter(1)\n  %k = {query} parameter(2)\n{body}}}\n\n'
    f'ENTRY %main (p: {query}) -> {query} {{\n'
    '  %w = f32[8] while(%p), condition=%c, body=%body,'
    ' backend_config={"known_trip_count":{"n":"3"}}\n}\n'
  )
  product = 2 * 4 * 256 * 256 * 64 // 2  # of half a square
  assert tpu_cycles.kernel_flops(program) == 3 * (1000 + 2 * product)
  for backward, results, products in (
    ('dq_no', query, 3),
    ('dkv_no', f'f32[8,8], {query}, {query}', 4),
    ('dkv_no', f'f32[8,8], {query}, {query}, {query}', 5),
  ):
    changed = program.replace('fwd', backward).replace(
      f'(f32[8,8], {query})', f'({results})'
    )
    assert tpu_cycles.kernel_flops(changed) == 3 * (1000 + products * product)


@pytest.mark.slow
def test_a_compiled_program_counts_the_usual_branch() -> None:
  target = topologies.target('v5e:1x1')
  here = SingleDeviceSharding(target.devices[0])
  operands = (
    jax.ShapeDtypeStruct((), jnp.bool, sharding=here),
    jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16, sharding=here),
  )

  def step(is_rare: jax.Array, x: jax.Array) -> jax.Array:
    return lax.cond(is_rare, lambda x: x @ x @ x, lambda x: x, x @ x)

  text = jax.jit(step).lower(*operands).compile().as_text()
  assert text is not None
  usual = tpu_cycles.estimated_cycles(text)
  most = tpu_cycles.estimated_cycles(text, max)
  # One product of three; as the peak has it, of four units of 128 x 128.
  assert usual is not None and most is not None
  least = 2048**3 / (4 * 128 * 128)
  assert least <= usual < 1.5 * least and 3 * least <= most


@pytest.mark.slow
@pytest.mark.parametrize(
  'slice_', ['v4:1x1x1', 'v5e:1x1', 'v5p:1x1x1', 'v6e:1x1']
)
def test_matmuls_are_expected_near_the_peak_and_sums_far_from_it(
  slice_: str,
) -> None:
  """So the clocks are right, and what moves data is reckoned too dear."""
  target = topologies.target(slice_)
  chip, device = target.chip, target.devices[0]
  peak = device_peaks.peak(device.device_kind, 'bfloat16')
  assert chip and chip.hertz and chip.bytes_per_second and peak
  rows, weights = (
    jax.ShapeDtypeStruct(
      shape, jnp.bfloat16, sharding=SingleDeviceSharding(device)
    )
    for shape in ((32768, 4096), (4096, 1024))
  )

  def seconds(function: Callable[..., jax.Array], *operands: object) -> float:
    text = jax.jit(function).lower(*operands).compile().as_text()
    assert text is not None
    cycles = tpu_cycles.estimated_cycles(text)
    assert cycles is not None and chip.hertz
    return cycles / chip.hertz

  flops = 2 * 32768 * 4096 * 1024
  assert 0.75 < flops / peak / seconds(jnp.matmul, rows, weights) < 1
  moved = 2 * 32768 * 4096 / chip.bytes_per_second
  assert 0.08 < moved / seconds(jnp.sum, rows) < 0.2
