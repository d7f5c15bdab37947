"""Plans: what they tell, as a table and as JSON, and bytes of the state."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax import cli
from moe_jax.config import saved
from moe_jax.errors import UserError
from moe_jax.planning import plan
from tests.helpers import tiny, vocabularies

ROOT = Path(__file__).parents[1]
BYTES = 257  # V of the byte tokenizer


@pytest.mark.slow
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


def test_a_given_vocabulary_reads_no_data() -> None:
  config = tiny.config(
    model__vocab_size=61, data__tokenizer='words', data__dir='/nowhere'
  )
  given, bytes_ = (
    plan.make(config, 1)['parameters']['total']
    for config in (config, tiny.config())
  )
  assert bytes_ - given == 2 * 32 * (BYTES - 61)


@pytest.mark.parametrize('size_now', [0, 97])
def test_a_run_is_planned_with_the_tokenizer_that_it_kept(
  size_now: int, tmp_path: Path
) -> None:
  """Its file is gone, or has become another one."""
  named, workdir = tmp_path / 'named.json', tmp_path / 'run'
  config = tiny.config(data__tokenizer=vocabularies.of_size(named, 61))
  workdir.mkdir()
  shutil.move(named, workdir / 'tokenizer.json')
  (workdir / 'config.json').write_text(saved.to_json(config))
  if size_now:
    vocabularies.of_size(named, size_now)
  read, _ = cli.parse(['plan', f'--workdir={workdir}'], workdir=False)
  assert plan.make(read, 1)['vocabulary']['ids'] == 61


def test_strategy_is_resolved() -> None:
  config = tiny.config(
    model__num_layers=5, model__dtype='auto', moe__every=2, mesh__expert=4
  )
  assert plan.make(config, 8)['strategy'] == {
    'layers': {'prefix': ['moe'], 'period': ['dense', 'moe'], 'repeats': 2},
    'mesh': {'data': 2, 'fsdp': 1, 'expert': 4, 'context': 1, 'tensor': 1},
    'dispatch': 'dropless',
    'expert_parallelism': 'all_to_all',
    # 3 others; 16 tokens of 32 float32 and 2 assignments; rooms of 16 rows,
    # and of all 8 experts how many there are.
    'exchange_bytes': {
      'gather': 3 * 16 * (2 * 128 + 2 * 8),
      'all_to_all': 3 * (16 * 2 * 128 + 4 * 8),
      'ragged': 3 / 4 * 32 * 2 * 128,
    },
    'score': 'linear',
    'recurrent': 'none',
    'selection': 'top_k 2 of 8',
    'weights': 'softmax',
    'attention': 'blocks',
    'grouped_matmul': 'blocks',
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
  # What `auto` came to.
  assert {'attention   blocks', 'matmul      blocks of experts'} <= {
    *text.splitlines()
  }
  assert '2 x (moe)' in text and 'MiB per device' in text
  assert 'idle' not in rows
  config = tiny.config(
    model__idle_parameters=1000, **tiny.MODELS['rmoe'], router__passing='none'
  )
  text = plan.table(plan.make(config, 1))
  assert '2,000 counted, never built' in text
  assert 'projector layerwise, passing none' in text


@pytest.mark.slow
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


@pytest.mark.slow
def test_program_compiles_for_tpus_that_are_not_here() -> None:
  """On stdout one JSON object, on stderr nothing: libtpu is quiet."""
  sizes = {
    'model.num_layers': 1,
    'model.hidden_size': 32,
    'model.ffn_width': 48,
    'moe.expert_width': 24,
    'data.seq_len': 16,
    'mesh.expert': 2,
  }
  environment = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(('TPU_', 'JAX_', 'ALLOW_MULTIPLE_LIBTPU'))
  }
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'moe_jax.plan',
      '--config=configs/base.py',
      *(f'--config.{key}={value}' for key, value in sizes.items()),
      '--compile',
      '--topology=v5e:2x2',
      '--json',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
    env=environment,
  )
  told = json.loads(done.stdout)
  assert told['strategy']['platform'] == 'tpu' and not done.stderr
  assert told['compiled']['fits'] and told['compiled']['num_devices'] == 4
