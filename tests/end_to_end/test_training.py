"""What a training run leaves behind and says, and when it stops itself."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.helpers import runs

STEPS = 24
LOG, EVAL, SAVE = 4, 12, 5


@pytest.fixture(scope='module')
def config(make_config: Callable[..., ConfigDict]) -> ConfigDict:
  return make_config(
    **{
      'train.steps': STEPS,
      'train.log_every': LOG,
      'eval.every': EVAL,
      'eval.batches': 1,
      'checkpoint.every': SAVE,
      'checkpoint.keep': 2,
      'checkpoint.keep_every': 2 * SAVE,
      'optimizer.learning_rate': 1e-2,
    }
  )


@pytest.fixture(scope='module')
def workdir(
  config: ConfigDict, tmp_path_factory: pytest.TempPathFactory
) -> Path:
  """A finished run; what it printed is in printed.txt beside it."""
  workdir = tmp_path_factory.mktemp('training') / 'run'
  process = runs.start('train.py', runs.arguments(config, workdir))
  out, err = process.communicate()
  assert process.returncode == 0, err
  workdir.with_name('printed.txt').write_text(out)
  return workdir


def scalars(workdir: Path) -> dict[tuple[str, int], float]:
  """What the event files in DIR/tensorboard hold, by tag and step."""
  return {
    (value.tag, event.step): value.simple_value
    for event in runs.events(workdir)
    for value in event.summary.value
    if value.WhichOneof('value') == 'simple_value'
  }


def test_the_checksum_is_crc32c() -> None:
  # The check value of the CRC catalogues, before masking: 0xE3069283.
  crc = 0xE3069283
  expected = ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
  assert runs.masked_crc(b'123456789') == expected


def test_metrics_are_what_other_programs_expect(
  config: ConfigDict, workdir: Path
) -> None:
  train = runs.rows(workdir, 'train')
  assert [row['step'] for row in train] == list(range(LOG, STEPS + 1, LOG))
  for row in train:
    assert list(row)[:2] == ['step', 'split']
    assert row['tokens_per_second'] > 0
    assert 0 <= row['data_wait'] <= 1
    assert math.isfinite(row['gradient_norm'])
    for name in ('max_load', 'idle_experts', 'router_entropy'):
      assert len(row[name]) == config.model.num_layers
    assert row['dropped_share'] == [0.0] * config.model.num_layers
    counts = np.array(row['expert_counts'])
    assignments = config.train.batch_size * config.data.seq_len
    assignments *= config.moe.top_k
    assert (counts.sum(-1) == assignments).all()
    busiest = counts.max((1, 2)) * config.moe.num_experts / assignments
    assert row['max_load'] == pytest.approx(busiest)
    violation = counts.max(-1) / counts.mean(-1) - 1
    np.testing.assert_allclose(row['routing/max_violation'], violation, 1e-5)
    assert row['max_violation'] == pytest.approx(violation.mean())
  # Of 257 ids, with small weights: log 257 = 5.55 before the first steps, which
  # take off more or less of it with the library of this Python.
  assert 4 < train[0]['loss'] < 6
  assert train[-1]['loss'] < train[0]['loss'] - 1

  evaluations = runs.rows(workdir, 'validation')
  assert [row['step'] for row in evaluations] == [EVAL, STEPS]
  one_batch = config.train.batch_size * config.data.seq_len
  for row in evaluations:
    assert row['tokens'] == one_batch
    assert row['perplexity'] == pytest.approx(math.exp(row['loss']))
    assert row['loss'] < train[0]['loss'] - 1


def test_tensorboard_has_the_same_numbers(workdir: Path) -> None:
  found = scalars(workdir)
  for row in runs.rows(workdir):
    for name, value in row.items():
      if name not in ('step', 'split') and not isinstance(value, list):
        event = found.pop((f'{row["split"]}/{name}', row['step']))
        assert event == np.float32(value), name
      elif name.startswith('routing/'):
        for layer, values in enumerate(value, start=1):
          tag = f'{name.removeprefix("routing/")}/layer_{layer}'
          assert [found.pop((tag, row['step']))] == np.float32(values).tolist()
  assert not found


def test_tensorboard_has_a_picture_of_the_load(
  config: ConfigDict, workdir: Path
) -> None:
  pictures = [
    (event.step, value.image.height, value.image.width)
    for event in runs.events(workdir)
    for value in event.summary.value
    if value.tag == 'expert_load'
  ]
  size = 16 * config.model.num_layers, 16 * config.moe.num_experts
  assert pictures == [(step, *size) for step in range(LOG, STEPS + 1, LOG)]


def test_keeps_the_newest_checkpoints_and_every_nth(
  config: ConfigDict, workdir: Path
) -> None:
  # Saved: 5, 10, 15, 20 and the last, 24. Kept: two newest, tenth steps.
  assert runs.checkpoints(workdir) == [10, 20, 24]
  assert {path.name for path in workdir.iterdir()} == {
    '.lock',
    'checkpoints',
    'config.json',
    'metrics.jsonl',
    'run.json',
    'tensorboard',
  }


def test_says_what_it_does(workdir: Path) -> None:
  lines = workdir.with_name('printed.txt').read_text().splitlines()
  first = [line.split()[0] for line in lines[:4]]
  assert first == ['model', 'devices', 'runs', 'data']
  progress = [line for line in lines if line.startswith('step ')]
  rows = runs.rows(workdir)
  for line, row in zip(progress, rows, strict=True):
    assert f'loss {row["loss"]:.4f}' in line
    if row['split'] == 'train':
      routed = max(row['max_load']), sum(row['idle_experts'])
      assert 'load {:.1f}x idle {}  '.format(*routed) in line
  last = {row['split']: row for row in rows}
  head, _, train, validation, total = lines[-5:]
  assert head.split() == 'split loss perplexity bits per byte tokens'.split()
  assert train.split() == ['train', f'{last["train"]["loss"]:.4f}']
  assert validation.split()[:3] == [
    'validation',
    f'{last["validation"]["loss"]:.4f}',
    f'{last["validation"]["perplexity"]:.4f}',
  ]
  assert total.startswith(f'{STEPS} steps in ')


def with_values(config: ConfigDict, values: dict[str, Any]) -> ConfigDict:
  """`config` of a model that is soon compiled, with `values`."""
  dense = {'model.num_layers': 1, 'moe.num_experts': 0}
  changed = config.copy_and_resolve_references()
  changed.update_from_flattened_dict(dense | values)
  return changed


@pytest.mark.slow
def test_zero_switches_things_off(
  config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  off = {f'{key}.every': 0 for key in ('checkpoint', 'eval')}
  # No split to evaluate on is needed then, and no batch size for it.
  off |= {'train.log_every': 0, 'eval.split': 'test', 'train.steps': 3}
  flags = runs.arguments(with_values(config, off), tmp_path)
  assert runs.call('train.py', flags) == 0
  assert runs.rows(tmp_path) == [] and scalars(tmp_path) == {}
  assert runs.checkpoints(tmp_path) == []
  printed = capsys.readouterr().out
  assert 'step 3' not in printed and '3 steps in' in printed


@pytest.mark.slow
def test_a_diverged_run_stops_and_keeps_what_was_saved(
  config: ConfigDict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
  values = {
    'optimizer.learning_rate': 1e30,
    'optimizer.warmup_steps': 0,
    'train.log_every': 1,
    'checkpoint.every': 1,
    'checkpoint.keep': 9,
    'eval.every': 0,
  }
  flags = runs.arguments(with_values(config, values), tmp_path)
  assert runs.call('train.py', flags) == 2
  (line,) = capfd.readouterr().err.splitlines()
  assert line.startswith('error: training has diverged at step ')
  # What is saved is finite, and what the run goes on from; a checkpoint that no
  # sound step has followed is not.
  saved = runs.checkpoints(tmp_path)
  goes_on = f'goes on from step {saved[-1]}' if saved else 'begins anew,'
  rate = 'a lower --config.optimizer.learning_rate'
  assert f'the same command {goes_on} with {rate}' in line
  for step in saved:
    state = runs.restore(with_values(config, values), tmp_path, step)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
