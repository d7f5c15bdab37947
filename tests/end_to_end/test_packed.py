"""A run on packed documents: resumed, evaluated, analysed, planned."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax.analysis.analyze import analyze
from moe_jax.data import folders, sources
from moe_jax.planning import plan
from moe_jax.training import loop, record
from tests.helpers import oracle, runs, tiny

EOS, L = 256, 16


@pytest.fixture(scope='module')
def config(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
  """One layer, and documents of which most are shorter than a row."""
  folder = tmp_path_factory.mktemp('texts')
  for i in range(300):
    text = ' '.join(str(n * i) for n in range(i % 7 + 1))
    (folder / f'{i}.txt').write_text(text)
  return tiny.config(
    **{
      'data.name': 'text_folder',
      'data.path': str(folder),
      'data.dir': str(tmp_path_factory.mktemp('prepared')),
      'data.order': 'packed',
      'model.num_layers': 1,
      'router.recurrent': 'gru',
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
def test_resuming_changes_nothing(
  config: ConfigDict, workdir: Path, tmp_path: Path
) -> None:
  runs.train_in_two(config, tmp_path, 4)
  jax.tree.map(
    np.testing.assert_array_equal,
    *(runs.restore(config, folder, 8) for folder in (workdir, tmp_path)),
  )


def _documents(config: ConfigDict, split: str) -> list[np.ndarray]:
  """`eos document eos` of every document of a split, cut into rows."""
  texts = {
    path.name: path.read_bytes()
    for path in sorted(Path(config.data.path).iterdir())
    if folders.split_of(path.name) == split
  }
  whole = [np.array([EOS, *text, EOS]) for text in texts.values()]
  return [
    each[begin : begin + L + 1]
    for each in whole
    for begin in range(0, len(each) - 1, L)
  ]


@pytest.fixture(scope='module')
def losses_of(
  config: ConfigDict, workdir: Path
) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the function from tokens to their losses, in float64."""
  params: Any = runs.restore(config, workdir, 8)['params']

  def losses(tokens: np.ndarray) -> np.ndarray:
    logits_LV = oracle.Sequence(config, params).run(tokens[:-1])
    shares_LV = oracle.softmax(logits_LV)
    return -np.log(shares_LV[np.arange(len(tokens) - 1), tokens[1:]])

  return losses


@pytest.mark.slow
def test_evaluation_is_that_of_the_documents_one_by_one(
  config: ConfigDict,
  workdir: Path,
  losses_of: Callable[[np.ndarray], np.ndarray],
) -> None:
  pieces = _documents(config, 'validation')
  nll = np.concatenate([losses_of(piece) for piece in pieces])
  (logged,) = runs.rows(workdir, 'validation')
  assert logged['tokens'] == len(nll)
  assert logged['loss'] == pytest.approx(nll.mean(), rel=1e-5)
  num_bytes = sum((piece[1:] != EOS).sum() for piece in pieces)
  bits = nll.sum() / math.log(2) / num_bytes
  assert logged['bits_per_byte'] == pytest.approx(bits, rel=1e-5)


@pytest.mark.slow
def test_analysis_reads_packed_rows(
  config: ConfigDict,
  workdir: Path,
  losses_of: Callable[[np.ndarray], np.ndarray],
) -> None:
  """The passage too, whose rows may end with padding."""
  found = analyze(config, str(workdir), split='validation', passage=40)
  assert found['tokens'] == sum(
    len(piece) - 1 for piece in _documents(config, 'validation')
  )
  passage = found['passage']
  assert len(passage['tokens']) == len(passage['loss']) == 40
  text = sources.open_documents(config.data, 'validation')[0]
  first = losses_of(np.array([EOS, *text.encode()])[: L + 1])
  np.testing.assert_allclose(passage['loss'][1 : len(first)], first[:-1], 1e-4)


@pytest.mark.slow
def test_a_run_says_what_packing_wastes(config: ConfigDict) -> None:
  made = loop.prepare(config)
  said = record.describe(made.setup, made.mixture)
  [sequences] = made.mixture.sequences
  assert f'packed with {sequences.packing.waste:.2%} padding' in said
  assert plan.make(config, 1)['parameters']['total'] > 0
