"""Stopping on a signal without losing the step in flight."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

# What Python says a signal does; None is a handler that is not Python's.
_Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SignalHandler:
  """Catches the first SIGINT, SIGTERM or SIGHUP; a second acts as always.

  A signal that is ignored, as under nohup, stays so. Where there are several
  processes, a signal to one of them stops all after the same step: jax's
  preemption service, which catches SIGTERM itself, finds one that none of them
  has passed. It costs no communication while there is no signal.

  Attributes:
    signal: The number of the signal that stops the run, None before.
  """

  def __init__(self) -> None:
    self.signal: int | None = None
    self._alone = jax.process_count() == 1
    self._previous: dict[int, _Handler] = {}

  def __enter__(self) -> 'SignalHandler':
    for number in _SIGNALS:
      is_ours = self._alone or number != signal.SIGTERM
      if is_ours and signal.getsignal(number) != signal.SIG_IGN:
        self._previous[number] = signal.signal(number, self._catch)
    return self

  def __exit__(self, *_: object) -> None:
    self._restore()

  def stops(self, step: int) -> bool:
    """Returns whether to stop after this step; of all processes alike.

    It is asked once after every step.
    """
    if self._alone:
      return self.signal is not None
    if not multihost_utils.reached_preemption_sync_point(step):
      return False
    self.signal = self.signal or signal.SIGTERM
    return True

  def _catch(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.signal = number
    self._restore()
    if not self._alone:
      signal.raise_signal(signal.SIGTERM)

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous.clear()
