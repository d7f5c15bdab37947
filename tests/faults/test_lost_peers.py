"""Processes of a run are killed: the others say which, end, and all go on.

Real processes on this machine, with Gloo between them.
"""

import itertools
import json
import random
import signal
import socket
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax.data import folders
from tests.helpers import marks, pairs, runs, tiny
from tests.helpers.nursery import Nursery
from tests.helpers.pairs import PATIENCE, Pair

SEED = 20
STEPS = 50
SAVE, EVALUATE = 3, 4  # every so many steps
# Seconds; what is promised is 15, to a machine with nothing else to do.
BOUND = 45
DEVICES = 2  # of all processes together


@pytest.fixture(scope='module')
def config(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
  """A model of one layer that is saved and evaluated all the time."""
  texts = tmp_path_factory.mktemp('texts')
  library = Path(sysconfig.get_path('stdlib'))
  names = [f'part-{i}.txt' for i in range(200)]
  for split, sources in (
    ('train', ('heapq.py', 'shlex.py')),
    ('validation', ('textwrap.py',)),
  ):
    of_split = [name for name in names if folders.split_of(name) == split]
    for name, source in zip(of_split, sources, strict=False):
      (texts / name).write_text((library / source).read_text('utf-8'))
  return tiny.config(
    **{
      'data.name': 'text_folder',
      'data.path': str(texts),
      'data.dir': str(tmp_path_factory.mktemp('prepared')),
      'model.num_layers': 1,
      'moe.num_experts': 4,
      'train.steps': STEPS,
      'train.log_every': 1,
      'checkpoint.every': SAVE,
      'eval.every': EVALUATE,
      'eval.batches': 20,
    }
  )


@pytest.fixture(scope='module')
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
  """Forks processes of one device each."""
  folder = tmp_path_factory.mktemp('statuses')
  with Nursery(folder, pairs.ENV | {'JAX_NUM_CPU_DEVICES': '1'}) as nursery:
    yield nursery


def start(nursery: Nursery, config: ConfigDict, workdir: Path) -> Pair:
  return Pair('train.py', runs.arguments(config, workdir), nursery=nursery)


@pytest.fixture(scope='module')
def undisturbed(
  nursery: Nursery,
  config: ConfigDict,
  tmp_path_factory: pytest.TempPathFactory,
) -> Path:
  """The directory of a run of two processes that nobody kills."""
  workdir = tmp_path_factory.mktemp('undisturbed')
  watched = config.copy_and_resolve_references()
  watched.train.watchdog = 1
  with start(nursery, watched, workdir) as pair:
    assert pair.wait() == [0, 0], pair.report()
    for i in (0, 1):  # its first step is compiled, which takes longer
      assert ' has not ended for 1 seconds (train.watchdog)' in pair.errors(i)
  return workdir


def trained(workdir: Path) -> int:
  """The last step in metrics.jsonl."""
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().split('\n')[:-1] if path.exists() else []
  return json.loads(lines[-1])['step'] if lines else 0


def whole(workdir: Path) -> list[int]:
  """The steps of the checkpoints that are complete."""
  names = [path.name for path in (workdir / 'checkpoints').glob('*')]
  return [int(name) for name in names if name.isdecimal()]


def wait_for(reached: Callable[[], bool], pair: Pair) -> None:
  deadline = time.monotonic() + PATIENCE
  while not reached():
    assert time.monotonic() < deadline, pair.report()
    assert pair.processes[0].poll() is None, pair.report()
    time.sleep(0.002)


def wait_for_moment(
  moment: str, pair: Pair, workdir: Path, chance: random.Random
) -> None:
  """Waits for a step, a save or an evaluation of this start."""
  before = trained(workdir)
  if moment == 'compile':
    pair.wait_for('compiling')
    time.sleep(chance.uniform(0, 0.5))
    return
  wait_for(lambda: trained(workdir) >= before + SAVE, pair)
  if moment == 'save':
    unfinished = '*.orbax-checkpoint-tmp*'
    folder = workdir / 'checkpoints'
    wait_for(lambda: any(folder.glob(unfinished)), pair)
  elif moment == 'evaluation':
    # The row of the step is written, and that of its evaluation not yet.
    wait_for(lambda: trained(workdir) % EVALUATE == 0, pair)
  else:
    time.sleep(chance.uniform(0, 0.3))


def kills(count: int) -> Iterator[tuple[str, int]]:
  moments = ('step', 'save', 'evaluation', 'step', 'compile')
  return itertools.islice(
    zip(itertools.cycle(moments), itertools.cycle((1, 0, 0, 1, 1, 0))), count
  )


def assert_same(config: ConfigDict, workdir: Path, expected: Path) -> None:
  """Bit by bit: every logged loss, and every array of the last checkpoint."""
  found, wanted = (
    [
      (row['step'], row['split'], row['loss'], row.get('gradient_norm'))
      for row in runs.rows(path)
    ]
    for path in (workdir, expected)
  )
  assert found == wanted
  jax.tree.map(
    np.testing.assert_array_equal,
    runs.restore(config, workdir, STEPS),
    runs.restore(config, expected, STEPS),
  )


@pytest.mark.slow
@pytest.mark.parametrize('count', marks.at_first(1, (3, 10)))
def test_the_other_process_says_which_has_gone_and_the_next_start_goes_on(
  count: int,
  nursery: Nursery,
  config: ConfigDict,
  undisturbed: Path,
  tmp_path: Path,
) -> None:
  workdir = tmp_path / 'killed'
  chance = random.Random(SEED)
  for moment, target in kills(count):
    with start(nursery, config, workdir) as pair:
      wait_for_moment(moment, pair, workdir, chance)
      step = trained(workdir)
      pair.processes[target].kill()
      began = time.monotonic()
      statuses = pair.wait()
      seconds = time.monotonic() - began
      told = pair.errors(1 - target)
    (line,) = [at for at in told.splitlines() if at.startswith('error: ')]
    print(
      f'seed {SEED}: process {target} killed in {moment} after step {step}:'
      f' {seconds:.1f} s, {len(told.splitlines())} lines: {line}'
    )
    assert statuses[target] == -signal.SIGKILL
    assert statuses[1 - target] == 75, told
    assert f'process {target} of 2 (host ' in line
    assert 'has gone; its own log says why; ' in line
    assert 'Traceback' not in told
    assert seconds < BOUND
    newest = max(whole(workdir), default=0)
    assert (f'goes on from step {newest}' if newest else 'begins anew') in line

  with start(nursery, config, workdir) as pair:
    assert pair.wait() == [0, 0], pair.report()
  assert_same(config, workdir, undisturbed)


@pytest.mark.slow
def test_two_processes_are_followed_by_one_and_that_by_two(
  nursery: Nursery, config: ConfigDict, undisturbed: Path, tmp_path: Path
) -> None:
  workdir = tmp_path / 'killed'
  with start(nursery, config, workdir) as pair:
    wait_for(lambda: bool(whole(workdir)), pair)
    pair.processes[0].kill()
    assert pair.wait() == [-signal.SIGKILL, 75], pair.report()

  before = len(whole(workdir))
  with tempfile.TemporaryFile() as output:
    flags = runs.arguments(config, workdir)
    alone = nursery.fork(
      ['train.py', *flags], output, output, jax_num_cpu_devices=DEVICES
    )
    deadline = time.monotonic() + PATIENCE
    while len(whole(workdir)) == before and time.monotonic() < deadline:
      time.sleep(0.01)
    alone.kill()
    assert alone.wait() == -signal.SIGKILL
  assert len(whole(workdir)) > before

  with start(nursery, config, workdir) as pair:
    assert pair.wait() == [0, 0], pair.report()
  assert_same(config, workdir, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('error', 'failing', 'status', 'told'),
  [
    ('mistake', 1, 2, 'error: no disk'),
    ('bug', 0, 1, "KeyError: 'of ours'"),
  ],
)
def test_who_fails_alone_keeps_nobody_waiting(
  error: str, failing: int, status: int, told: str, nursery: Nursery
) -> None:
  program = 'tests/helpers/fails_alone.py'
  with Pair(program, [error, str(failing)], nursery=nursery) as pair:
    began = time.monotonic()
    statuses = pair.wait()
    print(f'{error} of process {failing}: {time.monotonic() - began:.1f} s')
    assert statuses[failing] == status, pair.report()
    assert statuses[1 - failing] == 75, pair.report()
    assert told in pair.errors(failing)
    assert (
      f'error: process {failing} of 2 (host {socket.gethostname()}) has ended'
      f' with status {status}; its own log says why; give the same command'
      ' again\n'
    ) in pair.errors(1 - failing)
    assert time.monotonic() - began < BOUND + 60
