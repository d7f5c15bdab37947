"""Comparisons as processes: killed, stopped, gone on with, and refused."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.config import saved
from tests.helpers import processes, runs

VARIANTS = """
VARIANTS = {
  'linear': presets.sets({'moe.factors': 1, 'router.recurrent': 'none'}),
  'rmoe': presets.sets({'moe.factors': 1}),
  'lost': presets.sets({'train.init_from': '/no/such/run'}),
}
"""
FLAGS = ['--variants=linear,rmoe+router.passing=none', '--seeds=2']
# A run has steps enough to be killed in, and is over in seconds.
STEPS, SAVED = 30, 5


@pytest.fixture(scope='module')
def file(
  make_config: Callable[..., ConfigDict],
  tmp_path_factory: pytest.TempPathFactory,
) -> Path:
  """A config file of a user's with variants; its base is both methods."""
  config = make_config(
    **{
      'moe.factors': 2,
      'router.recurrent': 'gru',
      'train.steps': STEPS,
      'train.log_every': 1,
      'checkpoint.every': SAVED,
      'eval.every': 0,
    }
  )
  old = config_lib.flatten(config_lib.get_config().to_dict())
  new = config_lib.flatten(config.to_dict())
  values = {key: value for key, value in new.items() if value != old[key]}
  path = tmp_path_factory.mktemp('own') / 'own.py'
  path.write_text(
    f"""from moe_jax import config as config_lib
from moe_jax.config import presets

def get_config(names=''):
  config = config_lib.get_config()
  config.update_from_flattened_dict({values!r})
  return presets.build(names, config, {{}}, VARIANTS)
{VARIANTS}"""
  )
  return path


@pytest.fixture(scope='module')
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
  """One cache of compiled programs for all comparisons."""
  return {
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('compiled')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
  }


def start(
  file: Path, workdir: Path, env: dict[str, str], *flags: str
) -> subprocess.Popen[str]:
  """Starts a comparison."""
  arguments = ['compare', f'--config={file}', f'--workdir={workdir}', *flags]
  return runs.start('-m', ['moe_jax', *arguments], **env)


def finish(
  file: Path, workdir: Path, env: dict[str, str], *flags: str
) -> tuple[int, str, str]:
  """Runs a comparison to its end: status, stdout and stderr."""
  process = start(file, workdir, env, *flags)
  out, err = process.communicate()
  return process.returncode, out, err


def timeless(workdir: Path) -> dict[str, Any]:
  """compare.json without what the clock says."""
  found = runs.read_json(workdir / 'compare.json')
  for row in found['rows']:
    for run in row['runs']:
      assert run.pop('seconds') > 0
  return found


@pytest.fixture(scope='module')
def straight(
  file: Path, env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
  """The directory of a comparison that nothing interrupted."""
  workdir = tmp_path_factory.mktemp('straight')
  status, _, err = finish(file, workdir, env, *FLAGS)
  assert status == 0, err
  return workdir


def wait_for_step(workdir: Path, process: subprocess.Popen[str]) -> None:
  """Waits until some run has saved a checkpoint and goes on."""
  while process.poll() is None:
    if any(workdir.glob('*/seed-*/checkpoints/[0-9]*')):
      return
    time.sleep(0.05)


@pytest.mark.slow
def test_every_run_is_an_ordinary_run(straight: Path) -> None:
  assert '</html>' in (straight / 'report.html').read_text()
  found = timeless(straight)
  assert [row['variant'] for row in found['rows']] == [
    'linear',
    'rmoe+router.passing=none',
  ]
  for row in found['rows']:
    for run in row['runs']:
      workdir = straight / run['workdir']
      config = saved.from_json((workdir / 'config.json').read_text())
      assert config.seed == run['seed']
      assert config.moe.factors == 1
      result = runs.read_json(workdir / f'evaluation/validation-{STEPS}.json')
      assert run['bits_per_byte'] == result['bits_per_byte']
      assert runs.checkpoints(workdir)[-1] == run['steps'] == STEPS
  scores = [run['bits_per_byte'] for run in found['rows'][1]['runs']]
  assert len(set(scores)) == 2  # the seeds differ


@pytest.mark.slow
@pytest.mark.thorough
def test_killed_twice_it_ends_as_if_it_had_not_been(
  file: Path, straight: Path, tmp_path: Path, env: dict[str, str]
) -> None:
  moments = random.Random(0)
  for _ in range(2):
    process = start(file, tmp_path, env, *FLAGS)
    wait_for_step(tmp_path, process)
    time.sleep(moments.uniform(0, 5))
    process.kill()
    process.communicate()
    # The kernel ends the runs at once; nothing of them is left behind.
    deadline = time.monotonic() + 5
    while processes.naming(str(tmp_path)) and time.monotonic() < deadline:
      time.sleep(0.05)
    assert not processes.naming(str(tmp_path))
  status, _, err = finish(file, tmp_path, env, *FLAGS)
  assert status == 0, err
  assert timeless(tmp_path) == timeless(straight)


@pytest.mark.slow
def test_stopped_it_saves_and_the_same_command_goes_on(
  file: Path, straight: Path, tmp_path: Path, env: dict[str, str]
) -> None:
  process = start(file, tmp_path, env, *FLAGS)
  wait_for_step(tmp_path, process)
  # Or it ends while the other waits.
  paused = processes.naming(str(tmp_path))
  for pid in paused:
    os.kill(pid, signal.SIGSTOP)
  status, _, err = finish(file, tmp_path, env, *FLAGS)
  for pid in paused:
    os.kill(pid, signal.SIGCONT)
  assert status == 75 and err.count('\n') == 2, err  # it waits first
  assert (
    f'error: workdir {tmp_path} is in use by process {process.pid} on' in err
  )
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate()
  assert process.returncode == 128 + signal.SIGTERM, err
  assert out.endswith('stopped; the same command goes on\n')
  assert not processes.naming(str(tmp_path))
  # Variants, seeds and the rest are known where --workdir has them.
  flags = [f'--workdir={tmp_path}', '--seeds=2', FLAGS[0]]
  process = runs.start('-m', ['moe_jax', 'compare', *flags], **env)
  out, err = process.communicate()
  assert process.returncode == 0, err
  assert timeless(tmp_path) == timeless(straight)


@pytest.mark.slow
def test_rows_and_seeds_are_added_and_failures_told(
  file: Path, straight: Path, env: dict[str, str]
) -> None:
  before = timeless(straight)
  status, out, err = finish(
    file, straight, env, '--variants=lost,linear', '--seeds=0,5'
  )
  assert status == 1 and not err
  assert 'lost seed 5: failed: error: ' in out and '/no/such/run' in out
  found = {row['variant']: row for row in timeless(straight)['rows']}
  assert found['lost']['runs'] == [] and len(found['lost']['failed']) == 3
  for row in before['rows']:
    kept = found[row['variant']]['runs']
    assert [run['seed'] for run in kept] == [0, 1, 5]
    assert kept[:2] == row['runs']
  # Nothing that was finished ran again.
  starts = runs.read_json(straight / 'linear/seed-0/run.json')['starts']
  assert len(starts) == 1


@pytest.mark.slow
def test_a_sweep(file: Path, tmp_path: Path, env: dict[str, str]) -> None:
  key = 'optimizer.learning_rate'
  flags = [
    '--variants=linear',
    '--seeds=2',
    '--config.train.steps=6',
    f'--sweep={key}:1e-5,1e-2',
  ]
  status, out, err = finish(file, tmp_path, env, *flags)
  assert status == 0, err
  assert f'best {key} of 1e-05, 0.01 is 0.01, at the edge' in out
  [row] = json.loads((tmp_path / 'compare.json').read_text())['rows']
  assert row['swept']['value'] == 0.01
  results = row['swept']['results']
  assert results['0.01'] < results['1e-05']
  assert results['0.01'] == row['runs'][0]['bits_per_byte']
  assert row['runs'][1]['workdir'] == f'linear/{key}=0.01/seed-1'
