"""How programs end: one line and a status for every fault, and no print."""

import errno
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from moe_jax import disk, exits
from moe_jax.config import loading
from moe_jax.errors import RetryableError, UserError


def status(run: Callable[[], None]) -> int:
  with pytest.raises(SystemExit) as stop:
    exits.exit_with(run)
  return stop.value.code


def raising(error: BaseException) -> Callable[[], None]:
  def run() -> None:
    raise error

  return run


def nested(depth: int = 0) -> None:
  nested(depth + 1)


def in_orbax() -> None:
  """As Orbax raises what reading an array failed with."""
  code = 'def read():\n  raise Exception("Encountered error")'
  names: dict = {}
  exec(compile(code, f'x{os.sep}orbax{os.sep}serialization.py', 'exec'), names)
  names['read']()


WORLD = {
  'OSError': (raising(OSError(errno.EIO, 'no answer', '/a/b')), 1, '/a/b'),
  'BrokenPipeError': (raising(BrokenPipeError()), 1, 'BrokenPipeError'),
  'MemoryError': (raising(MemoryError('745 GiB')), 1, '745 GiB'),
  'RecursionError': (nested, 1, 'maximum recursion'),
  'JaxRuntimeError': (
    raising(jax.errors.JaxRuntimeError('INTERNAL: lost')),
    1,
    'INTERNAL: lost',
  ),
  'Orbax': (in_orbax, 1, 'Encountered error'),
  'full': (raising(OSError(errno.ENOSPC, 'No space', '/a/b')), 75, '/a/b'),
  'full, in C++': (
    raising(ValueError('RESOURCE_EXHAUSTED: /c: No space left on device')),
    75,
    '/c',
  ),
}


@pytest.mark.parametrize('name', WORLD)
def test_a_fault_of_the_world_is_one_line_and_its_traceback_is_kept(
  name: str,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  run, expected, fragment = WORLD[name]
  for argv in ([f'--workdir={tmp_path}'], ['--workdir', str(tmp_path)]):
    monkeypatch.setattr(sys, 'argv', ['prog', *argv])
    assert status(run) == expected
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1 and err.startswith('error: ')
    assert fragment in err
    assert err.endswith(f'; the traceback is in {tmp_path}/crash.txt\n')
  kept = (tmp_path / 'crash.txt').read_text()
  assert kept.count('Traceback (most recent call last)') == 2
  assert f'process {os.getpid()} on ' in kept


def test_without_a_workdir_the_traceback_is_in_a_temporary_file(
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  for argv in ([], [f'--workdir={tmp_path}/nowhere']):
    monkeypatch.setattr(sys, 'argv', ['prog', *argv])
    assert status(raising(MemoryError())) == 1
    found = re.search(r'traceback is in (.*)\n', capsys.readouterr().err)
    assert found is not None
    path = Path(found[1])
    assert 'MemoryError' in path.read_text()
    path.unlink()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'error',
  [TypeError('a bug'), KeyError('a bug'), AssertionError(), Exception('ours')],
)
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
  with pytest.raises(type(error)) as raised:
    exits.exit_with(raising(error))
  assert raised.value is error


def test_mistakes_and_what_may_pass(
  capsys: pytest.CaptureFixture[str],
) -> None:
  assert status(raising(UserError('x is\nwrong'))) == 2
  assert status(raising(RetryableError('full'))) == os.EX_TEMPFAIL == 75
  assert capsys.readouterr() == ('', 'error: x is wrong\nerror: full\n')


class Broken(io.StringIO):
  """A terminal that is closed, a reader that has gone, or a full disk."""

  def __init__(self, number: int) -> None:
    super().__init__()
    self.number = number

  def write(self, text: str) -> int:
    raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(
  'number, expected',
  [(errno.EIO, 0), (errno.ENOSPC, 0), (errno.EPIPE, 141)],
)
def test_what_cannot_be_printed_ends_nothing(
  number: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(sys, 'stdout', Broken(number))
  monkeypatch.setattr(sys, 'stderr', Broken(number))
  done = []

  def run() -> None:
    print('a line')
    print('another', file=sys.stderr, flush=True)
    done.append(True)

  assert status(run) == expected
  assert done == [True]


def test_without_streams_and_with_a_narrow_one(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(sys, 'stdout', None)
  raw = io.BytesIO()
  monkeypatch.setattr(sys, 'stderr', io.TextIOWrapper(raw, encoding='ascii'))
  assert status(lambda: print('naïve', file=sys.stderr)) == 0
  assert raw.getvalue() == b'na\\xefve\n'


RAISES = {
  'a BaseException': ('class Own(BaseException): pass\nraise Own("no")', 'no'),
  'one that says nothing': (
    'class Own(Exception):\n  def __str__(self): raise KeyError\nraise Own()',
    'Own',
  ),
}


@pytest.mark.parametrize('name', RAISES)
def test_whatever_a_config_file_raises_is_one_line(
  name: str, tmp_path: Path
) -> None:
  code, fragment = RAISES[name]
  (tmp_path / 'mine.py').write_text(code)
  with pytest.raises(UserError, match=fragment):
    loading.load(str(tmp_path / 'mine.py'))
  with pytest.raises(UserError, match=fragment):
    loading.variants(str(tmp_path / 'mine.py'))


def test_a_disk_that_is_full_is_tried_again(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(disk, '_RETRY_SECONDS', 0.0)
  path = str(tmp_path / 'file')
  for number, tries, kind in (
    (errno.ENOSPC, 2, RetryableError),
    (errno.EIO, 2, RetryableError),
    (errno.EACCES, 1, UserError),
  ):
    left = []

    def write(number: int = number, left: list[int] = left) -> None:
      left.append(1)
      raise OSError(number, os.strerror(number), path)

    with pytest.raises(kind, match='cannot be written') as error:
      disk.retried(path, write)
    assert len(left) == tries and path in str(error.value)
    assert ('B free)' in str(error.value)) == (number == errno.ENOSPC)
  calls = iter([OSError(errno.ENOSPC, 'full'), None])

  def once() -> str:
    error = next(calls)
    if error:
      raise error
    return 'done'

  assert disk.retried(path, once) == 'done'
