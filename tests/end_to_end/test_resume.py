"""A run that was interrupted ends as if it had not been, to the last bit."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.helpers import runs

STEPS, HALF = 40, 20


@pytest.fixture(scope='module')
def config(make_config: Callable[..., ConfigDict]) -> ConfigDict:
  """All that has a state: recurrent, Cartesian, accumulation, evaluation."""
  return make_config(
    **{
      'moe.factors': 2,
      'router.recurrent': 'gru',
      'data.seq_len': 32,
      'train.batch_size': 16,
      'train.accumulation': 2,
      'train.steps': STEPS,
      'train.log_every': 1,
      'checkpoint.every': HALF,
      'eval.every': HALF,
      'eval.batches': 2,
    }
  )


@pytest.fixture(
  scope='module',
  params=['quick', pytest.param('optimised', marks=pytest.mark.slow)],
)
def env(
  request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
  """One cache of compiled programs for all, with and without optimisation."""
  flags = {'XLA_FLAGS': ''} if request.param == 'optimised' else {}
  return flags | {
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('compiled')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
  }


@pytest.fixture(scope='module')
def straight(
  config: ConfigDict,
  env: dict[str, str],
  tmp_path_factory: pytest.TempPathFactory,
) -> Path:
  """The directory of a run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp('straight')
  finish(config, workdir, env)
  assert runs.checkpoints(workdir) == [HALF, STEPS]
  return workdir


@pytest.fixture
def halfway(straight: Path, tmp_path: Path) -> Path:
  """What a kill leaves: later steps are written of than were saved."""
  workdir = tmp_path / 'halfway'
  shutil.copytree(straight, workdir)
  shutil.rmtree(workdir / 'checkpoints' / str(STEPS))
  return workdir


def finish(config: ConfigDict, workdir: Path, env: dict[str, str]) -> str:
  """Trains to the end in a process of its own; returns what it printed."""
  process = runs.start('train.py', runs.arguments(config, workdir), **env)
  out, err = process.communicate()
  assert process.returncode == 0, err
  return out


def assert_same_run(config: ConfigDict, workdir: Path, straight: Path) -> None:
  assert runs.timeless_rows(workdir) == runs.timeless_rows(straight)
  resumed = runs.restore(config, workdir, STEPS)
  jax.tree.map(
    np.testing.assert_array_equal,
    resumed,
    runs.restore(config, straight, STEPS),
  )
  assert resumed['step'] == STEPS and 'key' in resumed and resumed['opt_state']


def test_every_step_is_logged_once(straight: Path) -> None:
  steps = [(row['step'], row['split']) for row in runs.rows(straight)]
  expected = [(step, 'train') for step in range(1, STEPS + 1)]
  for step in (HALF, STEPS):
    expected.insert(expected.index((step, 'train')) + 1, (step, 'validation'))
  assert steps == expected


def test_twenty_and_twenty_steps_are_forty(
  config: ConfigDict, straight: Path, halfway: Path, env: dict[str, str]
) -> None:
  out = finish(config, halfway, env)
  assert f'step {HALF}/' not in out and f'step {HALF + 1}/' in out
  assert_same_run(config, halfway, straight)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(
  config: ConfigDict, straight: Path, tmp_path: Path, env: dict[str, str]
) -> None:
  flags = runs.arguments(config, tmp_path)
  process = runs.start('train.py', flags, **env)
  for line in process.stdout:
    if line.startswith('step 10/'):
      break
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate()
  assert process.returncode == 128 + signal.SIGTERM, err
  stopped = runs.checkpoints(tmp_path)[-1]
  assert 10 < stopped < STEPS
  assert out.endswith(f', stopped at step {stopped} of {STEPS}\n')
  assert runs.rows(tmp_path, 'train')[-1]['step'] == stopped
  out = finish(config, tmp_path, env)
  assert f'step {stopped + 1}/' in out and f'step {stopped}/' not in out
  assert_same_run(config, tmp_path, straight)


@pytest.mark.slow
def test_goes_on_on_another_mesh(
  config: ConfigDict, straight: Path, halfway: Path
) -> None:
  # The process that saved had one device, this one has eight.
  mesh = {'mesh.data': 2, 'mesh.context': 2, 'mesh.expert': 2}
  flags = [f'--config.{axis}={size}' for axis, size in mesh.items()]
  assert runs.call('train.py', runs.arguments(config, halfway) + flags) == 0
  rows, expected = runs.timeless_rows(halfway), runs.timeless_rows(straight)
  assert [row['step'] for row in rows] == [row['step'] for row in expected]
  np.testing.assert_allclose(
    [row['loss'] for row in rows],
    [row['loss'] for row in expected],
    rtol=1e-4,
  )


def test_a_finished_run_is_left_as_it_is(
  config: ConfigDict,
  straight: Path,
  tmp_path: Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  workdir = tmp_path / 'finished'
  shutil.copytree(straight, workdir)
  assert runs.call('train.py', runs.arguments(config, workdir)) == 0
  assert f'{STEPS} steps are done' in capsys.readouterr().out
  for kept in ('metrics.jsonl', 'checkpoints'):
    before, after = (runs.snapshot(w / kept) for w in (straight, workdir))
    assert before == after
