"""A user's own file registers routers, trains, resumes and evaluates."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moe_jax.analysis.analyze import analyze
from moe_jax.config import loading
from tests.helpers import examples, runs

TINY = {
  'mesh.data': 2,
  'mesh.expert': 4,
  'model.num_layers': 2,
  'model.hidden_size': 32,
  'moe.expert_width': 24,
  'data.name': 'text_folder',
  'data.seq_len': 16,
  'data.threads': 1,
  'train.batch_size': 8,
  'train.steps': 2,
  'train.log_every': 1,
  'optimizer.warmup_steps': 1,
  'optimizer.decay_steps': 4,
  'checkpoint.every': 2,
  'eval.every': 0,
  'eval.batches': 1,
}


@pytest.fixture(autouse=True, scope='module')
def own_names() -> Iterator[None]:
  with examples.registered_here():
    yield


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['noisy_top_k', 'mask', 'null_experts'])
def test_own_routers_train_resume_and_evaluate(
  variant: str, texts: Path, tmp_path: Path
) -> None:
  """On eight devices with expert parallelism; nothing in the package knows."""
  file, workdir = examples.FOLDER / 'routers.py', tmp_path / 'run'
  tiny = TINY | {'data.path': texts, 'data.dir': tmp_path / 'prepared'}
  flags = [f'--config.{key}={value}' for key, value in tiny.items()]
  start = [f'--config={file}:{variant}', f'--workdir={workdir}', *flags]
  assert runs.call('train.py', start) == 0
  again = [f'--workdir={workdir}', '--config.train.steps=4']
  assert runs.call('train.py', again) == 0
  assert runs.checkpoints(workdir)[-1] == 4
  assert runs.call('eval.py', [f'--workdir={workdir}']) == 0
  assert all(
    float(row['loss']) < 8 for row in runs.rows(workdir) if 'loss' in row
  )
  config = loading.of_run(str(workdir))
  found = analyze(config, str(workdir), tokens=300, passage=300)
  nulls = 8 if variant == 'null_experts' else 0
  assert found['routers']['null_experts'] == nulls
  for experts, frequency in zip(
    found['passage']['experts'], found['selection_frequency'], strict=True
  ):
    counts = np.bincount(np.concatenate(experts).astype(int), minlength=8)
    np.testing.assert_allclose(frequency, counts / 300, rtol=1e-5)
  if nulls:
    assert 0 < np.sum(frequency) < 4
