"""A run on a text that goes on: resumed inside an epoch, evaluated whole."""

import math
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax.data.pipeline import EvaluationRows
from moe_jax.planning import plan
from moe_jax.training import loop
from moe_jax.training.step import make_eval_step
from tests.helpers import runs, tiny

TEXT = ''.join(f'line {i * i} of a text,\n' for i in range(400)).encode()


@pytest.fixture(scope='module')
def config(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
  """One layer, and epochs of eleven steps or so."""
  folder = tmp_path_factory.mktemp('enwik8')
  with zipfile.ZipFile(folder / 'enwik8.zip', 'w') as archive:
    archive.writestr('enwik8', TEXT)
  return tiny.config(
    **{
      'data.name': 'enwik8',
      'data.path': str(folder / 'enwik8.zip'),
      'data.dir': str(folder / 'prepared'),
      'data.tokenizer': 'enwik8',
      'data.order': 'contiguous',
      'data.seq_len': 64,
      'model.num_layers': 1,
      'model.positions': 'span',
      'model.span': 20,
      'model.norm': 'layer',
      'model.norm_place': 'post',
      'model.activation': 'relu',
      'model.dropout': 0.1,
      'train.log_every': 1,
      'train.steps': 14,
      'optimizer.decay_steps': 100,
      'checkpoint.every': 7,
      'eval.every': 14,
    }
  )


@pytest.fixture(scope='module')
def workdir(
  config: ConfigDict, tmp_path_factory: pytest.TempPathFactory
) -> Path:
  folder = tmp_path_factory.mktemp('runs') / 'straight'
  loop.train(config, str(folder))
  return folder


@pytest.mark.slow
def test_resuming_inside_an_epoch_changes_nothing(
  config: ConfigDict, workdir: Path, tmp_path: Path
) -> None:
  runs.train_in_two(config, tmp_path, 7)
  straight, resumed = (
    [row['loss'] for row in runs.rows(folder, 'train')]
    for folder in (workdir, tmp_path)
  )
  assert len(straight) == 14
  assert resumed == straight  # to the last bit
  jax.tree.map(
    np.testing.assert_array_equal,
    *(runs.restore(config, folder, 14) for folder in (workdir, tmp_path)),
  )


@pytest.mark.slow
def test_evaluation_carries_its_memory(
  config: ConfigDict, workdir: Path
) -> None:
  """Restated: row by row, segment by segment."""
  result = runs.evaluate(config, workdir, split='train')
  prepared = loop.prepare(config)
  [sequences] = prepared.mixture.sequences
  params = runs.restore(config, workdir, 14)['params']
  eval_step = make_eval_step(prepared.setup)
  rows = EvaluationRows(sequences, config.train.batch_size)
  nll, memory = 0.0, None
  for step in range(len(rows)):
    parts = [rows.at(step, row) for row in range(config.train.batch_size)]
    batch = {key: np.stack([p[key] for p in parts]) for key in parts[0]}
    sums = eval_step(params, batch, memory)
    nll, memory = nll + float(sums['nll']), sums['attention_state']
  tokens = len(TEXT) * 90 // 100 - 1
  assert len(rows) > 1
  assert result['tokens'] == tokens
  assert result['loss'] == pytest.approx(nll / tokens, rel=1e-5)
  bits = nll / tokens / math.log(2)
  # A token is a byte, and the first one is not predicted.
  assert result['bits_per_byte'] == pytest.approx(bits, rel=1e-2)


@pytest.mark.slow
def test_training_reports_the_same(config: ConfigDict, workdir: Path) -> None:
  result = runs.evaluate(config, workdir)
  (logged,) = runs.rows(workdir, 'validation')
  assert logged == {'split': 'validation'} | result


@pytest.mark.slow
def test_another_data_set_has_other_ids(
  config: ConfigDict, workdir: Path
) -> None:
  other = config.copy_and_resolve_references()
  other.data.name = 'python_stdlib'
  with pytest.raises(ValueError, match='data.name was .enwik8.'):
    runs.evaluate(other, workdir)


@pytest.mark.slow
def test_plan_counts_the_memory(config: ConfigDict) -> None:
  parts = plan.make(config, 1)['memory_parts_per_device']
  # Of the batch before and of this one.
  assert parts['segments'] == 2 * 8 * 20 * 32 * 4
  on_eight = plan.make(config, 8)['memory_parts_per_device']
  assert on_eight['segments'] == parts['segments'] // 8
