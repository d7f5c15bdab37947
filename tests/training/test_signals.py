"""Signals between steps: of one process, and of one among several."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import jax
import pytest
from jax.experimental import multihost_utils

from moe_jax import signals as watching
from moe_jax.training import signals
from moe_jax.training.signals import SignalHandler

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def received() -> Iterator[list[int]]:
  """The signals that nobody else caught, in place of the end of the tests."""
  found: list[int] = []
  with watching.watched(found.append):
    yield found


def wait_until(true: Callable[[], object]) -> None:
  deadline = time.monotonic() + 20
  while not true() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert true()


@pytest.mark.parametrize('number', SIGNALS)
def test_catches_signals_when_there_is_something_to_save(
  number: signal.Signals, received: list[int]
) -> None:
  with SignalHandler() as handler:
    signal.raise_signal(number)
    wait_until(lambda: received)
    assert not handler.stops()
    handler.catch()
    assert not handler.stops()
    signal.raise_signal(number)
    wait_until(handler.stops)
    signal.raise_signal(number)  # too soon to count
    assert handler.signal == number and handler.stops()
    assert received == [number]
  signal.raise_signal(number)
  wait_until(lambda: received == [number, number])


def test_leaves_an_evaluation() -> None:
  with SignalHandler() as handler:
    handler.catch()
    with handler.leaving():
      signals.check()
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(handler.stops)
    signals.check()  # outside of one it does nothing
    with handler.leaving():
      signals.check()
      raise AssertionError('it went on')
  assert handler.signal == signal.SIGTERM


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGHUP])
def test_several_processes_hand_signals_to_the_preemption_service(
  number: signal.Signals, received: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
  """It catches SIGTERM, and says when all have come to the same step."""
  agreed = 2
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(
    multihost_utils, 'reached_preemption_sync_point', lambda s: s == agreed
  )
  service: list[int] = []
  before = signal.signal(
    signal.SIGTERM, lambda number, frame: service.append(number)
  )
  try:
    with SignalHandler() as handler:
      handler.catch()
      signal.raise_signal(number)
      wait_until(lambda: service)
      # Once it has said so, it is not asked again.
      assert [handler.stops() for _ in range(3)] == [False, True, True]
      assert handler.signal == number
  finally:
    signal.signal(signal.SIGTERM, before)
  assert received == []


def test_a_signal_to_another_process_is_a_sigterm_here(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(
    multihost_utils, 'reached_preemption_sync_point', lambda step: True
  )
  with SignalHandler() as handler:
    assert handler.stops() and handler.signal == signal.SIGTERM
