"""Stopping on a signal without losing the step in flight."""

import signal
from types import FrameType


class Interrupt:
  """Catches the first SIGINT or SIGTERM; a second one acts as it always does.

  Attributes:
    signal: the number of the signal caught, None before.
  """

  def __init__(self) -> None:
    self.signal: int | None = None
    self._previous: dict[int, object] = {}

  def __enter__(self) -> 'Interrupt':
    for number in (signal.SIGINT, signal.SIGTERM):
      self._previous[number] = signal.signal(number, self._catch)
    return self

  def __exit__(self, *_: object) -> None:
    self._restore()

  def _catch(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.signal = number
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous.clear()
