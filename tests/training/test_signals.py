"""Signals between steps: of one process, and of one among several."""

import signal
from collections.abc import Iterator

import jax
import pytest
from jax.experimental import multihost_utils

from moe_jax.training.signals import SignalHandler

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def received() -> Iterator[list[int]]:
  """The signals that nobody else caught, in place of the end of the tests."""
  found: list[int] = []
  before = {
    number: signal.signal(number, lambda number, frame: found.append(number))
    for number in SIGNALS
  }
  yield found
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.mark.parametrize('number', SIGNALS)
def test_catches_the_first_signal_only(
  number: signal.Signals, received: list[int]
) -> None:
  with SignalHandler() as interrupt:
    assert not interrupt.stops(1)
    signal.raise_signal(number)
    assert interrupt.stops(2) and interrupt.signal == number
    assert received == []
    signal.raise_signal(number)
    assert received == [number]
  signal.raise_signal(number)
  assert received == [number, number]


def test_leaves_what_is_ignored(received: list[int]) -> None:
  """As under nohup."""
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  with SignalHandler() as interrupt:
    signal.raise_signal(signal.SIGHUP)
    assert not interrupt.stops(1)
  assert received == []


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGHUP])
def test_several_processes_hand_signals_to_the_preemption_service(
  number: signal.Signals, received: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
  """It catches SIGTERM, and says when all have come to the same step."""
  agreed = 7
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(
    multihost_utils, 'reached_preemption_sync_point', lambda s: s == agreed
  )
  with SignalHandler() as interrupt:
    signal.raise_signal(number)
    assert received == [signal.SIGTERM]
    assert [interrupt.stops(step) for step in (6, 7)] == [False, True]
    assert interrupt.signal == number


def test_a_signal_to_another_process_is_a_sigterm_here(
  received: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(
    multihost_utils, 'reached_preemption_sync_point', lambda step: True
  )
  with SignalHandler() as interrupt:
    assert interrupt.stops(1) and interrupt.signal == signal.SIGTERM
  assert received == []
