"""What programs send: written ones, and real ones whose bytes are known."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe_jax.planning import replica_groups
from moe_jax.planning.collectives import (
  Collective,
  collectives,
  total_bytes,
)

GROUPS = 'replica_groups=[2,4]<=[8]'
FOUR = (0, 1, 2, 3)


def program(*lines: str, before: str = '') -> str:
  body = '\n'.join(f'  {line}' for line in lines)
  return (
    'HloModule jit_step, is_scheduled=true, num_partitions=8\n\n'
    f'{before}\nENTRY %main (p: f32[16,8]) -> f32[16,8] {{\n'
    '  %p = f32[16,8]{1,0:T(8,128)S(1)} parameter(0)\n'
    f'{body}\n}}\n'
  )


@pytest.mark.parametrize(
  'line, kind, sent',
  [
    # 512 bytes each; a ring passes on n - 1 shares, a sum goes around twice.
    (f'f32[64,8] all-gather(%p), {GROUPS}', 'all-gather', 3 * 512),
    (f'f32[16,8]{{1,0}} all-reduce(%p), {GROUPS}', 'all-reduce', 768),
    (f'f32[4,8] reduce-scatter(%p), {GROUPS}', 'reduce-scatter', 384),
    (f'f32[16,8] all-to-all(%p), {GROUPS}', 'all-to-all', 384),
    (
      f'(f32[16,8], f32[64,8]{{1,0}}) all-gather-start(%p), {GROUPS}',
      'all-gather',
      3 * 512,
    ),
    (f'f32[16,8] all-reduce-start(%p), {GROUPS}', 'all-reduce', 768),
    (
      f'(f32[16,8], f32[16,8]) all-reduce(%p, %p), {GROUPS}',
      'all-reduce',
      1536,
    ),
    (
      f'((f32[16,8]), f32[4,8], s32[]) reduce-scatter-start(%p), {GROUPS}',
      'reduce-scatter',
      384,
    ),
    (
      f'f32[16,8] ragged-all-to-all(%p, %p, %i, %i, %i, %i), {GROUPS}',
      'ragged-all-to-all',
      384,
    ),
    (
      f'f32[16,8] collective-broadcast(%p), {GROUPS}',
      'collective-broadcast',
      512,
    ),
  ],
)
def test_bytes_of_each_kind(line: str, kind: str, sent: int) -> None:
  made = program('%i = s32[4] constant({1,2,3,4})', f'%x = {line}')
  assert collectives(made) == [Collective(kind, sent, FOUR, 1)]


@pytest.mark.parametrize('there', [True, False])
def test_room_to_spare_is_not_sent(there: bool) -> None:
  """Rows go to a buffer that is larger than they are, or come from it."""
  pair = ('%p', '%b') if there else ('%b', '%p')
  made = program(
    '%i = s32[4] constant({1,2,3,4})',
    '%b = f32[64,8] broadcast(%i)',
    f'%x = f32[64,8] ragged-all-to-all({", ".join(pair)}, %i, %i, %i, %i),'
    f' {GROUPS}',
  )
  assert collectives(made) == [Collective('ragged-all-to-all', 384, FOUR, 1)]


def test_groups_of_one_device_send_nothing() -> None:
  line = '%x = f32[16,8] all-reduce(%p), replica_groups=[8,1]<=[8]'
  assert not collectives(program(line))


def test_permutations_send_their_operand_to_one_neighbour() -> None:
  line = (
    '%x = (f32[16,8], f32[16,8], u32[], u32[]) collective-permute-start(%p),'
    ' channel_id=1, source_target_pairs={{0,2},{2,4}}, backend_config={"a":[]}'
  )
  done = '%y = f32[16,8] collective-permute-done(%x)'
  assert collectives(program(line, done)) == [
    Collective('collective-permute', 512, (0, 2), 1)
  ]


@pytest.mark.parametrize(
  'type_, sent', [('bf16[16]', 96), ('pred[3]', 9), ('s32[]', 12), ('s4[4]', 6)]
)
def test_dtypes(type_: str, sent: int) -> None:
  made = program(
    f'%q = {type_}{{0:T(8,128)(2,1)}} copy(%p)',
    f'%x = f32[4] all-gather(%q), {GROUPS}',
  )
  assert total_bytes(collectives(made)) == sent


@pytest.mark.parametrize(
  'written, first, others',
  [
    ('replica_groups={{0,4},{1,5},{2,6},{3,7}}', (0, 4), 3),
    ('replica_groups=[4,2]<=[8]', (0, 1), 3),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', (0, 4), 3),
    ('replica_groups=[2,4]<=[2,2,2]T(1,0,2)', (0, 1, 4, 5), 1),
    ('replica_groups={}', tuple(range(8)), 0),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=4] {'c'}", FOUR, 1),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4), 3),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2), 3),
    ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4), 3),
    (
      "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
      (0, 2, 4, 6),
      1,
    ),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8)), 0),
  ],
)
def test_groups_in_every_form(
  written: str, first: tuple[int, ...], others: int
) -> None:
  found = replica_groups.groups(f', channel_id=1, {written}, dim={{0}}', 8)
  assert found[0] == first and len(found) == 1 + others
  assert sorted(device for group in found for device in group) == list(range(8))


def test_axes_of_a_group() -> None:
  mesh = {'data': 2, 'fsdp': 1, 'expert': 2, 'tensor': 2}
  assert replica_groups.axes((0, 1), mesh) == ('tensor',)
  assert replica_groups.axes((1, 3), mesh) == ('expert',)
  assert replica_groups.axes((0, 2, 4, 6), mesh) == ('data', 'expert')
  assert replica_groups.axes(tuple(range(8)), mesh) == (
    'data',
    'expert',
    'tensor',
  )


LOOP = """
%body (a: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %a = (s32[], f32[16,8]{1,0}) parameter(0)
  %x = f32[16,8]{1,0} get-tuple-element(%a), index=1
  ROOT %y = f32[16,8]{1,0} all-reduce(%x), replica_groups=[2,4]<=[8]
}

%condition (a: (s32[], f32[16,8])) -> pred[] {
  %n = s32[]{:T(128)} constant(12), metadata={op_name="while"}
  %a = (s32[]{:T(128)}, /*index=1*/f32[16,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%a), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}
"""


def test_loops_repeat_what_is_in_them() -> None:
  line = '%w = (s32[], f32[16,8]) while(%p), condition=%condition, body=%body'
  twelve = [Collective('all-reduce', 768, FOUR, 12)]
  assert collectives(program(line, before=LOOP)) == twelve
  stated = line + ', backend_config={"known_trip_count":{"n":"5"}}'
  [five] = collectives(program(stated, before=LOOP))
  assert five.count == 5 and five.total_bytes == 5 * 768
  unknown = LOOP.replace('constant(12)', 'parameter(1)')
  [once] = collectives(program(line, before=unknown))
  assert once.count == 1 and once.in_unknown_loop


def test_one_branch_of_a_conditional_counts() -> None:
  before = ''.join(
    f'%{name} (q: f32[{rows},8]) -> f32[{4 * rows},8] {{\n'
    f'  %q = f32[{rows},8] parameter(0)\n'
    f'  ROOT %g = f32[{4 * rows},8] all-gather(%q), {GROUPS}\n}}\n\n'
    for name, rows in (('small', 1), ('large', 10))
  )
  line = (
    '%c = f32[4,8] conditional(%p, %p, %p),'
    ' branch_computations={%large, %small}'
  )
  made = program(line, before=before)
  assert total_bytes(collectives(made)) == 3 * 320
  assert total_bytes(collectives(made, choose=min)) == 3 * 32


def fused(name: str, result: str, config: str = '') -> str:
  return (
    f'%{name} (q: f32[16,8]) -> f32[64,8] {{\n'
    '  %q = f32[16,8] parameter(0)\n'
    f'  %g = f32[16,8] all-reduce(%q), {GROUPS}, backend_config={{{config}}}\n'
    f'  ROOT %r = {result}\n}}\n\n'
  )


def test_a_collective_across_fusions_counts_once() -> None:
  config = '"async_collective_fusion_config":{"flag_start":"-1"}'
  start = '(f32[8]) custom-call(%g), custom_call_target="AsyncCollectiveStart"'
  goes_on = '(f32[8]) tuple(%g)'
  done = 'f32[8] custom-call(%g), custom_call_target="AsyncCollectiveDone"'
  parts = {'begin': start, 'middle': goes_on, 'end': done}
  made = program(
    *(
      f'%{name}.1 = f32[8] fusion(%p), kind=kCustom, calls=%{name}'
      for name in parts
    ),
    before=''.join(fused(*part, config) for part in parts.items()),
  )
  assert collectives(made) == [Collective('all-reduce', 768, FOUR, 1)]


def test_a_fused_sum_of_which_a_slice_is_kept_is_a_reduce_scatter() -> None:
  slice_ = 'f32[4,8] dynamic-slice(%g, %q), dynamic_slice_sizes={4,8}'
  line = '%s = f32[4,8] fusion(%p), kind=kCustom, calls=%scatter'
  made = program(line, before=fused('scatter', slice_))
  assert collectives(made) == [Collective('reduce-scatter', 384, FOUR, 1)]
  called = program(
    '%s = f32[4,8] call(%p), to_apply=%scatter', before=fused('scatter', slice_)
  )
  assert collectives(called)[0].kind == 'all-reduce'


@pytest.mark.parametrize(
  'second, kind, sent',
  [('dynamic-slice', 'reduce-scatter', 768), ('negate', 'all-reduce', 1536)],
)
def test_a_fused_sum_of_two_of_which_slices_are_kept(
  second: str, kind: str, sent: int
) -> None:
  before = (
    '%scatter (q: f32[16,8], r: f32[16,8]) -> (f32[4,8], f32[4,8]) {\n'
    '  %q = f32[16,8] parameter(0)\n'
    '  %r = f32[16,8] parameter(1)\n'
    f'  %g = (f32[16,8], f32[16,8]) all-reduce(%q, %r), {GROUPS}\n'
    '  %g0 = f32[16,8] get-tuple-element(%g), index=0\n'
    '  %g1 = f32[16,8] get-tuple-element(%g), index=1\n'
    '  %s0 = f32[4,8] dynamic-slice(%g0), dynamic_slice_sizes={4,8}\n'
    f'  %s1 = f32[4,8] {second}(%g1), dynamic_slice_sizes={{4,8}}\n'
    '  ROOT %t = (f32[4,8], f32[4,8]) tuple(%s0, %s1)\n}\n\n'
  )
  line = '%s = (f32[4,8], f32[4,8]) fusion(%p, %p), calls=%scatter'
  made = program(line, before=before)
  assert collectives(made) == [Collective(kind, sent, FOUR, 1)]


def test_a_fused_sum_that_is_the_result_is_whole() -> None:
  before = (
    '%sum (q: f32[16,8]) -> f32[16,8] {\n'
    '  %q = f32[16,8] parameter(0)\n'
    f'  ROOT %g = f32[16,8] all-reduce(%q), {GROUPS}\n}}\n\n'
  )
  made = program('%s = f32[16,8] fusion(%p), calls=%sum', before=before)
  assert collectives(made) == [Collective('all-reduce', 768, FOUR, 1)]


def test_text_that_is_no_program() -> None:
  with pytest.raises(ValueError, match='no ENTRY'):
    collectives('HloModule empty')


def test_a_real_program_on_eight_devices() -> None:
  """Four steps of a scan and one branch of two, on a mesh of 2 x 4."""
  mesh = jax.make_mesh(
    (2, 4), ('data', 'expert'), axis_types=(AxisType.Auto,) * 2
  )
  sharded = P('data', 'expert')

  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=sharded, out_specs=sharded
  )
  def step(x: jax.Array) -> jax.Array:  # of 16 x 32 float32 on each device
    def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
      rows = jax.lax.all_gather(x, 'expert', axis=0, tiled=True)
      rows = jnp.sin(rows)
      x = jax.lax.psum_scatter(rows, 'expert', scatter_dimension=0, tiled=True)
      return jax.lax.all_to_all(x, 'expert', 0, 0, tiled=True), None

    x, _ = jax.lax.scan(layer, x, length=4)
    large = jax.lax.pmax(x.max(), ('data', 'expert')) > 1
    return jax.lax.cond(
      large,
      lambda x: jax.lax.ppermute(x, 'data', [(0, 1), (1, 0)]),
      lambda x: x * jax.lax.psum(x[0, 0], 'data'),
      x,
    )

  x = jax.ShapeDtypeStruct((32, 128), jnp.float32)
  found = collectives(jax.jit(step).lower(x).compile().as_text())
  axes = {'data': 2, 'expert': 4}
  sent = {
    (each.kind, replica_groups.axes(each.group, axes)): each.total_bytes
    for each in found
  }
  block = 16 * 32 * 4
  assert sent == {
    ('all-gather', ('expert',)): 4 * 3 * block,
    ('reduce-scatter', ('expert',)): 4 * 3 * block,
    ('all-to-all', ('expert',)): 4 * block * 3 // 4,
    ('collective-permute', ('data',)): block,
    ('all-reduce', ('data', 'expert')): 2 * 4 * 7 // 8,
  }
