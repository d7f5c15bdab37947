"""One program at a time writes to a directory."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_jax.errors import RetryableError, UserError
from moe_jax.training import lock
from moe_jax.training.run_dir import RunDir
from tests.helpers import runs, tiny

HOLDS = """
import sys, time
from moe_jax.training import lock
with lock.held(sys.argv[1]):
  print('held', flush=True)
  time.sleep(float(sys.argv[2]))
"""


def holder(folder: Path, seconds: float) -> subprocess.Popen[str]:
  """Another process that holds a directory."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLDS, str(folder), str(seconds)],
    cwd=runs.ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == 'held\n'
  return process


def test_who_holds_a_directory_is_named(
  tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
  process = holder(tmp_path, 60)
  with pytest.raises(RetryableError) as error, lock.held(str(tmp_path), 0.3):
    raise AssertionError('it is not held')
  said = f'workdir {tmp_path} is in use by process {process.pid} on '
  assert str(error.value).startswith(said)
  assert capfd.readouterr().err.startswith(said)  # while it waited
  assert lock.NAME in os.listdir(tmp_path)
  # However that process ends, the lock goes with it.
  process.send_signal(signal.SIGKILL)
  process.communicate()
  with lock.held(str(tmp_path), 0.0):
    pass


def test_a_predecessor_may_still_be_ending(tmp_path: Path) -> None:
  process = holder(tmp_path / 'a', 1.0)
  with lock.held(str(tmp_path / 'a'), 60):
    assert process.wait(60) == 0
    text = (tmp_path / 'a' / lock.NAME).read_text()
    assert json.loads(text)['process'] == os.getpid()
  process.communicate()


def test_what_was_not_written_to_is_left_as_it_was(tmp_path: Path) -> None:
  with lock.held(str(tmp_path / 'a' / 'b')):
    assert (tmp_path / 'a' / 'b' / lock.NAME).exists()
  assert not list(tmp_path.iterdir())
  (tmp_path / 'a').mkdir()
  with lock.held(str(tmp_path / 'a')):
    (tmp_path / 'a' / 'file').write_text('')
  assert sorted(os.listdir(tmp_path / 'a')) == [lock.NAME, 'file']
  with lock.held(str(tmp_path / 'a')):
    pass
  assert sorted(os.listdir(tmp_path / 'a')) == [lock.NAME, 'file']


def test_a_file_system_without_locks_is_told(
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capfd: pytest.CaptureFixture[str],
) -> None:
  def refuse(file: object, operation: int) -> None:
    raise OSError(errno.ENOSYS, 'Function not implemented')

  monkeypatch.setattr(fcntl, 'flock', refuse)
  with lock.held(str(tmp_path)):
    pass
  err = capfd.readouterr().err
  assert err.count('\n') == 1
  assert f'nothing keeps another run out of workdir {tmp_path}' in err


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
  (tmp_path / 'file').write_text('')
  for path in ('file', 'file/run'):
    with pytest.raises(UserError, match='choose another --workdir'):
      lock.held(str(tmp_path / path)).__enter__()


def test_many_at_once_hold_it_in_turn(tmp_path: Path) -> None:
  """Also where each removes the directory that it made."""
  code = """
import os, sys
from moe_jax.training import lock
folder, inside = sys.argv[1:]
for _ in range(50):
  with lock.held(folder, 60.0):
    os.mkdir(inside)
    os.rmdir(inside)
"""
  command = [sys.executable, '-c', code, str(tmp_path / 'a')]
  processes = [
    subprocess.Popen(
      [*command, str(tmp_path / 'inside')],
      cwd=runs.ROOT,
      stderr=subprocess.PIPE,
      text=True,
    )
    for _ in range(4)
  ]
  for process in processes:
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
  # An empty folder may stay, where one was about to hold it.
  assert not list(tmp_path.rglob(lock.NAME))


def test_a_run_holds_its_directory_and_looks_again_at_whose_it_is(
  tmp_path: Path,
) -> None:
  config = tiny.config()
  run = RunDir.new_or_resumed(str(tmp_path), config)
  other = tiny.config(**{'model.hidden_size': 64})
  late = RunDir.new_or_resumed(str(tmp_path), other)
  with run.held():
    run.claim()
    began = time.monotonic()
    with pytest.raises(RetryableError), lock.held(str(tmp_path), 0.0):
      pass
    assert time.monotonic() - began < 5
  with pytest.raises(UserError, match='hidden_size'), late.held():
    pass
  with run.held():
    pass
