"""Runs whose numbers stop being finite: what they lose, and how they go on."""

import json
import math
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.config import loading
from moe_jax.data import folders
from tests.helpers import marks, runs, tiny

pytestmark = pytest.mark.slow

STEPS, EVERY = 20, 4
# A gate as a user may register it, which fails for some data.
POISONED = """
import jax.numpy as jnp

from moe_jax import config as config_lib
from moe_jax.registry import SCHEDULES
from moe_jax.routing.gates import GATES, LinearGate


@GATES.register('poisoned')
class PoisonedGate(LinearGate):
  'No number where a batch has a capital Z.'

  def __call__(self, features_TX, context):
    has_z = (context.token_ids_T == ord('Z')).any()
    logits_TN = super().__call__(features_TX, context)
    return logits_TN * jnp.where(has_z, jnp.nan, 1.0)


@SCHEDULES.register('jump')
def jump(config):
  'Far too high a rate in step 10 alone.'
  return lambda count: jnp.where(count == 9, 10.0, 1e-6)


def get_config():
  return config_lib.get_config()
"""
# One of the rows that are read on and on has it in batches 8 to 15.
FIRST_BAD, LAST_BAD = 8, 15
LENGTH, ROWS = 32, 8
TINY = {
  'model.num_layers': 1,
  'moe.num_experts': 4,
  'data.name': 'text_folder',
  'data.order': 'contiguous',
  'data.seq_len': LENGTH,
  'train.batch_size': ROWS,
  'train.steps': STEPS,
  'train.log_every': 1,
  'checkpoint.every': EVERY,
  'checkpoint.keep': 99,
  'eval.every': 0,
  'recovery.bad_steps': 3,
  'recovery.skip_batches': 6,
  'recovery.rollbacks': 2,
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A folder with the gate's file, and one with a text of many batches."""
  folder = tmp_path_factory.mktemp('non_finite')
  (folder / 'poisoned.py').write_text(POISONED)
  letters = random.Random(0).choices('abcdefgh ', k=ROWS * 200 * LENGTH)
  begin, end = (FIRST_BAD - 1) * LENGTH + 2, LAST_BAD * LENGTH - 1
  letters[begin:end] = 'Z' * (end - begin)
  names = (f'part-{i}.txt' for i in range(100))
  name = next(each for each in names if folders.split_of(each) == 'train')
  (folder / 'texts').mkdir()
  (folder / 'texts' / name).write_text(''.join(letters))
  return folder


def flags(folder: Path, workdir: Path, **changes: Any) -> list[str]:
  """The command line of a run, with changed keys (`a__b` for `a.b`)."""
  data = {'data.path': folder / 'texts', 'data.dir': folder / 'prepared'}
  changed = {key.replace('__', '.'): value for key, value in changes.items()}
  config = tiny.config(**TINY | {k: str(v) for k, v in data.items()} | changed)
  own, base = f'--config={folder / "poisoned.py"}', '--config=configs/base.py'
  return [
    own if flag == base else flag for flag in runs.arguments(config, workdir)
  ]


def poisoned(folder: Path, workdir: Path, **changes: Any) -> list[str]:
  return [
    *flags(folder, workdir, **changes),
    '--config.router.score=poisoned',
  ]


@pytest.fixture(scope='module')
def straight(folder: Path) -> Path:
  """A run that went back once, and that nothing interrupted."""
  workdir = folder / 'straight'
  train(poisoned(folder, workdir))
  return workdir


def start(
  command: list[str], program: str = 'train.py'
) -> subprocess.Popen[str]:
  """Starts a program on one device; what it compiles is kept."""
  return runs.start(
    program,
    command,
    JAX_COMPILATION_CACHE_DIR=str(jax.config.jax_compilation_cache_dir),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.1',
  )


def train(command: list[str], status: int = 0) -> tuple[str, str]:
  """Returns what a run says on stdout, and on stderr as errors."""
  process = start(command)
  out, err = process.communicate()
  assert process.returncode == status, out + err
  assert 'Traceback' not in err
  errors = [line for line in err.splitlines() if line.startswith('error: ')]
  assert len(errors) == (status != 0), err
  return out, ''.join(errors)


def replayed(workdir: Path, step: int) -> str:
  """What `moe_jax doctor` says of a step."""
  command = ['doctor', f'--workdir={workdir}', '--replay', f'--step={step}']
  process = start(command, 'moe_jax/__main__.py')
  out, err = process.communicate()
  assert process.returncode == 0, err
  return out


def saved(workdir: Path, step: int) -> dict[str, Any]:
  """What a checkpoint holds beside arrays and config."""
  path = workdir / f'checkpoints/{step}/data/metadata'
  return json.loads(path.read_text())


def arrays(workdir: Path, step: int) -> dict[str, bytes]:
  state = runs.restore(loading.of_run(str(workdir)), workdir, step)
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {
    jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
    for path, leaf in leaves
  }


def assert_finite(workdir: Path) -> list[int]:
  """Every number of every checkpoint; returns their steps."""
  steps = runs.checkpoints(workdir)
  config = loading.of_run(str(workdir))
  for step in steps:
    for leaf in jax.tree.leaves(runs.restore(config, workdir, step)):
      assert np.isfinite(leaf).all(), step
  return steps


def test_a_run_goes_back_and_leaves_out_the_data(straight: Path) -> None:
  rows = runs.rows(straight)
  train = [row['step'] for row in rows if row['split'] == 'train']
  assert train == list(range(1, STEPS + 1))
  [rollback] = [row for row in rows if row['split'] == 'rollback']
  # Bad from batch 8 on: steps 8, 9 and 10. From 4 to 16 = 10 + 6 are left out.
  assert rollback.pop('reason') == 'the loss is nan, 3 times in a row'
  assert rollback == {
    'step': EVERY + 1,
    'split': 'rollback',
    'bad_step': 10,
    'bad_position': 10,
    'rollbacks': 1,
    'position': 16,
    'skipped': [[EVERY, 12]],
  }
  # Nothing is left of the steps that came before it.
  assert [row['step'] for row in rows] == sorted(row['step'] for row in rows)
  assert all(row.get('skipped_steps', 0) == 0 for row in rows)
  assert assert_finite(straight) == [4, 8, 12, 16, 20]
  assert saved(straight, 4)['position'] == 4
  for step in (8, 20):
    assert saved(straight, step)['position'] == step + 12
    assert saved(straight, step)['skipped'] == [[EVERY, 12]]


@pytest.mark.parametrize('until', ['step  6/', 'step 10/'])
def test_a_killed_run_ends_like_the_one_that_was_not(
  until: str, folder: Path, straight: Path, tmp_path: Path
) -> None:
  """Killed after it went back: before there is a checkpoint, and after."""
  command = poisoned(folder, tmp_path / 'run')
  process = start(command)
  has_gone_back = False
  for line in process.stdout:
    has_gone_back |= 'going back to step 4' in line
    if has_gone_back and line.startswith(until):
      break
  if until == 'step 10/':
    while not (tmp_path / 'run/checkpoints/8').exists():
      time.sleep(0.05)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  train(command)
  assert runs.timeless_rows(tmp_path / 'run') == runs.timeless_rows(straight)
  assert arrays(tmp_path / 'run', STEPS) == arrays(straight, STEPS)


def test_bad_steps_change_nothing_and_are_told(
  folder: Path, tmp_path: Path
) -> None:
  printed, _ = train(poisoned(folder, tmp_path, recovery__bad_steps=50))
  assert 'step 8: the loss is nan (data position 8)' in printed
  assert 'going back' not in printed
  rows = runs.rows(tmp_path, 'train')
  counted = [row['skipped_steps'] for row in rows]
  assert counted == [*[0] * 7, *range(1, 9), *[8] * 5]
  told = runs.rows(tmp_path, 'skipped_step')
  assert [(row['step'], row['position']) for row in told] == [
    (step, step) for step in range(FIRST_BAD, LAST_BAD + 1)
  ]
  # Not after steps that changed nothing: 8 and 12.
  assert assert_finite(tmp_path) == [4, 16, 20]

  found = replayed(tmp_path, 9)
  assert 'step 9, rebuilt from step 4, data position 9: loss nan' in found
  assert 'metrics.jsonl says the same, bit for bit' in found
  assert 'first not finite: layer 1, router logits, in the forward' in found
  assert '  gradient of embed_VD: ' in found
  # A digit less than was computed, as by a device that cannot be relied on.
  path = tmp_path / 'metrics.jsonl'
  norm = repr(rows[-4]['gradient_norm'])
  path.write_text(path.read_text().replace(norm, norm[:-1]))
  found = replayed(tmp_path, 17)
  assert 'rebuilt from step 16, data position 17' in found
  assert 'metrics.jsonl says otherwise (gradient_norm ' in found
  assert 'everything is finite' in found


@pytest.mark.parametrize(
  ('step', 'start', 'position'), [(6, 4, 18), (10, 8, 22), (3, 0, 3)]
)
def test_a_replay_knows_what_data_was_left_out(
  step: int, start: int, position: int, straight: Path
) -> None:
  found = replayed(straight, step)
  assert f'rebuilt from step {start}, data position {position}:' in found
  assert 'metrics.jsonl says the same, bit for bit' in found


@pytest.mark.parametrize('log_every', [0, 1])
def test_it_is_seen_whatever_is_logged_and_saved(
  log_every: int, folder: Path, tmp_path: Path
) -> None:
  changes = {'train__log_every': log_every, 'checkpoint__every': 0}
  _, line = train(poisoned(folder, tmp_path, **changes), status=2)
  assert 'diverged at step 10 (data position 10): the loss is nan' in line
  assert 'no checkpoint to go back to' in line


def test_more_rollbacks_go_on_where_the_run_had_stopped(
  folder: Path, tmp_path: Path
) -> None:
  keys = {'bad_steps': 2, 'skip_batches': 1, 'rollbacks': 1}
  changes = {f'recovery__{key}': value for key, value in keys.items()}
  command = poisoned(folder, tmp_path, **changes)
  _, line = train(command, status=2)
  advised = re.search(r'more than (--config\.recovery\.rollbacks) = 1', line)
  assert advised, line
  # The same command still does the same.
  assert train(command, status=2)[1] == line
  again = [flag for flag in command if 'recovery.rollbacks' not in flag]
  train([*again, f'{advised[1]}=9'])
  assert saved(tmp_path, STEPS)['recovery']['rollbacks'] > 1
  assert_finite(tmp_path)


DIVERGING = {'optimizer__warmup_steps': 0, 'optimizer__clip_norm': 0.0}


@pytest.mark.parametrize(
  ('rate', 'every'), marks.at_first(1, [(1e4, 2), (1e4, 1), (1e38, 1)])
)
def test_a_lower_rate_goes_on_where_a_run_diverged(
  rate: float, every: int, folder: Path, tmp_path: Path
) -> None:
  changes = {'checkpoint__every': every, 'optimizer__learning_rate': rate}
  command = flags(folder, tmp_path, **DIVERGING, **changes)
  _, line = train(command, status=2)
  steps = assert_finite(tmp_path)
  advised = re.search(
    r'goes on from step (\d+) with a lower (--config\.[a-z_.]+) \(it is', line
  )
  if advised is None:  # the very first step was too far already
    assert not steps
    advised = re.search(
      r'(the same command begins anew), with a lower (--config\.[a-z_.]+)', line
    )
    assert advised
  else:
    assert int(advised[1]) == steps[-1]
  again = [flag for flag in command if 'learning_rate' not in flag]
  printed, _ = train([*again, f'{advised[2]}=1e-3'])
  assert f'changed  optimizer.learning_rate was {rate}, now 0.001' in printed
  assert_finite(tmp_path)
  last = runs.rows(tmp_path, 'train')[-1]
  assert last['step'] == STEPS and math.isfinite(float(last['gradient_norm']))


def test_a_gradient_that_was_never_finite_saves_nothing(
  folder: Path, tmp_path: Path
) -> None:
  changes = {'model__init_std': 1e15, 'checkpoint__every': 1}
  _, line = train(flags(folder, tmp_path, **changes), status=2)
  assert 'at step 3 (data position 3): the gradient norm is nan' in line
  assert 'in another --workdir' in line
  assert runs.checkpoints(tmp_path) == []


def test_a_spike_goes_back_too(folder: Path, tmp_path: Path) -> None:
  keys = {'spike': 20.0, 'window': 6}
  changes = {f'recovery__{key}': value for key, value in keys.items()}
  command = flags(folder, tmp_path, **changes)
  _, line = train([*command, '--config.optimizer.schedule=jump'], status=2)
  # The loss of step 11 is that of what step 10 left.
  assert 'at step 11 ' in line and 'robust deviations above' in line
  assert 'the same command goes on from step 8 with' in line
  [rollback] = runs.rows(tmp_path, 'rollback')
  assert rollback['rollbacks'] == 2 and rollback['step'] == 9
  # Twice back to position 8, and 6 behind the spike: it came at 11 and at 20.
  assert rollback['skipped'] == [[8, 20 + 6 - 8]]
  assert assert_finite(tmp_path) == [4, 8]
