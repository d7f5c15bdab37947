"""Shows where a process is stuck, when nothing has ended for a long time.

A collective that waits for a device or a host in vain raises no error. All
Python stacks of all threads on stderr say where it is, on every host.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from typing import Self

_STDERR = 2  # the descriptor: what sys.stderr is may have none
# What is waited for, and since when; there is one process to watch.
_waiting = ('the start', 0.0)


def waits_for(what: str) -> None:
  """Says that what went before has ended, and what is waited for now.

  It only sets a variable, so it may be called at every step.

  Args:
    what: For example 'step 12', for the line that the watchdog prints.
  """
  global _waiting
  _waiting = what, time.monotonic()


class Watchdog:
  """As a context, dumps all stacks once nothing has ended for a set time.

  `waits_for` is what tells it of ends. It dumps once for each wait; where it is
  to end the process, the status is 75, `EX_TEMPFAIL`.
  """

  def __init__(self, seconds: int, ends: bool = False) -> None:
    """Sets the time.

    Args:
      seconds: How long nothing may end; 0 watches nothing.
      ends: Whether the process ends after the dump.
    """
    self._seconds = seconds
    self._ends = ends
    self._stop = threading.Event()
    self._thread = threading.Thread(
      target=self._watch, name='watchdog', daemon=True
    )

  def __enter__(self) -> Self:
    waits_for('the start')
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._stop.set()
    if self._seconds:
      self._thread.join(1)  # not for ever: its terminal may be stuck

  def _watch(self) -> None:
    seen = None
    while not self._stop.wait(min(1.0, self._seconds / 4)):
      what, since = waiting = _waiting
      if waiting != seen:
        # Should something keep this thread, too, from running. It is only set
        # here and not at every step, for it starts a thread.
        faulthandler.dump_traceback_later(
          self._seconds + 5, exit=self._ends, file=_STDERR
        )
        seen, told = waiting, False
      elif not told and time.monotonic() - since >= self._seconds:
        self._tell(what)
        told = True
    faulthandler.cancel_dump_traceback_later()

  def _tell(self, what: str) -> None:
    faulthandler.cancel_dump_traceback_later()
    _print(
      f'note: {what} has not ended for {self._seconds} seconds'
      ' (train.watchdog); this is where each thread is:'
    )
    faulthandler.dump_traceback(file=_STDERR)
    if self._ends:
      _print(
        f'error: {what} has not ended for {self._seconds} seconds, so this'
        ' process ends (train.watchdog_exit); the same command goes on from the'
        ' newest checkpoint'
      )
      os._exit(os.EX_TEMPFAIL)


def _print(line: str) -> None:
  with contextlib.suppress(OSError, ValueError):  # the terminal is gone
    print(line, file=sys.stderr, flush=True)
