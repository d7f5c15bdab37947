"""Plans: published sizes, operations counted by hand, bytes per device."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import published
import pytest
import tiny
from ml_collections import ConfigDict

from configs import cartesian_moe, rmoe
from moe_jax import plan
from moe_jax.distributed import mesh as mesh_lib
from moe_jax.errors import UserError
from moe_jax.model import sizes
from moe_jax.training import state
from moe_jax.training.step import make_train_step

ROOT = Path(__file__).parents[1]
BYTES = 257  # V of the byte tokenizer


def count(config: ConfigDict) -> sizes.Parameters:
  params = plan.shapes(config).abstract['params']
  return sizes.count_parameters(config, params)


@pytest.mark.parametrize('names', published.CARTESIAN)
def test_published_sizes_of_cartesian_moe(names: str) -> None:
  config = cartesian_moe.get_config(names)
  total, active = published.CARTESIAN[names]
  counted = count(config)
  assert counted.total / 1e6 == pytest.approx(total, abs=0.15)
  if active:
    assert counted.active / 1e6 == pytest.approx(active, abs=0.15)


@pytest.mark.parametrize('names', published.RMOE)
def test_published_sizes_of_rmoe(names: str) -> None:
  config = rmoe.get_config(names)
  config.model.vocab_size = published.ENWIK8_SYMBOLS
  assert f'{count(config).total / 1e6:.2f}' == published.RMOE[names]


def test_published_sizes_in_billions() -> None:
  counted = count(cartesian_moe.get_config('7b'))
  found = round(counted.total / 1e9, 2), round(counted.active / 1e9, 2)
  assert found == published.SEVEN_B
  counted = count(rmoe.get_config('pretrain_15b'))
  assert (round(counted.total / 1e9), f'{counted.active / 1e9:.1f}') == (
    15,
    '2.7',
  )


def test_flops_of_the_recurrent_cartesian_model() -> None:
  config = tiny.config(**tiny.MODELS['cartesian rmoe'])
  attention = 4 * 32 * 32  # query, key, value and output, 4 heads of 8
  experts = 2 * 3 * 32 * 12  # top-2 of half of width 24, three matrices
  router = 32 * 16 + 16 * 8  # projector and score
  cell = 2 * 3 * 16 * 16  # input and state, three gates: once a sub-layer
  weights = 2 * (attention + 2 * (experts + router + cell)) + 32 * BYTES
  # 16 positions see 1 to 16 of them, 8.5 on average; twice in each layer a
  # vector of 32 meets each. A multiplication and an addition, and twice as
  # much backward.
  positions = 2 * 2 * 32 * 8.5
  made = plan.make(config, 1)
  assert made['flops_per_token'] == 6 * (weights + positions)
  assert made['flops_per_token_forward'] == 2 * (weights + positions)


def test_flops_of_a_dense_model() -> None:
  for tied in (False, True):  # a tied embedding is still the head
    config = tiny.config(moe__num_experts=0, model__tie_embeddings=tied)
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 48) + 32 * BYTES
    flops = plan.make(config, 1)['flops_per_token']
    assert flops == 6 * (weights + 2 * 2 * 32 * 8.5)


def test_parameters_of_the_router() -> None:
  config = tiny.config(**tiny.MODELS['rmoe'])
  cell = 2 * (3 * 16 * 16 + 3 * 16)
  expected = cell + 2 * (32 * 16 + 16 * 8)
  assert plan.make(config, 1)['parameters']['router'] == expected


def test_memory_on_one_device_and_on_many() -> None:
  config = tiny.config()
  one = plan.make(config, 1)
  total = one['parameters']['total']
  parts = one['memory_parts_per_device']
  assert parts['parameters'] == parts['gradients'] == 4 * total  # float32
  # Two moments; the optimizer counts its steps besides.
  assert 0 <= parts['optimizer'] - 8 * total < 64
  assert one['memory_bytes_per_device'] == sum(parts.values())

  config.mesh.expert = 4
  four = plan.make(config, 4)['memory_parts_per_device']
  experts = 4 * 2 * 8 * 3 * 32 * 24  # bytes: layers, experts, matrices
  assert four['parameters'] == parts['parameters'] - experts * 3 // 4


# Hidden size 32, state size 16, 8 experts, two layers: of each layer's router
# the parameters, and the multiplications of one token.
ROUTERS = {
  'mlp': (32 * 6 + 6 + 6 * 8 + 8, 32 * 6 + 6 * 8),
  'cosine': (8 * 32 + 1, 8 * 32),
  'xmoe': (32 * 4 + 8 * 4 + 1, 32 * 4 + 8 * 4),
  # The network works once a step; a token meets only the weights it makes.
  'hyper': (32 + 32 * 6 + 6 + (6 + 1) * (32 * 8 + 8), 32 * 8),
  'random': (32 * 8, 32 * 8),
  'hash': (0, 0),  # the table is no parameter, and looked up
}


@pytest.mark.parametrize('score', ROUTERS)
def test_routers_are_counted_by_hand(score: str) -> None:
  config = tiny.config(
    **{
      'router.score': score,
      'router.mlp_width': 6,
      'router.reduced_size': 4,
      'router.bias': score in ('mlp', 'hyper'),
    }
  )
  parameters, products = ROUTERS[score]
  linear = count(tiny.config())
  assert count(config).router == 2 * parameters
  assert count(config).total - linear.total == 2 * (parameters - 32 * 8)

  def flops(config: ConfigDict) -> tuple[int, int]:
    params = plan.shapes(config).abstract['params']
    return sizes.flops_per_token_forward(config, params), sizes.flops_per_token(
      config, params
    )

  (forward, training), (linear, linear_training) = (
    flops(config),
    flops(tiny.config()),
  )
  assert forward - linear == 2 * 2 * (products - 32 * 8)
  # A fixed matrix has no gradient of its own, only passes one on.
  times = 2 * 2 if score == 'random' else 3 * 2
  assert training - linear_training == 2 * (times * products - 6 * 32 * 8)


@pytest.mark.parametrize('cell, gates', [('rnn', 1), ('gru', 3), ('lstm', 4)])
@pytest.mark.parametrize('projector', ['layerwise', 'shared'])
def test_cells_are_counted_by_hand(
  cell: str, gates: int, projector: str
) -> None:
  config = tiny.config(
    **{'router.recurrent': cell, 'router.projector': projector}
  )
  width, projectors = {'layerwise': (16, 2 * 32 * 16), 'shared': (32, 0)}[
    projector
  ]
  weights = gates * (width * 16 + 16 * 16)
  scores = 2 * 16 * 8
  expected = weights + gates * 2 * 16 + projectors + scores
  assert count(config).router == expected
  params = plan.shapes(config).abstract['params']
  linear = plan.shapes(tiny.config()).abstract['params']
  more = sizes.flops_per_token_forward(config, params) - (
    sizes.flops_per_token_forward(tiny.config(), linear)
  )
  # One cell, used in both layers.
  assert more == 2 * (2 * weights + projectors + scores - 2 * 32 * 8)


def test_idle_parameters_are_added_to_the_total() -> None:
  built, counted = (
    count(tiny.config(model__idle_parameters=idle)) for idle in (0, 1000)
  )
  assert counted.idle == 1000 and counted.total == built.total + 1000
  assert (counted.active, counted.router) == (built.active, built.router)


def test_top_p_counts_every_expert_as_active() -> None:
  counted = count(tiny.config(**{'router.selection': 'top_p'}))
  assert counted.active == counted.total


def test_a_given_vocabulary_reads_no_data() -> None:
  config = tiny.config(
    model__vocab_size=61, data__tokenizer='words', data__dir='/nowhere'
  )
  assert count(config).total == count(tiny.config()).total - 2 * 32 * (
    BYTES - 61
  )


SPAN = {
  'model.norm': 'layer',
  'model.norm_place': 'post',
  'model.positions': 'span',
  'model.span': 128,
  'model.activation': 'relu',
  'model.dropout': 0.1,
  'data.order': 'contiguous',
}
LARGER = {
  'model.hidden_size': 64,
  'model.ffn_width': 128,
  'model.num_layers': 4,
  'moe.expert_width': 64,
  'router.state_size': 32,
  'data.seq_len': 64,
  'train.batch_size': 16,
}


@pytest.mark.parametrize(
  'overrides, axes',
  [
    ({'router.recurrent': 'gru', 'model.remat': 'full'}, {}),
    pytest.param({}, {'expert': 4}, marks=pytest.mark.slow),
    pytest.param({'moe.num_experts': 0}, {}, marks=pytest.mark.slow),
    pytest.param({'train.accumulation': 4}, {}, marks=pytest.mark.slow),
    pytest.param(SPAN, {'data': 2, 'expert': 2}, marks=pytest.mark.slow),
    pytest.param(
      {'router.selection': 'top_p', 'moe.renormalize': False},
      {},
      marks=pytest.mark.slow,
    ),
    pytest.param({'moe.dispatch': 'capacity'}, {}, marks=pytest.mark.slow),
    pytest.param(
      {'moe.dispatch': 'capacity'}, {'expert': 4}, marks=pytest.mark.slow
    ),
    pytest.param(
      {'moe.factors': 2, 'model.remat': 'dots'}, {}, marks=pytest.mark.slow
    ),
    pytest.param(
      {}, {'fsdp': 2, 'expert': 2, 'tensor': 2}, marks=pytest.mark.slow
    ),
  ],
)
def test_memory_of_a_step_is_what_the_compiler_says(
  overrides: dict[str, object], axes: dict[str, int]
) -> None:
  """Within a fifth: the compiler shares and copies buffers as it likes."""
  config = tiny.config(**(LARGER | overrides))
  shape = dict.fromkeys(mesh_lib.AXES, 1) | axes
  config.mesh.update(shape)
  num_devices = int(np.prod(list(shape.values())))
  mesh = mesh_lib.make_mesh(shape, jax.devices()[:num_devices])
  compiled = compile_step(state.setup(config, BYTES, mesh)).memory_analysis()

  parts = plan.make(config, num_devices)['memory_parts_per_device']
  kept = sum(map(parts.pop, ('parameters', 'optimizer', 'segments')))
  assert sum(parts.values()) == pytest.approx(
    compiled.temp_size_in_bytes, rel=0.2
  )
  batch = 3 * 4 * config.train.batch_size * config.data.seq_len  # at most
  assert 0 <= compiled.argument_size_in_bytes - kept <= batch + 64


def compile_step(setup: state.Setup) -> jax.stages.Compiled:
  sharding = mesh_lib.batch_sharding(setup.mesh)
  rows = setup.config.train.batch_size, setup.config.data.seq_len
  batch = {
    name: jax.ShapeDtypeStruct(rows, dtype, sharding=sharding)
    for name, dtype in (
      ('inputs', 'int32'),
      ('targets', 'int32'),
      ('mask', 'bool'),
    )
  }
  if 'memory' in setup.abstract:
    batch['fresh'] = jax.ShapeDtypeStruct(rows[:1], 'bool', sharding=sharding)
  return make_train_step(setup).lower(setup.abstract, batch).compile()


def test_a_span_costs_memory_and_operations() -> None:
  config = tiny.config(**(LARGER | SPAN))
  made = plan.make(config, 1)
  # Four layers keep 128 hidden states of 64 numbers for each of 16 rows.
  assert made['memory_parts_per_device']['segments'] == 4 * 16 * 128 * 64 * 4
  assert 'segments 2.00 MiB' in plan.table(made)
  attention = 4 * 64 * 64 + 2 * 64 * 64 * 128 / 64  # memory's keys and values
  experts, router = 2 * 2 * 64 * 64, 64 * 8
  # A query meets the keys of 128 positions and distances, and their values.
  positions = 3 * 128 * 64
  weights = 4 * (attention + experts + router + positions) + 64 * BYTES
  assert made['flops_per_token_forward'] == 2 * weights
  assert made['flops_per_token'] == 6 * weights


def test_memory_grows_with_what_a_device_holds() -> None:
  def parts(num_devices: int = 1, **overrides: object) -> dict[str, int]:
    config = tiny.config(**LARGER, **overrides)
    return plan.make(config, num_devices)['memory_parts_per_device']

  one = parts()
  assert parts(train__accumulation=4)['activations'] * 4 == one['activations']
  assert parts(train__accumulation=4)['gradients'] == 2 * one['gradients']
  # Data parallelism splits all of it; along the expert axis every device holds
  # the rows of its group.
  assert parts(4)['dispatch'] * 4 == one['dispatch']
  assert parts(4, mesh__expert=4)['dispatch'] == pytest.approx(
    one['dispatch'], rel=0.02
  )
  full = parts(model__remat='full')
  assert full['activations'] < one['activations'] / 2
  # All layers' dispatch and the working set's; without it the latter alone.
  assert full['dispatch'] * 5 == one['dispatch']
  halves = parts(model__dtype='bfloat16')
  assert halves['activations'] < one['activations']
  assert halves['weight_copies'] > 0 == one['weight_copies']


def test_strategy_is_resolved() -> None:
  config = tiny.config(
    model__num_layers=5, model__dtype='auto', moe__every=2, mesh__expert=4
  )
  assert plan.make(config, 8)['strategy'] == {
    'layers': {'prefix': ['moe'], 'period': ['dense', 'moe'], 'repeats': 2},
    'mesh': {'data': 2, 'fsdp': 1, 'expert': 4, 'tensor': 1},
    'dispatch': 'dropless',
    'expert_parallelism': 'gather',
    'score': 'linear',
    'recurrent': 'none',
    'selection': 'top_k 2 of 8',
    'weights': 'softmax',
    'platform': 'cpu',
    'dtype': 'float32',
    'remat': 'none',
  }


def test_mistakes_are_refused() -> None:
  with pytest.raises(UserError, match='--devices = 0'):
    plan.make(tiny.config(), 0)
  with pytest.raises(UserError, match='mesh.expert = 3'):
    plan.make(tiny.config(mesh__expert=3), 3)


def test_table_names_everything() -> None:
  text = plan.table(plan.make(tiny.config(), 1))
  rows = {line.split()[0] for line in text.splitlines()}
  assert {'parameters', 'active', 'compute', 'memory', 'layers'} <= rows
  assert '2 x (moe)' in text and 'MiB per device' in text
  assert 'idle' not in rows
  config = tiny.config(
    model__idle_parameters=1000, **tiny.MODELS['rmoe'], router__passing='none'
  )
  text = plan.table(plan.make(config, 1))
  assert '1,000 counted, never built' in text
  assert 'projector layerwise, passing none' in text


def test_program_prints_one_json_object() -> None:
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'moe_jax.plan',
      '--config=configs/cartesian_moe.py:large',
      '--config.mesh.expert=8',
      '--devices=16',
      '--json',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  told = json.loads(done.stdout)
  assert told.keys() >= {
    'parameters',
    'flops_per_token',
    'memory_bytes_per_device',
    'strategy',
  }
  assert told['parameters'].keys() == {
    'total',
    'active',
    'router',
    'idle',
  }
  assert told['strategy']['mesh']['data'] == 2
