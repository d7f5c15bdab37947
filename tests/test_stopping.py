"""Signals: what learns of them, when, and what a second one does."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_jax import signals

ROOT = Path(__file__).parents[1]


def wait_until(true: Callable[[], object]) -> None:
  deadline = time.monotonic() + 20
  while not true() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert true()


@pytest.fixture
def others() -> Iterator[list[int]]:
  """The signals that who watched before has got."""
  found: list[int] = []
  with signals.watched(found.append):
    yield found


@pytest.mark.parametrize('number', signals.SIGNALS)
def test_who_watches_last_gets_them(
  number: signal.Signals, others: list[int]
) -> None:
  found: list[int] = []
  with signals.watched(found.append):
    signal.raise_signal(number)
    wait_until(lambda: found)
  assert (found, others) == ([number], [])
  signal.raise_signal(number)
  wait_until(lambda: others)
  assert (found, others) == ([number], [number])


def test_one_that_is_ignored_stays_so(others: list[int]) -> None:
  """As under nohup."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  found: list[int] = []
  try:
    with signals.watched(found.append):
      signal.raise_signal(signal.SIGHUP)
      signal.raise_signal(signal.SIGTERM)
      wait_until(lambda: found)
  finally:
    signal.signal(signal.SIGHUP, before)
  assert (found, others) == ([signal.SIGTERM], [])


def test_a_forked_process_has_its_own(others: list[int]) -> None:
  """Who ends a worker of a pool does not end the run."""
  end, start = os.pipe()
  child = os.fork()
  if not child:
    os.write(start, b'.')
    time.sleep(60)
    os._exit(0)
  os.read(end, 1)
  os.kill(child, signal.SIGTERM)
  assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
  time.sleep(0.1)
  assert others == []
  os.close(start)
  os.close(end)


def test_a_second_signal_counts_when_it_is_late(
  monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
  now = [100.0]
  monkeypatch.setattr(signals.time, 'monotonic', lambda: now[0])
  ended: list[int] = []
  stop = signals.Stop('saving', end=ended.append)
  assert stop.signal is None
  stop.receive(signal.SIGTERM)
  now[0] += 0.02
  stop.receive(signal.SIGTERM)
  now[0] += signals.PATIENCE - 0.1
  stop.receive(signal.SIGINT)
  assert (stop.signal, ended) == (signal.SIGTERM, [])
  now[0] += 0.2
  stop.receive(signal.SIGINT)
  assert (stop.signal, ended) == (signal.SIGTERM, [signal.SIGINT])
  first, *again = capfd.readouterr().err.splitlines()
  assert first == 'SIGTERM: saving; once more after 5 s ends it at once'
  assert [line.split(',')[0] for line in again] == [
    'SIGTERM again',
    'SIGINT again',
  ]


# What a program does when the signal comes, how it is told, and in what time.
BUSY = {
  'in the interpreter': 'while True: pass',
  'in C': 'import hashlib; hashlib.pbkdf2_hmac("md5", b"", b"", 2**31 - 1)',
  'in imports that turn it into another error': """
try:
  while True: pass
except KeyboardInterrupt as error:
  raise ImportError('numpy') from error""",
  'in code that swallows it': """
while True:
  try:
    while True: pass
  except KeyboardInterrupt: pass""",
}


@pytest.mark.parametrize('number', signals.SIGNALS)
@pytest.mark.parametrize('what', BUSY)
def test_a_program_with_nothing_to_save_ends_in_silence(
  what: str, number: signal.Signals
) -> None:
  code = 'print("ready", flush=True)\n' + BUSY[what]
  program = (
    'import sys; from moe_jax import exits, signals\n'
    'signals._TO_UNWIND = 1.0\n'
    f'exits.exit_with(lambda: exec({code!r}, {{}}))'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', program],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(number)
  began = time.monotonic()
  with contextlib.closing(process.stdout):
    _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (128 + number, '')
  assert time.monotonic() - began < 10


def test_nothing_new_begins_where_it_was_swallowed() -> None:
  """A destructor swallows it; the training does not begin all the same."""
  code = """
import signal
from moe_jax import exits, signals
def run():
  try:
    signal.raise_signal(signal.SIGTERM)
    while True: pass
  except KeyboardInterrupt: pass
  with signals.watched(print):
    print('trains')
exits.exit_with(run)
"""
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.returncode, done.stdout, done.stderr) == (
    128 + signal.SIGTERM,
    '',
    '',
  )


def test_temporary_files_are_removed_first(tmp_path: Path) -> None:
  code = (
    'import tempfile, time; from moe_jax import exits\n'
    'def run():\n'
    f'  with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):\n'
    '    print("ready", flush=True); time.sleep(60)\n'
    'exits.exit_with(run)'
  )
  with subprocess.Popen(
    [sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout is not None
    assert process.stdout.readline() == 'ready\n'
    assert len(list(tmp_path.iterdir())) == 1
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
  assert not list(tmp_path.iterdir())
