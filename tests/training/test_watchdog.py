"""A process that is stuck shows where, and ends if it is asked to."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_jax.training.watchdog import Watchdog, waits_for

ROOT = Path(__file__).parents[2]
BEGIN = 'from moe_jax.training.watchdog import Watchdog, waits_for;'


def run(code: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-c', BEGIN + code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


def test_all_stacks_are_shown_once_with_what_is_waited_for(
  capfd: pytest.CaptureFixture[str],
) -> None:
  with Watchdog(1):
    waits_for('step 7')
    time.sleep(3.5)
  told = capfd.readouterr().err
  assert told.count('note: step 7 has not ended for 1 seconds') == 1
  assert '(most recent call first):' in told
  assert 'in test_all_stacks_are_shown_once' in told


def test_nothing_is_shown_while_something_ends_or_none_is_asked_for(
  capfd: pytest.CaptureFixture[str],
) -> None:
  with Watchdog(2):
    for step in range(12):
      waits_for(f'step {step}')
      time.sleep(0.25)
  with Watchdog(0):
    time.sleep(0.1)
  assert not capfd.readouterr().err


def test_it_ends_the_process_if_asked_to() -> None:
  done = run(
    'import time; watchdog = Watchdog(1, ends=True); watchdog.__enter__();'
    'waits_for("the save of step 3"); time.sleep(100)'
  )
  assert done.returncode == 75
  assert 'line 1 in <module>' in done.stderr
  assert (
    done.stderr.splitlines()[-1]
    == 'error: the save of step 3 has not ended for 1 seconds, so this process'
    ' ends (train.watchdog_exit); the same command goes on from the newest'
    ' checkpoint'
  )


@pytest.mark.slow
def test_stacks_are_shown_where_no_other_thread_can_run() -> None:
  # PyDLL keeps the interpreter's lock.
  done = run(
    'import ctypes, time; watchdog = Watchdog(1); watchdog.__enter__();'
    'time.sleep(0.6); ctypes.PyDLL(None).sleep(8)'
  )
  assert done.returncode == 0
  assert 'Timeout (0:00:06)' in done.stderr
  assert 'line 1 in <module>' in done.stderr
