"""Disks filled under real runs: one line, status 75, and the same goes on.

The disk is a small one in memory, in a namespace of its own, which needs no
rights where the kernel lets users make namespaces.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.helpers import runs

pytestmark = pytest.mark.slow

CONFIG = '--config=tests/helpers/slow_config.py'
SIZE = 8 << 20


class Disk:
  """A small disk, which only programs that are run on it see at its path."""

  def __init__(self, path: Path) -> None:
    path.mkdir()
    self.path = path
    mount = f'mount -t tmpfs -o size={SIZE} none {path} && echo ready && cat'
    self._holder = subprocess.Popen(
      ['unshare', '-Urm', 'sh', '-c', mount],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    assert self._holder.stdout is not None
    if self._holder.stdout.readline() != 'ready\n':
      _, err = self._holder.communicate()
      pytest.skip(f'no disk can be mounted here: {err.strip()}')
    # The same, as it is seen from here.
    self.seen = Path(f'/proc/{self._holder.pid}/root{path}')

  def close(self) -> None:
    """Ends the namespace, and what is on the disk with it."""
    self._holder.communicate('')

  def start(self, program: str, flags: Sequence[str]) -> subprocess.Popen[str]:
    """Starts train.py or eval.py where the disk is."""
    enter = ['nsenter', f'--target={self._holder.pid}', '-U', '-m']
    enter += ['--preserve-credentials', 'env', '-C', str(runs.ROOT)]
    cache = {
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': str(self.path.with_name('compiled')),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    return subprocess.Popen(
      [*enter, sys.executable, program, *flags],
      env=os.environ | cache,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def fill(self, but: int = 0) -> None:
    """Leaves `but` bytes free."""
    with open(self.seen / 'ballast', 'wb', buffering=0) as file:
      try:
        while file.write(bytes(4096)) == 4096:
          pass
      except OSError:
        pass
      file.truncate(max(file.tell() - but, 0))

  def make_room(self) -> None:
    """Takes away what filled it."""
    (self.seen / 'ballast').unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
  made = Disk(tmp_path / 'disk')
  yield made
  made.close()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def wait_for(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
  deadline = time.monotonic() + 200
  while not true():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.01)


def assert_says_so(done: tuple[int, str, str], *fragments: str) -> str:
  """Status 75, and one line, returned, with the path and what it lacks."""
  status, _, err = done
  print(err)
  assert status == os.EX_TEMPFAIL, err
  (line,) = [each for each in err.splitlines() if each.startswith('error: ')]
  assert 'No space left on device' in line
  for fragment in fragments:
    assert fragment in line
  return line


def checkpoints(workdir: Path) -> list[int]:
  folder = workdir / 'checkpoints'
  names = os.listdir(folder) if folder.exists() else []
  return sorted(int(name) for name in names if name.isdecimal())


def assert_goes_on(disk: Disk, flags: list[str], workdir: Path) -> None:
  """With room again, to its end, with every line once."""
  last = checkpoints(disk.seen / workdir)[-1] + 2
  more = [*flags, f'--config.train.steps={last}']
  status, out, err = finish(disk.start('train.py', more))
  assert status == 0, err
  assert 'damaged' not in err
  steps = [row['step'] for row in runs.rows(disk.seen / workdir, 'train')]
  assert steps == list(range(1, last + 1)), out


def test_the_workdir_of_a_start(disk: Disk, tmp_path: Path) -> None:
  flags = [CONFIG, f'--config.data.dir={tmp_path}/data']
  flags += [f'--workdir={disk.path}/run', '--config.train.steps=10']
  disk.fill()
  assert_says_so(finish(disk.start('train.py', flags)), f'{disk.path}/run')
  assert not (disk.seen / 'run' / 'config.json').exists()
  disk.make_room()
  status, _, err = finish(disk.start('train.py', flags))
  assert status == 0, err


@pytest.mark.parametrize(
  'free, said',
  [(0, ('metrics.jsonl',)), (250_000, ('metrics.jsonl', '/checkpoints/'))],
)
def test_the_workdir_of_a_run(
  free: int, said: tuple[str, ...], disk: Disk, tmp_path: Path
) -> None:
  """Full in the midst of steps; or almost, so that a save has no room.

  A save that fills the disk may be told by the line of a step that finds none.
  """
  flags = [CONFIG, f'--config.data.dir={tmp_path}/data']
  flags += [f'--workdir={disk.path}/run', '--config.eval.every=0']
  flags += ['--config.checkpoint.every=200']
  process = disk.start('train.py', flags)
  wait_for(process, lambda: bool(checkpoints(disk.seen / 'run')))
  disk.fill(free)
  line = assert_says_so(finish(process))
  assert any(name in line for name in said)
  disk.make_room()
  assert_goes_on(disk, flags, Path('run'))


def test_the_prepared_data(disk: Disk, tmp_path: Path) -> None:
  flags = [CONFIG, f'--config.data.dir={disk.path}/data']
  flags += [f'--workdir={tmp_path}/run', '--config.train.steps=10']
  disk.fill(10_000)
  done = finish(disk.start('train.py', flags))
  assert_says_so(done, f'{disk.path}/data')
  assert not (tmp_path / 'run').exists()
  disk.make_room()
  status, _, err = finish(disk.start('train.py', flags))
  assert status == 0, err


def test_what_a_run_can_do_without_and_an_evaluation(
  disk: Disk, tmp_path: Path
) -> None:
  """TensorBoard's files and traces are given up, which is told once."""
  workdir = tmp_path / 'run'
  workdir.mkdir()
  for name in ('tensorboard', 'profile', 'evaluation'):
    (workdir / name).symlink_to(disk.path / name)
    (disk.seen / name).mkdir()
  flags = [CONFIG, f'--config.data.dir={tmp_path}/data']
  flags += [f'--workdir={workdir}']
  disk.fill()
  training = ['--config.train.steps=10', '--config.train.profile=5:2']
  status, out, err = finish(disk.start('train.py', [*flags, *training]))
  assert status == 0, err
  assert out.count(f'{workdir}/tensorboard cannot be written: No space') == 1
  assert err.count(f'{workdir}/profile has no whole trace') == 1
  assert 'Traceback' not in err
  assert len(runs.rows(workdir, 'train')) == 10
  asked = [f'--workdir={workdir}', '--config.eval.evaluations=perplexity']
  done = finish(disk.start('eval.py', asked))
  assert_says_so(done, f'{workdir}/evaluation/validation-10.json')
  assert 'validation' in done[1]  # it was printed
  disk.make_room()
  status, _, err = finish(disk.start('eval.py', asked))
  assert status == 0, err
