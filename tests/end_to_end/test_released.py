"""A run becomes a released checkpoint, and that a run that can be evaluated."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from moe_jax.interop import convert
from moe_jax.training import loop
from tests.helpers import runs


@pytest.mark.slow
def test_a_run_there_and_back_is_evaluated_alike(
  make_config: Callable[..., ConfigDict],
  tmp_path: Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  """As train.py leaves it, where the tokenizer says how many ids there are."""
  config = make_config(
    **{
      'train.steps': 1,
      'eval.every': 0,
      'eval.batch_size': 48,
      'optimizer.warmup_steps': 0,
      'mesh.data': 8,
    }
  )
  assert config.model.vocab_size == 0
  run, checkpoint, back = (tmp_path / name for name in ('run', 'ckpt', 'back'))
  loop.train(config, str(run))
  said = convert.export(run, checkpoint, 'mixtral', 'float32', 0, None)
  assert 'step 1 of' in said and "in the format 'mixtral'" in said
  values = json.loads((checkpoint / 'config.json').read_text())
  assert values['vocab_size'] == 257
  said = convert.import_(checkpoint, back, 'bytes')
  assert 'data.tokenizer' not in said  # it is the model's
  capsys.readouterr()

  data = [
    f'--config.data.{key}={config.data[key]}' for key in ('name', 'path', 'dir')
  ]
  found = []
  for workdir in (run, back):
    flags = [f'--config={workdir}/config.json', f'--workdir={workdir}', *data]
    status = runs.call('eval.py', [*flags, '--config.eval.batch_size=48'])
    assert not status, capsys.readouterr().err
    [written] = (workdir / 'evaluation').iterdir()
    found.append(json.loads(written.read_text()))
  assert found[0]['tokens'] == found[1]['tokens']
  assert found[1]['loss'] == pytest.approx(found[0]['loss'], rel=1e-6)

  # It goes on from step 0, twice: no line is of another run.
  config, kept = (
    f'--config={back}/config.json',
    '--config.optimizer.decay_steps',
  )
  flags = [config, f'--workdir={back}', data[2], f'{kept}=1000']
  flags += ['--config.train.steps=1', '--config.train.log_every=1']
  flags.append('--config.eval.every=0')
  assert not runs.call('train.py', flags), capsys.readouterr().err
  shutil.rmtree(back / 'checkpoints/1')
  assert not runs.call('train.py', flags), capsys.readouterr().err
  assert [row['step'] for row in runs.rows(back, 'train')] == [1]
  assert not (back / 'metrics.jsonl.1').exists()
