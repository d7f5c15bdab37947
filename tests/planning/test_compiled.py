"""What compilers say of the training step, for CPUs and for TPUs."""

import contextlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.errors import UserError
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.planning import (
  abstract_setup,
  batch_search,
  compiled,
  plan,
  topologies,
)
from tests.helpers import tiny

SLICE = 'v5e:2x2'


def test_data_parallelism_sends_every_gradient_once_around() -> None:
  """And little else: the norm, the metrics."""
  config = tiny.config(model__num_layers=1, moe__num_experts=0, mesh__data=8)
  told = compiled.compile_and_report(config, topologies.here())
  parameters = plan.make(config, 8)['parameters']['total']
  gradients = 2 * 7 / 8 * 4 * parameters
  assert gradients <= told['sent_bytes'] <= 1.02 * gradients
  assert told['sent_bytes_most'] == told['sent_bytes']
  assert {tuple(each['axes']) for each in told['collectives']} == {('data',)}
  kinds = dict(told['memory_bytes'])
  total, aliased = kinds.pop('total'), kinds.pop('aliased')
  assert total == sum(kinds.values()) - aliased
  # Parameters and two moments, donated; the batch is not.
  assert aliased == pytest.approx(12 * parameters, abs=100)
  assert told['fits'] is told['available_bytes'] is None
  assert told['cycles'] is told['roofline'] is None
  assert {each['beside_seconds'] for each in told['collectives']} == {None}


@pytest.mark.slow
def test_a_tpu_program() -> None:
  config = tiny.config(
    model__num_layers=1, model__dtype='auto', mesh__data=1, mesh__fsdp=4
  )
  target = topologies.target(SLICE)
  told = compiled.compile_and_report(config, target)
  assert told['device'] == 'TPU v5 lite' and told['num_devices'] == 4
  assert told['fits'] and told['spare_bytes'] > 15 << 30
  assert told['flops'] > 0 and told['matmul_flops'] is None
  cycles = told['cycles']
  assert cycles['fusion_seconds'] == cycles['fusions'] / 1.5e9
  assert cycles['fusions_most'] >= cycles['fusions'] > 0
  assert 0 < cycles['mfu_bound'] < 1
  axes = {axis for each in told['collectives'] for axis in each['axes']}
  assert axes == {'fsdp'}

  made = plan.make(config, 4, target.devices[0])
  assert made['strategy']['platform'] == 'tpu'
  assert made['strategy']['dtype'] == 'bfloat16'
  text = plan.table(made | {'compiled': told})
  assert 'for 4 x TPU v5 lite' in text and 'to spare' in text
  assert 'as the compiler expects' in text and 'MFU at most' in text
  roof = told['roofline']
  assert 0 < roof['mfu_bound'] < 1
  assert {'attention', 'grouped matmul', 'matmul'} <= {*roof['kinds']}


@pytest.mark.slow
def test_a_gpu_program() -> None:
  """Its kernels, and none of the ways in which it was wasteful."""
  try:
    target = topologies.target('h100:1x8')
  except UserError as error:
    pytest.skip(str(error))
  config = tiny.config(
    model__dtype='auto',
    model__vocab_size=512,
    router__recurrent='gru',
    data__seq_len=2048,  # so that experts have more rows than room behind them
    mesh__data=4,
    mesh__expert=2,
  )
  setup = abstract_setup.make(config, target.devices)
  step, seconds = compiled.train_step(setup)
  text = step.as_text()
  assert '"__cudnn$fmhaSoftmaxBackward"' in text
  assert '"__gpu$xla.gpu.triton"' in text and 'ragged-dot' not in text
  # No layer's weights are transposed with those of all others, nor is anything
  # computed twice.
  layers = config.model.num_layers
  assert not re.search(rf'wrapped_transpose\S* = f32\[{layers},', text)
  assert '.remat' not in text
  # Rows get their room where they are made, by no kernel of its own.
  assert '(_pad)/pad' in text and 'wrapped_pad' not in text
  # Routers multiply on tensor cores.
  assert 'operand_precision={highest' not in text
  assert 'algorithm=dot_bf16_bf16_f32_x3' in text

  told = compiled.report(setup, step, target) | {'compile_seconds': seconds}
  assert told['device'] == 'NVIDIA H100 80GB HBM3' and told['num_devices'] == 8
  assert told['fits'] and told['spare_bytes'] > 50 << 30
  axes = {axis for each in told['collectives'] for axis in each['axes']}
  assert axes == {'data', 'expert'}
  # Something is computed beside some of them, and nothing beside others.
  open_ = {each['beside_seconds'] > 0 for each in told['collectives']}
  assert open_ == {True, False}
  made = plan.make(config, 8, target.devices[0])
  assert made['strategy']['attention'] == 'cudnn'
  table = plan.table(made | {'compiled': told})
  assert 'for 8 x NVIDIA H100' in table and 'FLOPs in matmuls' in table
  assert "cuDNN's workspace" in table
  assert 'of travel at 80% of NVLink' in table
  assert {'attention', 'grouped matmul', 'matmul'} <= {
    *told['roofline']['kinds']
  }
  assert 0 < told['roofline']['mfu_bound'] < 1 and 'MFU at most' in table
  # Little more than the model asks for, with rows of both devices for the
  # experts of each; dense experts would be many times that.
  asked = made['flops_per_token'] * made['tokens_per_step'] / 8
  assert asked <= told['matmul_flops'] <= 1.42 * asked
  moved, held = told['roofline'], told['memory_bytes']
  assert moved['num_bytes'] <= 6.15 * held['total']
  # Much, beside a model of 32 units.
  parts = moved['parts']
  assert parts['router']['seconds'] <= 0.18 * moved['seconds']
  # The state once there and back; gradients twice, for their norm and for it.
  assert parts['optimizer']['num_bytes'] <= 2.85 * held['arguments']


@pytest.mark.parametrize(
  'topology, dtype, dispatch',
  [
    pytest.param(None, 'float32', 'capacity', marks=pytest.mark.slow),
    pytest.param('v5e:2x4', 'bfloat16', 'dropless', marks=pytest.mark.slow),
  ],
)
def test_gradients_along_fsdp_are_scattered(
  topology: str | None, dtype: str, dispatch: str
) -> None:
  """Those of the experts and of both embeddings: no device has them whole."""
  config = tiny.config(
    model__num_layers=1,
    model__dtype=dtype,
    model__vocab_size=2048,
    model__hidden_size=512,
    model__head_dim=16,
    moe__expert_width=256,
    moe__dispatch=dispatch,
    mesh__data=1,
    mesh__fsdp=2,
    mesh__expert=4,
  )
  target = topologies.target(topology) if topology else topologies.here()
  told = compiled.compile_and_report(config, target)
  sent = dict.fromkeys(('reduce-scatter', 'all-reduce'), 0)
  for each in told['collectives']:
    if 'fsdp' in each['axes'] and each['kind'] in sent:
      sent[each['kind']] += each['total_bytes']
  embedding, experts = 2048 * 512, 8 // 4 * 3 * 512 * 256
  bytes_ = jnp.dtype(dtype).itemsize
  scattered = bytes_ * (embedding + experts) + 4 * embedding
  # A compiler may scatter what it sums of its own accord, too.
  assert sent['reduce-scatter'] >= 1 / 2 * scattered
  parameters = plan.make(config, 8)['parameters']['total']
  others = parameters - 2 * embedding - 4 * experts
  # Around all eight devices at most, and some metrics.
  assert sent['all-reduce'] <= 2 * 7 / 8 * 4 * others + 4096


@pytest.mark.slow
@pytest.mark.parametrize(
  'overrides, slices',
  [
    ({'moe.dispatch': 'capacity', 'mesh.expert': 4}, 1),
    ({'moe.factors': 2, 'mesh.expert': 4}, 1),
    (
      {'moe.factors': 2, 'router.recurrent': 'gru', 'mesh.expert': 2},
      1,
    ),
    ({'mesh.expert': 4, 'moe.num_experts': 4}, 1),  # one expert per device
    ({'router.recurrent': 'gru', 'mesh.tensor': 2, 'mesh.expert': 2}, 1),
    ({'moe.factors': 2, 'mesh.fsdp': 4, 'model.remat': 'dots'}, 1),
    ({'mesh.fsdp': 4, 'train.batch_size': 16}, 2),
    ({'loss.bias_rate': 0.01, 'train.accumulation': 2}, 1),
  ],
)
def test_tpu_programs_of_all_kinds(
  overrides: dict[str, object], slices: int
) -> None:
  config = tiny.config(**{'model.dtype': 'auto'} | overrides)
  told = compiled.compile_and_report(config, topologies.target(SLICE, slices))
  assert told['fits'] and told['num_devices'] == 4 * slices
  assert all(each['axes'] for each in told['collectives'])


@pytest.mark.slow
@pytest.mark.parametrize(
  'topology, ragged', [('v5e:4x4', True), ('v5e:4x8', False), ('v6e:4x8', True)]
)
def test_ragged_exchanges_where_they_compile(
  topology: str, ragged: bool
) -> None:
  """By choice of the plan; and in fact, by the compiler's refusal."""
  devices = topologies.target(topology).devices
  # One assignment per token sends the fewest bytes by the ragged exchange.
  config = tiny.config(
    moe__top_k=1, mesh__data=-1, mesh__expert=4, train__batch_size=32
  )
  strategy = plan.make(config, len(devices), devices[0])['strategy']
  assert (strategy['expert_parallelism'] == 'ragged') == ragged
  config.moe.exchange = 'ragged'
  with contextlib.ExitStack() as stack:
    if not ragged:
      refusal = "moe.exchange = 'ragged' does not compile.*'all_to_all'"
      stack.enter_context(pytest.raises(UserError, match=refusal))
    plan.make(config, len(devices), devices[0])

  mesh = Mesh(devices, 'x')
  counts = NamedSharding(mesh, P())
  rows = jax.ShapeDtypeStruct(
    (32 * len(devices), 128), jnp.float32, sharding=NamedSharding(mesh, P('x'))
  )
  ones = jax.ShapeDtypeStruct((len(devices),), jnp.int32, sharding=counts)
  exchange = jax.shard_map(
    lambda x, n: jax.lax.ragged_all_to_all(x, x, n, n, n, n, axis_name='x'),
    mesh=mesh,
    in_specs=(P('x'), P()),
    out_specs=P('x'),
    check_vma=False,
  )
  lowered = jax.jit(exchange).lower(rows, ones)
  if ragged:
    lowered.compile()
  else:
    with pytest.raises(jax.errors.JaxRuntimeError, match='limited ICI'):
      lowered.compile()


@pytest.mark.slow
@pytest.mark.parametrize('exchange', ['gather', 'all_to_all'])
def test_programs_for_slices_with_limited_routing(exchange: str) -> None:
  """No option asks for what their compiler does not do."""
  config = tiny.config(
    model__num_layers=1,
    model__dtype='auto',
    moe__exchange=exchange,
    mesh__data=8,
    mesh__expert=4,
    train__batch_size=32,
  )
  told = compiled.compile_and_report(config, topologies.target('v5e:4x8'))
  kind = {'gather': 'all-gather', 'all_to_all': 'all-to-all'}[exchange]
  assert kind in {each['kind'] for each in told['collectives']}


def test_memory_of_a_chip_is_what_its_compiler_says() -> None:
  """A program of 3 TiB is refused, with both numbers."""
  for name in ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'):
    target = topologies.target(name)
    everywhere = NamedSharding(Mesh(target.devices, 'x'), P())
    shape = jax.ShapeDtypeStruct(
      (1 << 19, 1 << 19), jnp.float32, sharding=everywhere
    )
    lowered = jax.jit(lambda x: jnp.cos(x) @ jnp.sin(x)).lower(shape)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
      lowered.compile()
    refused = compiled.too_large(str(error.value), arguments=1 << 40)
    # Told to two digits; the libtpu of jax 0.12 keeps some MiB for itself.
    known = target.chip.memory_bytes
    close = 1 << 20 if jax.__version_info__ < (0, 12) else 5e-4 * known
    assert refused.available == pytest.approx(known, abs=close)
    assert refused.needed == 3 << 40


@pytest.mark.parametrize(
  'said, needed, available',
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.00G'
      ' of 15.75G hbm. Exceeded hbm capacity by 7.25G.',
      23 << 30,
      63 << 28,
    ),
    (  # Rounded to the same.
      'Used 15.75G of 15.75G hbm. Exceeded hbm capacity by 4.2M.',
      (63 << 28) + round(4.2 * (1 << 20)),
      63 << 28,
    ),
    ('Used 15.75G of 15.75G hbm.', (63 << 28) + 1, 63 << 28),
    (
      'the total memory required for HLO temporaries (512.5M) exceeds available'
      ' HBM (256K).',
      1025 << 19,
      1 << 18,
    ),
  ],
)
def test_refusals_are_understood(
  said: str, needed: int, available: int
) -> None:
  refused = compiled.too_large(said, arguments=0)
  assert (refused.needed, refused.available) == (needed, available)
  assert not batch_search.Trial(
    1, 'none', refused.needed, refused.available
  ).fits


def test_other_failures_are_no_refusals() -> None:
  assert compiled.too_large('INTERNAL: RET_CHECK failure', 0) is None
  said = compiled.failure('INTERNAL:\n RET_CHECK failure ' + 300 * 'x')
  assert 'INTERNAL: RET_CHECK failure x' in said and len(said) == 300


@pytest.mark.parametrize(
  'error',
  [
    'RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory in'
    ' memory space vmem. Scoped allocation with size 21.50M and limit 16.00M',
    'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in'
    ' memory space vmem. Used 16.42M of 16.00M vmem.',
  ],
)
def test_a_kernel_over_its_limit_has_a_remedy(error: str) -> None:
  assert compiled.too_large(error, 0) is None
  assert 'train.batch_size' in compiled.failure(error)


@pytest.mark.parametrize(
  'error',
  ['cuDNN not found.', "INTERNAL: Couldn't find ptxas in the given folders"],
)
def test_a_missing_part_of_cuda_has_a_remedy(error: str) -> None:
  assert "pip install 'moe_jax[gpu-compiler]'" in compiled.failure(error)


@pytest.mark.slow
def test_large_tiles_compile_for_v5e() -> None:
  """libtpu's own limit is too small for the tiles that it chooses here."""
  setup = abstract_setup.make(
    tiny.config(), topologies.target('v5e:1x1').devices
  )
  mesh = setup.mesh
  shapes = [((65536, 3072), 'bfloat16'), ((16, 3072, 768), 'bfloat16')]
  operands = [
    jax.ShapeDtypeStruct(*shape, sharding=mesh_lib.replicated(mesh))
    for shape in (*shapes, ((16,), 'int32'))
  ]

  def loss(
    rows_MD: jax.Array, weight_NDF: jax.Array, sizes_N: jax.Array
  ) -> Any:
    return jax.lax.ragged_dot(rows_MD, weight_NDF, sizes_N).sum()

  step = jax.grad(loss, (0, 1))
  options = mesh_lib.compiler_options(mesh)
  jax.jit(step, compiler_options=options).lower(*operands).compile()
  with pytest.raises(jax.errors.JaxRuntimeError, match='memory space vmem'):
    jax.jit(step).lower(*operands).compile()


@pytest.mark.slow
def test_a_step_that_does_not_fit_says_what_would() -> None:
  config = tiny.config(
    model__num_layers=1, mesh__data=1, mesh__fsdp=4, model__vocab_size=4096
  )
  config.train.batch_size, config.data.seq_len = 4096, 4096
  target = topologies.target(SLICE)
  with pytest.raises(compiled.DoesNotFitError) as error:
    compiled.compile_and_report(config, target)
  refused = error.value
  assert refused.needed > refused.available == target.chip.memory_bytes
  advice = batch_search.advice(config, target, refused)
  batch = int(advice.split('train.batch_size = ')[1].split()[0])
  assert 0 < batch < 4096 and batch % 4 == 0 and '--fit' in advice


def test_flags_that_contradict_each_other() -> None:
  flags = {'json': False, 'fit': False, 'compile': True}
  with pytest.raises(UserError, match='--devices = 3, but here has 8'):
    plan.run(tiny.config(), devices=3, topology=None, slices=1, **flags)
  with pytest.raises(UserError, match='--slices = 2 is of a --topology'):
    plan.run(tiny.config(), devices=None, topology=None, slices=2, **flags)
  flags['compile'] = False
  with pytest.raises(UserError, match='--devices = 0 must be at least 1'):
    plan.run(tiny.config(), devices=0, topology=None, slices=1, **flags)
  with pytest.raises(UserError, match="--topology = '' is not of the form"):
    plan.run(tiny.config(), devices=None, topology='', slices=1, **flags)
  config = tiny.config(mesh__data=2, mesh__fsdp=4, mesh__dcn__data=3)
  with pytest.raises(UserError, match='mesh.dcn'):
    plan.run(config, devices=None, topology=SLICE, slices=2, **flags)
