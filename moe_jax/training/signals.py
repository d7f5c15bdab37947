"""Stopping on a signal without losing the step in flight."""

import contextlib
import contextvars
import os
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from moe_jax import signals


class Interrupted(Exception):
  """An evaluation is left, for training is to stop."""


class SignalHandler:
  """Lets SIGINT, SIGTERM and SIGHUP stop a run after the step that runs.

  It catches them from `catch` on, which is called when there is something to
  save: before that they end the process as ever. What a second signal does is
  said in `moe_jax.signals`. One that is ignored, as under nohup, stays so.

  Where there are several processes, a signal to one of them stops all after the
  same step: jax's preemption service, which catches SIGTERM itself, finds one
  that none of them has passed. It costs no communication while there is no
  signal.

  Attributes:
    signal: The number of the signal that stops the run, None before.
  """

  def __init__(self) -> None:
    self.signal: int | None = None
    self._alone = jax.process_count() == 1
    self._stop = signals.Stop(
      'stopping after this step, saving what is to be saved',
      pass_on=None if self._alone else _preempt,
    )
    self._asked = 0
    self._stopped = False
    self._catching = contextlib.ExitStack()

  def __enter__(self) -> 'SignalHandler':
    return self

  def __exit__(self, *_: object) -> None:
    self._catching.close()

  def catch(self) -> None:
    """Catches signals from here on, until the context is left."""
    numbers = [
      number
      for number in signals.SIGNALS
      if self._alone or number != signal.SIGTERM
    ]
    self._catching.enter_context(
      signals.watched(self._stop.receive, numbers=numbers)
    )

  def stops(self) -> bool:
    """Returns whether to stop; of all processes alike.

    It is asked once after every step, and after every batch of an evaluation.
    """
    if not self._stopped:
      self._asked += 1
      self._stopped = (
        self._stop.signal is not None
        if self._alone
        else multihost_utils.reached_preemption_sync_point(self._asked)
      )
    if self._stopped and self.signal is None:
      self.signal = self._stop.signal or signal.SIGTERM
    return self._stopped

  @contextlib.contextmanager
  def leaving(self) -> Iterator[None]:
    """Lets `check` leave what is inside when the run is to stop."""
    token = _handler.set(self)
    try:
      yield
    except Interrupted:
      pass
    finally:
      _handler.reset(token)


_handler: contextvars.ContextVar[SignalHandler | None] = contextvars.ContextVar(
  'handler', default=None
)


def check() -> None:
  """Leaves an evaluation in the midst of a training that is to stop.

  Evaluations call it after every batch; elsewhere it does nothing. What is left
  is evaluated when the run goes on.

  Raises:
    Interrupted: Training is to stop; `SignalHandler.leaving` catches it.
  """
  handler = _handler.get()
  if handler is not None and handler.stops():
    raise Interrupted


def _preempt() -> None:
  """Tells jax's preemption service."""
  os.kill(os.getpid(), signal.SIGTERM)
