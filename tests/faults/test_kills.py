"""Fifty SIGKILLs of real runs, after each of which the same command goes on.

A third each falls into ordinary steps, into a start, and into a save.
"""

import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.config import loading
from tests.helpers import marks, runs
from tests.helpers.forks import Forked, Server

pytestmark = pytest.mark.slow

STEPS, EVERY = 400, 20
WORKDIRS, KILLS = 5, 10
CONFIG = 'tests/helpers/slow_config.py'
START_SECONDS = 3.0  # which a start about takes


@pytest.fixture(scope='module')
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
  """A run whose steps, saves and evaluations take turns."""
  changes = {
    'data.dir': tmp_path_factory.mktemp('prepared'),
    'router.recurrent': 'gru',
    'train.steps': STEPS,
    'train.batch_size': 8,  # which the eight devices of the tests divide
    'checkpoint.every': EVERY,
    'eval.every': 3 * EVERY,
    'eval.evaluations': 'perplexity',
    'optimizer.decay_steps': STEPS,
  }
  keys = [f'--config.{key}={value}' for key, value in changes.items()]
  return [f'--config={CONFIG}', *keys]


@pytest.fixture(scope='module')
def straight(
  server: Server, flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
  """The workdir of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp('straight') / 'run'
  finish(server, flags, workdir)
  return workdir


def finish(server: Server, flags: list[str], workdir: Path) -> None:
  run = server.start(flags, workdir)
  status, _ = run.ends(300)
  assert status == 0, run.errors()


def lines(workdir: Path) -> int:
  """How many lines metrics.jsonl has: one a step, and those of evaluations."""
  path = workdir / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


def is_saving(workdir: Path) -> bool:
  return any(workdir.glob('checkpoints/*.orbax-checkpoint-tmp'))


def wait(run: Forked, moment: str, rng: random.Random) -> None:
  """Waits for the moment of a kill, or for the end of the run."""
  before = lines(run.workdir)
  if moment == 'start':
    time.sleep(rng.uniform(0, START_SECONDS))
    return
  more = rng.randint(2, EVERY)
  while run.process.is_alive():
    if moment == 'step' and lines(run.workdir) >= before + more:
      return
    if moment == 'save' and is_saving(run.workdir):
      return
    time.sleep(0.002)


@pytest.mark.parametrize('seed', marks.at_first(1, range(WORKDIRS)))
def test_a_run_that_is_killed_ends_as_one_that_is_not(
  seed: int, server: Server, flags: list[str], straight: Path, tmp_path: Path
) -> None:
  rng, workdir, killed = random.Random(seed), tmp_path / 'run', []
  for kill in range(KILLS):
    moment = ('step', 'start', 'save')[kill % 3]
    run = server.start(flags, workdir)
    wait(run, moment, rng)
    assert run.process.is_alive(), run.errors()
    run.signal(signal.SIGKILL)
    assert run.ends()[0] == -signal.SIGKILL
    killed.append(f'{moment} {lines(workdir)}')
  finish(server, flags, workdir)
  print(f'seed {seed}, killed at lines:', ', '.join(killed))
  assert runs.timeless_rows(workdir) == runs.timeless_rows(straight)
  config = loading.of_run(str(workdir))
  ours, theirs = (
    runs.restore(config, each, STEPS) for each in (workdir, straight)
  )
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
