"""The measurements run and report what they promise; times are not judged."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import (
  analysis,
  checkpoints,
  common,
  compile_depth,
  data,
  exchanges,
  expert_parallel,
  live_routing,
  lm_eval,
  router_cost,
  train_step,
)
from moe_jax.errors import UserError
from moe_jax.training import state as state_lib
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_train_step_reports_a_step_that_trains() -> None:
  config = tiny.config(**tiny.MODELS['cartesian rmoe'])
  row = train_step.measure(config, steps=3, warmup=1)
  tokens = config.train.batch_size * config.data.seq_len
  assert row['tokens_per_second'] == tokens / row['step_seconds']
  assert (
    0 < row['step_seconds_min'] <= row['step_seconds']
    and row['step_seconds'] <= row['step_seconds_max']
  )
  assert row['compile_seconds'] > 0
  assert row['peak_memory_source'] == 'compiler'  # the CPU keeps no count
  state = jax.tree.leaves(state_lib.from_config(config).abstract)
  assert row['peak_memory_bytes'] >= _bytes_of_one_device(state)
  assert np.isfinite(row['loss'])
  assert row['device'] == jax.devices()[0].device_kind
  assert row['versions']['jax'] == jax.__version__
  json.dumps(row)


@pytest.mark.slow
def test_checkpoints_report_what_digests_cost(tmp_path: Path) -> None:
  row = checkpoints.measure(tiny.config(), rounds=1, folder=str(tmp_path))
  state = jax.tree.leaves(state_lib.from_config(tiny.config()).abstract)
  assert row['state_bytes'] == sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in state
  )
  assert row['arrays'] == len(state)
  assert 0 < row['save_blocking_seconds'] < row['save_seconds']
  assert row['restore_seconds'] > 0 and row['digest_share_of_save'] > 0
  assert not list(tmp_path.iterdir())
  json.dumps(row)


def _bytes_of_one_device(leaves: list[jax.ShapeDtypeStruct]) -> int:
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in leaves
  )


def test_random_batches_are_of_the_vocabulary_and_differ() -> None:
  made = state_lib.from_config(tiny.config())
  first, second = common.random_batches(made, 2)
  ids = np.asarray(first['token_ids'])
  assert ids.shape == (8, 16)
  assert ids.min() >= 0 and ids.max() < made.vocab_size == 257
  assert np.any(ids != np.asarray(second['token_ids']))
  assert np.asarray(first['padding_mask']).all()


@pytest.mark.slow
def test_compile_depth_reports_the_ratio() -> None:
  config = tiny.config()
  row = compile_depth.measure(config, depths=(2, 4), repeats=1)
  seconds = row['compile_seconds']
  assert seconds.keys() == {'2', '4'}
  assert row['ratio'] == seconds['4'] / seconds['2']
  assert config.model.num_layers == 2 and config.moe.every == 1  # untouched


@pytest.mark.slow
def test_router_cost_compares_with_the_linear_router() -> None:
  config = tiny.config(**{'router.recurrent': 'rnn', 'router.passing': 'none'})
  row = router_cost.measure(config, steps=3, warmup=1)
  assert row['ratio_min'] <= row['ratio'] <= row['ratio_max']
  assert row['step_seconds'] > 0 and row['linear_step_seconds'] > 0
  assert config.router.recurrent == 'rnn'  # untouched
  json.dumps(row)


def test_the_linear_router_has_no_cost_over_itself() -> None:
  with pytest.raises(UserError, match="router.recurrent = 'none' is what"):
    router_cost.measure(tiny.config(), steps=1, warmup=0)


@pytest.mark.slow
def test_live_routing_compares_rounds_that_log() -> None:
  config = tiny.config(**{'model.num_layers': 1, 'train.log_every': 2})
  row = live_routing.measure(config, rounds=2, warmup=1)
  assert row['ratio_low'] <= row['ratio'] <= row['ratio_high']
  assert 0 < row['write_seconds'] < row['seconds']
  assert 0 < row['write_seconds_without'] < row['seconds_without']
  assert row['router_gradients'] > 0 and row['steps_of_a_round'] == 2
  assert config.train.steps == 20  # untouched
  json.dumps(row)


@pytest.mark.slow
def test_lm_eval_asks_beside_a_split(tmp_path: Path) -> None:
  texts = tmp_path / 'texts'
  texts.mkdir()
  for number in range(40):  # of which some are the validation split
    text = f'{number} bottles of beer on the wall\n' * 9
    (texts / f'{number}.txt').write_text(text)
  data = {'name': 'text_folder', 'path': texts, 'dir': tmp_path / 'made'}
  config = tiny.config(
    **{f'data.{key}': str(value) for key, value in data.items()}
  )
  row = lm_eval.measure(config, requests=9, rounds=1)
  assert row['requests'] == 8 and 8 < row['tokens'] <= 8 * config.data.seq_len
  assert row['ratio'] > 0 and row['tokens_split'] > 0
  json.dumps(row)


def test_a_dense_model_has_no_routing_to_watch() -> None:
  with pytest.raises(UserError, match='moe.num_experts = 0 and'):
    live_routing.measure(tiny.config(moe__num_experts=0), rounds=1, warmup=1)


@pytest.mark.slow
def test_expert_parallel_measures_every_exchange_and_routing() -> None:
  config = tiny.config(**{'moe.buffer_factor': 1.25})
  rows = expert_parallel.measure(config, steps=1, warmup=0)
  cases = {(row['exchange'], row['routing']): row for row in rows}
  exchanges = ('gather', 'all_to_all', 'ragged')
  assert cases.keys() == {
    (name, routing) for name in exchanges for routing in ('balanced', 'skewed')
  }
  for (name, routing), row in cases.items():
    assert row['seconds'] > 0 and row['dropped'] == 0
    # Half of the tokens to one expert: more than its device has room for.
    expected = name != 'gather' and routing == 'skewed'
    assert (row['overflowed'] > 0) == expected
    if not row['emulated']:
      assert row['forward_bytes'] == pytest.approx(
        row['estimated_bytes'], rel=0.02
      )
  gather, blocks = cases['gather', 'balanced'], cases['all_to_all', 'balanced']
  assert blocks['forward_bytes'] < gather['forward_bytes']
  assert blocks['rare_bytes'] > 0 == gather['rare_bytes']
  assert config.mesh.expert == 1  # untouched
  json.dumps(rows)


@pytest.mark.slow
def test_the_plan_counts_the_assignments_of_top_p_that_travel() -> None:
  config = tiny.config(**{'router.selection': 'top_p'})
  for row in expert_parallel.measure(config, steps=1, warmup=0):
    if not row['emulated']:
      estimate = row['estimated_bytes']
      assert row['forward_bytes'] == pytest.approx(estimate, rel=0.02)


def test_exchanges_run_the_grouped_matmul_of_the_config() -> None:
  config = tiny.config(**{'moe.grouped_matmul': 'mosaic'})
  with pytest.raises(UserError, match="moe.grouped_matmul = 'mosaic'"):
    exchanges.Layer(config)


def test_one_device_has_no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  with pytest.raises(UserError, match='there is one cpu device.*--devices=8'):
    exchanges.Layer(tiny.config())


def test_numbers_of_steps_are_checked() -> None:
  with pytest.raises(UserError, match='--steps = 0'):
    train_step.measure(tiny.config(), steps=0, warmup=1)
  with pytest.raises(UserError, match='--repeats = 0'):
    compile_depth.measure(tiny.config(), depths=(2, 4), repeats=0)
  with pytest.raises(UserError, match='--steps = 0'):
    expert_parallel.measure(tiny.config(), steps=0, warmup=0)
  with pytest.raises(UserError, match='--warmup = -1'):
    router_cost.measure(tiny.config(), steps=1, warmup=-1)


@pytest.mark.slow
@pytest.mark.parametrize('program', ['train_step', 'compile_depth'])
def test_programs_print_one_json_line(program: str) -> None:
  sizes = {
    'model.hidden_size': 32,
    'model.ffn_width': 48,
    'moe.expert_width': 24,
    'data.seq_len': 16,
    'train.batch_size': 8,
  }
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      f'benchmarks.{program}',
      '--config=configs/base.py',
      '--json',
      '--repeats=1' if program == 'compile_depth' else '--steps=2',
      *(f'--config.{key}={value}' for key, value in sizes.items()),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  (line,) = done.stdout.splitlines()
  assert json.loads(line)['benchmark'] == program


@pytest.mark.slow
def test_analysis_reports_seconds_and_memory() -> None:
  row = analysis.measure(routers=2, experts=4, chosen=2, tokens=10_000)
  assert row['tokens'] == 10_000 and row['routers'] == 2
  assert row['seconds'] > 0 and row['processor_seconds'] > 0
  assert row['peak_resident_bytes'] >= row['before_bytes'] > 0
  json.dumps(row)


def test_data_reports_every_speed(tmp_path: Path) -> None:
  config = tiny.config(**{'data.name': 'text_folder'})
  (tmp_path / 'texts').mkdir()
  for i in range(40):
    (tmp_path / 'texts' / f'{i}.txt').write_text(f'text {i}\n' * 9)
  config.data.path = str(tmp_path / 'texts')
  config.data.dir = str(tmp_path / 'prepared')
  for documents in (1, 300):
    row = data.measure(config, megabytes=1, documents=documents, steps=2)
    assert row['tokenizer'] == 'bytes' and row['documents'] == documents
    speeds = [value for name, value in row.items() if '_per_second' in name]
    assert len(speeds) == 5 and min(speeds) > 0
    assert set(row['seek_seconds']) == {'shuffled', 'contiguous'}
    assert row['reading_memory_mb'] < 100
  with pytest.raises(UserError, match='a document a byte long'):
    data.measure(config, megabytes=1, documents=2 * 10**6, steps=2)
