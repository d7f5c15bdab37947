"""The roofline of a program, against what is counted by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from moe_jax.planning import gpus, roofline, topologies
from moe_jax.planning.collectives import collectives
from moe_jax.training import device_peaks
from tests.helpers.gpu_program import GPU_PROGRAM

H100 = gpus.GPUS['h100']


def milliseconds(text: str, **by: str) -> float:
  listed = roofline.kernels(text, H100)
  [name, value] = next(iter(by.items()))
  chosen = [each for each in listed if getattr(each, name) == value]
  return 1000 * roofline.total_seconds(chosen)


def test_a_kernel_takes_its_bytes_or_its_operations() -> None:
  listed = roofline.kernels(GPU_PROGRAM, H100)
  [projection] = [each for each in listed if each.kind == 'matmul'][:1]
  assert projection.count == 6
  assert projection.num_bytes == 2 * (128 * 64 + 64 * 96 + 128 * 96)
  assert projection.flops == 2 * 128 * 64 * 96
  moved = projection.num_bytes / (0.8 * 3.35e12)  # the longer of the two
  assert projection.seconds == pytest.approx(moved)
  # Rows [128, 64] and [128, 80], eight matrices, and their sizes twice.
  grouped = 2 * (128 * 64 + 128 * 80 + 8 * 64 * 80) + 2 * 4 * 8
  bytes_ = [each.num_bytes for each in listed if each.kind == 'grouped matmul']
  assert bytes_ == [grouped, grouped]


def test_matmuls_in_float32_are_slow() -> None:
  """They run beside the tensor cores: 67 TFLOP/s; and TF32 at 495.

  Three products of bfloat16 are made at 990, and so float32 at a third of it.
  """
  text = """HloModule jit_f

ENTRY %main (p: f32[8192,8192]) -> f32[8192,8192] {
  %p = f32[8192,8192]{1,0} parameter(0)
  ROOT %d = f32[8192,8192]{1,0} dot(%p, %p), lhs_contracting_dims={1}, PRECISION metadata={op_name="jvp(f)/router/dot"}
}
"""  # noqa: E501
  flops = 2 * 8192**3
  true = text.replace('PRECISION', 'operand_precision={highest,highest},')
  part = milliseconds(true, part='router')
  assert part == pytest.approx(1000 * flops / (0.7 * 67e12), rel=0.01)
  tf32 = milliseconds(text.replace('PRECISION', ''), part='router')
  assert part / tf32 == pytest.approx(495 / 67, rel=0.1)
  three = text.replace('PRECISION', 'algorithm=dot_bf16_bf16_f32_x3,')
  three_products = milliseconds(three, part='router')
  assert part / three_products == pytest.approx(990 / 3 / 67, rel=0.1)


SCAN = """HloModule jit_step

%kept (a: bf16[6,1024,64], b: bf16[1024,64], i: s32[]) -> bf16[6,1024,64] {
  %a = bf16[6,1024,64]{2,1,0} parameter(0)
  %b = bf16[1024,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %r = bf16[1,1024,64]{2,1,0} bitcast(%b)
  ROOT %u = bf16[6,1024,64]{2,1,0} dynamic-update-slice(%a, %r, %i, %z, %z)
}

%layer (w: f32[6,64,64], i: s32[]) -> bf16[64,64] {
  %w = f32[6,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = f32[1,64,64]{2,1,0} dynamic-slice(%w, %i, %z, %z), dynamic_slice_sizes={1,64,64}
  %c = f32[64,64]{1,0} bitcast(%s)
  ROOT %v = bf16[64,64]{1,0} convert(%c)
}

ENTRY %main (a: bf16[6,1024,64], b: bf16[1024,64], w: f32[6,64,64], i: s32[]) -> bf16[64,64] {
  %a = bf16[6,1024,64]{2,1,0} parameter(0)
  %b = bf16[1024,64]{1,0} parameter(1)
  %w = f32[6,64,64]{2,1,0} parameter(2)
  %i = s32[] parameter(3)
  %f = bf16[6,1024,64]{2,1,0} fusion(%a, %b, %i), kind=kLoop, calls=%kept, metadata={op_name="jit(train_step)/jvp()/while/body/dynamic_update_slice"}
  %g = bf16[64,64]{1,0} fusion(%w, %i), kind=kLoop, calls=%layer, metadata={op_name="jit(train_step)/jvp()/while/body/convert"}
  %s = (bf16[8,64,64]{2,1,0}, bf16[8,64,64]{2,1,0}) all-gather-start(%g), dimensions={0}
  ROOT %o = bf16[64,64]{1,0} fusion(%g), kind=kLoop, calls=%layer2, metadata={op_name="jit(train_step)/adam/mul"}
}

%layer2 (x: bf16[64,64]) -> bf16[64,64] {
  %x = bf16[64,64]{1,0} parameter(0)
  ROOT %m = bf16[64,64]{1,0} multiply(%x, %x)
}
"""  # noqa: E501


def test_slices_count_and_not_what_they_are_of() -> None:
  parts = roofline.report(SCAN, H100)['parts']
  moved = {name: each['num_bytes'] for name, each in parts.items()}
  index = 4  # bytes
  assert moved == {
    'scan': 2 * 2 * 1024 * 64 + index,
    'other': (4 + 2) * 64 * 64 + index,
    'optimizer': 2 * 2 * 64 * 64,
  }


GATHER = """HloModule jit_step

%look_up (x: f32[4096,512], i: s32[8,1]) -> f32[8,512] {
  %x = f32[4096,512]{1,0} parameter(0)
  %i = s32[8,1]{1,0} parameter(1)
  %r = f32[8,512]{1,0} gather(%x, %i), offset_dims={1}, slice_sizes={1,512}
  ROOT %n = f32[8,512]{1,0} negate(%r)
}

ENTRY %main (x: f32[4096,512], i: s32[8,1]) -> f32[8,512] {
  %x = f32[4096,512]{1,0} parameter(0)
  %i = s32[8,1]{1,0} parameter(1)
  ROOT %f = f32[8,512]{1,0} fusion(%x, %i), kind=kLoop, calls=%look_up
}
"""


def test_a_look_up_reads_what_it_returns() -> None:
  told = roofline.report(GATHER, H100)
  assert told['num_bytes'] == 2 * 4 * 8 * 512 + 4 * 8


def test_sums_agree() -> None:
  told = roofline.report(GPU_PROGRAM, H100)
  for by in ('kinds', 'parts'):
    for what in ('seconds', 'num_bytes', 'launches'):
      total = sum(each[what] for each in told[by].values())
      assert total == pytest.approx(told[what])
  # Five in the loop (and a kernel of others), one in the usual branch.
  assert told['launches'] == 6 * 6 + 1


TRAVELLING = """HloModule jit_step, is_scheduled=true, num_partitions=8

%layer (p: (s32[], f32[1024,1024])) -> (s32[], f32[1024,1024]) {
  %p = (s32[], f32[1024,1024]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %h = f32[1024,1024] get-tuple-element(%p), index=1
  %s = (f32[1024,1024], f32[8192,1024]) all-gather-start(%h), GROUPS
  %c = f32[1024,1024] copy(%h)
  %d = f32[8192,1024] all-gather-done(%s)
  ROOT %t = (s32[], f32[1024,1024]) tuple(%i, %c)
}

%rest (p: (s32[], f32[1024,1024])) -> pred[] {
  %p = (s32[], f32[1024,1024]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(3)
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[1024,1024], z: (s32[], f32[1024,1024])) -> f32[1024,1024] {
  %x = f32[1024,1024] parameter(0)
  %z = (s32[], f32[1024,1024]) parameter(1)
  %first = f32[1024,1024] all-reduce-start(%x), GROUPS
  %a = f32[1024,1024] copy(%x)
  %second = ((f32[1024,1024]), f32[1024,1024]) all-to-all-start(%a), GROUPS
  %b = f32[1024,1024] add(%x, %a)
  %first.1 = f32[1024,1024] all-reduce-done(%first)
  %w = (s32[], f32[1024,1024]) while(%z), condition=%rest, body=%layer
  %second.1 = f32[1024,1024] all-to-all-done(%second)
  %third = (f32[1024,1024], f32[128,1024]) reduce-scatter-start(%b), GROUPS
  %third.1 = f32[128,1024] reduce-scatter-done(%third)
  ROOT %e = f32[1024,1024] all-reduce(%b), GROUPS
}
""".replace('GROUPS', 'replica_groups=[1,8]<=[8]')


def test_what_is_computed_while_a_collective_travels() -> None:
  beside = functools.partial(roofline.beside, device=H100)
  listed = collectives(TRAVELLING, beside=beside)
  found = {(each.kind, each.count, each.beside_seconds) for each in listed}
  array = (1 << 22) / (0.8 * 3.35e12)  # 4 MiB, read or written
  expected = {
    ('all-reduce', 1): (2 + 3) * array,  # a copy and a sum
    ('all-to-all', 1): (3 + 3 * 2) * array,  # the sum, a loop of three copies
    ('all-gather', 3): 2 * array,  # a copy, each time
  }
  overlapped = {each[:2]: each[2] for each in found if each[2]}
  assert overlapped == pytest.approx(expected)
  # One that ends where it starts, and one that is all in one.
  in_the_open = {each for each in found if not each[2]}
  assert in_the_open == {('reduce-scatter', 1, 0.0), ('all-reduce', 1, 0.0)}
  without = collectives(TRAVELLING)
  assert {each.beside_seconds for each in without} == {None}


# Of a v6e: a layer's weights are fetched ahead into its own memory and are
# multiplied there; heads of 64 lie in tiles of 128 lanes.
TPU_PROGRAM = """HloModule jit_step

%inner (w: f32[6,256,64], i: s32[]) -> bf16[256,64] {
  %w = f32[6,256,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = f32[1,256,64]{2,1,0} dynamic-slice(%w, %i, %z, %z), dynamic_slice_sizes={1,256,64}
  %b = f32[256,64]{1,0} bitcast(%s)
  ROOT %c = bf16[256,64]{1,0} convert(%b)
}

%product (x: bf16[512,256], w: f32[6,256,64], i: s32[]) -> bf16[512,64] {
  %x = bf16[512,256]{1,0} parameter(0)
  %w = f32[6,256,64]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %n = bf16[256,64]{1,0} fusion(%w, %i), kind=kLoop, calls=%inner
  ROOT %v = bf16[512,64]{1,0:T(8,128)(2,1)} convolution(%x, %n), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[512,256], w: f32[6,256,64], q: bf16[2,4,256,64], i: s32[]) -> bf16[512,64] {
  %x = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  %w = f32[6,256,64]{2,1,0:T(8,128)} parameter(1)
  %q = bf16[2,4,256,64]{3,2,1,0:T(8,128)(2,1)} parameter(2)
  %i = s32[] parameter(3)
  %start = (bf16[512,256]{1,0:T(8,128)(2,1)S(1)}, bf16[512,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %near = bf16[512,256]{1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  %note = u32[16]{0:T(128)} custom-call(), custom_call_target="AllocateBuffer"
  %splash_mha_fwd_residuals.1 = (f32[8,128]{1,0:T(8,128)}, bf16[2,4,256,64]{3,2,1,0:T(8,128)(2,1)}) custom-call(%q, %q, %q), custom_call_target="tpu_custom_call"
  ROOT %f = bf16[512,64]{1,0:T(8,128)(2,1)} fusion(%near, %w, %i), kind=kOutput, calls=%product
}
"""  # noqa: E501
V6E = roofline.Tpu(1.64e12, 918e12, 256)


def test_a_tpu_reads_its_own_memory_for_nothing() -> None:
  """What is fetched, what a kernel of heads and what a matmul moves."""
  fetch, attention, product = roofline.kernels(TPU_PROGRAM, V6E)
  assert fetch.kind == fetch.part == 'prefetch'
  assert fetch.num_bytes == 2 * 512 * 256  # written where it costs nothing
  # One slice of six of the weights, the result, and an index; in tiles.
  assert product.num_bytes == 4 * 256 * 128 + 2 * 512 * 128 + 4
  assert product.kind == 'matmul' and product.flops == 2 * 512 * 256 * 64
  heads = 2 * 2 * 4 * 256 * 128
  assert attention.num_bytes == 4 * heads + 4 * 8 * 128


def test_narrow_heads_leave_a_matrix_unit_idle() -> None:
  text = TPU_PROGRAM.replace('256,64]', '65536,64]')  # so that it computes
  for side in (64, 128, 256):
    device = V6E._replace(matrix_side=side)
    [attention] = [
      each
      for each in roofline.kernels(text, device)
      if each.kind == 'attention'
    ]
    assert attention.flops == 2 * 2 * 4 * 65536**2 * 64
    assert attention.seconds == pytest.approx(
      attention.flops * side / 64 / (0.7 * 918e12)
    )


def test_padding_around_a_window_is_not_multiplied() -> None:
  """20 heads as a window: every place of the result meets one of them."""
  text = """HloModule jit_step

ENTRY %main (x: bf16[8,512,1280,1], w: bf16[1280,20,64,1]) -> bf16[8,512,20,64] {
  %x = bf16[8,512,1280,1]{2,1,3,0} parameter(0)
  %w = bf16[1280,20,64,1]{2,1,0,3} parameter(1)
  ROOT %v = bf16[8,512,20,64]{3,1,2,0} convolution(%x, %w), window={size=1x20 pad=0_0x19_19 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f
}
"""  # noqa: E501
  [product] = roofline.kernels(text, V6E)
  # 8 is a window's axis too, of which each place meets itself.
  assert product.flops == 2 * 8 * 512 * 1280 * 20 * 64
  in_passes = text.replace('0b1f\n', '0b1f, operand_precision={high,high}\n')
  [three] = roofline.kernels(in_passes, V6E)
  assert three.seconds == pytest.approx(3 * product.seconds, rel=0.4)


@pytest.mark.slow
@pytest.mark.parametrize(
  'slice_', ['v4:1x1x1', 'v5e:1x1', 'v5p:1x1x1', 'v6e:1x1']
)
def test_rates_are_those_that_the_compiler_knows(slice_: str) -> None:
  """XLA's own roofline, of a large matmul and of what moves as much."""
  target = topologies.target(slice_)
  chip, here = target.chip, SingleDeviceSharding(target.devices[0])
  peak = device_peaks.peak(target.devices[0].device_kind, 'bfloat16')
  assert chip and chip.bytes_per_second and peak
  device = roofline.Tpu(chip.bytes_per_second, peak, chip.matrix_side)
  rows, weights = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here)
    for shape in ((32768, 4096), (4096, 1024))
  )
  for function, operands, rate in (
    (jnp.matmul, (rows, weights), peak),
    (lambda a: a * 2 + 1, (rows,), chip.bytes_per_second),
  ):
    step = jax.jit(function).lower(*operands).compile()
    text, costs = step.as_text(), step.cost_analysis()
    assert text is not None and costs is not None
    *_, kernel = roofline.kernels(text, device)
    work = kernel.flops or kernel.num_bytes
    assert 0.75 < work / rate / costs['optimal_seconds'] < 1.01
