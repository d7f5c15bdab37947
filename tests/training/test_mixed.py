"""A run on a mixture: the loss of each source, resumed, evaluated, told."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax.analysis.analyze import analyze
from moe_jax.config import mixture
from moe_jax.errors import UserError
from moe_jax.evaluation import checkpoints as evaluation
from moe_jax.planning.compiled import abstract_batch
from moe_jax.training import loop, record
from moe_jax.training.losses import SourceLoss
from moe_jax.training.metrics import source_losses
from moe_jax.training.step import make_eval_step
from tests.helpers import runs, steps, tiny

TWO = '{"a": {"name": "python_docs"}, "b": {"name": "python_stdlib"}}'


@pytest.mark.parametrize(
  ('accumulation', 'axes'),
  [
    (1, {}),
    pytest.param(2, steps.EVERY_AXIS, marks=pytest.mark.slow),
    pytest.param(4, {}, marks=pytest.mark.slow),
  ],
)
def test_the_loss_of_each_source(
  accumulation: int, axes: dict[str, int]
) -> None:
  """It is that of an evaluation of its rows, and together they are the loss."""
  config = tiny.config(
    **{
      'data.mixture': TWO,
      'model.num_layers': 1,
      'train.batch_size': 16,
      'train.accumulation': accumulation,
    }
  )
  setup, train_step = steps.trainer(config, **axes)
  batch = steps.batch(config)
  source_B = np.arange(len(batch['token_ids'])) % 3 // 2  # a third is of b
  batch['source'] = source_B.astype(np.int32)
  asked = {k: (v.shape, v.dtype) for k, v in abstract_batch(setup).items()}
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == asked

  state = steps.init(setup)
  evaluate = make_eval_step(setup)
  expected = {}
  for number, name in enumerate('ab'):
    rows = batch['padding_mask'] & (source_B == number)[:, None]
    found = evaluate(state['params'], batch | {'target_mask': rows})
    expected[f'loss/{name}'] = float(found['nll']) / float(found['targets'])
  _, metrics = train_step(state, batch)
  found = metrics['sources']
  assert source_losses(['a', 'b'], found) == pytest.approx(expected, rel=2e-6)
  np.testing.assert_allclose(found.share_S.sum(), 1, rtol=1e-6)
  np.testing.assert_allclose(found.loss_S.sum(), metrics['loss'], rtol=1e-6)


def test_a_source_without_a_target_has_no_loss() -> None:
  found = SourceLoss(np.array([1.5, 0]), np.array([0.5, 0]))
  assert source_losses(['a', 'b'], found) == {'loss/a': 3.0}
  assert not source_losses([], None)


@pytest.fixture(scope='module')
def config(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
  folder = tmp_path_factory.mktemp('texts')
  for name, form in ('plain', '{} is '), ('digits', '{}'):
    texts = [form.format(n) * 9 for n in range(300)]
    lines = [json.dumps({'text': text}) for text in texts]
    (folder / f'{name}.jsonl').write_text('\n'.join(lines))
  sources = {
    name: {'path': str(folder / f'{name}.jsonl'), 'weight': weight}
    for name, weight in (('plain', 3), ('digits', 1))
  }
  return tiny.config(
    **{
      'data.mixture': mixture.inlined(json.dumps(sources)),
      'data.dir': str(tmp_path_factory.mktemp('prepared')),
      'data.order': 'packed',
      'model.num_layers': 1,
      'train.log_every': 1,
      'train.steps': 8,
      'optimizer.decay_steps': 100,
      'checkpoint.every': 4,
      'eval.every': 8,
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
def test_what_a_run_says_and_writes(config: ConfigDict, workdir: Path) -> None:
  made = loop.prepare(config)
  said = record.describe(made.setup, made.mixture)
  assert 'data     plain, 75.00% of the rows, files: ' in said
  assert 'data     digits, 25.00% of the rows, files: ' in said
  for row in runs.rows(workdir, 'train'):
    of = [row[key] for key in ('loss/plain', 'loss/digits') if key in row]
    assert of and min(of) - 1e-5 <= row['loss'] <= max(of) + 1e-5
  whole, plain, digits = (
    runs.rows(workdir, split)[-1]
    for split in ('validation', 'validation/plain', 'validation/digits')
  )
  assert whole['tokens'] == plain['tokens'] + digits['tokens']
  nats = sum(each['loss'] * each['tokens'] for each in (plain, digits))
  assert whole['loss'] == pytest.approx(nats / whole['tokens'], rel=1e-12)


@pytest.mark.slow
def test_resuming_and_evaluating(
  config: ConfigDict, workdir: Path, tmp_path: Path
) -> None:
  runs.train_in_two(config, tmp_path, 4)
  jax.tree.map(
    np.testing.assert_array_equal,
    *(runs.restore(config, folder, 8) for folder in (workdir, tmp_path)),
  )
  straight, resumed = (
    [row for row in runs.timeless_rows(of) if row['split'] == 'train']
    for of in (workdir, tmp_path)
  )
  assert straight == resumed
  results = evaluation.evaluate(config, str(workdir))
  kept = sorted(path.name for path in (workdir / 'evaluation').iterdir())
  assert kept == [
    'validation-8.json',
    'validation_digits-8.json',
    'validation_plain-8.json',
  ]
  for name, metrics in results.items():
    row = runs.rows(workdir, name)[-1]
    assert math.isclose(metrics['loss'], row['loss'], rel_tol=1e-6)


@pytest.mark.slow
def test_another_mixture_is_refused_or_meant(
  config: ConfigDict, workdir: Path
) -> None:
  other = config.copy_and_resolve_references()
  other.train.steps = 9
  other.data.mixture = config.data.mixture.replace(': 3', ': 2')
  with pytest.raises(UserError, match='data.mixture was'):
    loop.train(other, str(workdir))
  other.data.changed = 'allow'
  loop.train(other, str(workdir))
  assert runs.checkpoints(workdir)[-1] == 9


@pytest.mark.slow
def test_analyses_are_of_one_source(config: ConfigDict, workdir: Path) -> None:
  with pytest.raises(UserError, match='--config.data.mixture= --config.data'):
    analyze(config, str(workdir))
