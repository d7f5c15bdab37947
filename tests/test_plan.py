"""Plans: published sizes, operations counted by hand, bytes per device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from configs import cartesian_moe
from moe_jax import plan
from moe_jax.errors import UserError

ROOT = Path(__file__).parents[1]
BYTES = 257  # V of the byte tokenizer


@pytest.mark.parametrize(
  'names, total, active',
  [  # CartesianMoE (arXiv 2410.16077), in millions
    ('base', 842.0, 247.5),
    ('base,smoe_share', 842.0, 247.4),
    ('base,no_shared', 799.6, 205.0),
    ('base,dense', 162.4, 162.4),
    ('large', 2884.6, 770.7),
    ('large,smoe_share', 2884.4, 770.5),
    ('large,no_shared', 2733.6, 619.6),
    ('large,dense', 468.2, 468.2),
  ],
)
def test_published_sizes(names: str, total: float, active: float) -> None:
  parameters = plan.make(cartesian_moe.get_config(names), 1)['parameters']
  assert parameters['total'] / 1e6 == pytest.approx(total, abs=0.15)
  assert parameters['active'] / 1e6 == pytest.approx(active, abs=0.15)


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
  assert plan.make(config, 1)['flops_per_token'] == 6 * (weights + positions)


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
  assert '2 x (moe)' in text and 'KiB per device' in text


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
  assert told['parameters'].keys() == {'total', 'active', 'router'}
  assert told['strategy']['mesh']['data'] == 2
