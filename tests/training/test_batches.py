"""Batches are read while a step runs, and waiting for them is counted."""

import threading
import time
import types
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from moe_jax.config import derived
from moe_jax.training import batches as batches_lib
from moe_jax.training.batches import Batches
from tests.helpers import tiny

SIZE = 8


class Stream:
  """Batches whose numbers are their positions, each when it may be read."""

  def __init__(self, start: int) -> None:
    self.position, self.closed = start, False
    self.may_read = threading.Semaphore(0)
    self.read: list[int] = []
    self.fails_at = -1

  def __next__(self) -> dict[str, np.ndarray]:
    assert self.may_read.acquire(timeout=60)
    if self.position == self.fails_at:
      raise OSError('no such batch')
    self.read.append(self.position)
    self.position += 1
    return {'token_ids': np.full((SIZE, 4), self.read[-1])}

  def close(self) -> None:
    self.closed = True


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
  made: list[Stream] = []

  def opened(*_: object, start: int, **keys: object) -> Stream:
    del keys
    made.append(Stream(start))
    return made[-1]

  monkeypatch.setattr(batches_lib, 'train_batches', opened)
  return made


@pytest.fixture
def batches(streams: list[Stream]) -> Iterator[Batches]:
  axes = derived.MESH_AXES
  sizes = [len(jax.devices()) if axis == 'data' else 1 for axis in axes]
  kinds = (AxisType.Auto,) * len(axes)
  mesh = jax.make_mesh(sizes, axes, axis_types=kinds)
  setup = types.SimpleNamespace(
    mesh=mesh, config=tiny.config(train__batch_size=SIZE)
  )
  made = Batches(setup, types.SimpleNamespace(batch_size=SIZE), 5)
  yield made
  for stream in streams:
    stream.may_read.release(9)
  made.close()


def soon(true: object) -> None:
  deadline = time.monotonic() + 60
  while not true():
    assert time.monotonic() < deadline
    time.sleep(0.001)


def test_the_next_one_is_read_before_it_is_asked_for(
  batches: Batches, streams: list[Stream]
) -> None:
  [stream] = streams
  stream.may_read.release(2)
  first = next(batches)
  assert batches.position == 6  # what was handed out, and no more
  soon(lambda: stream.read == [5, 6])
  soon(lambda: batches._ahead.done())
  ahead = batches._ahead.result()
  assert isinstance(ahead['token_ids'], jax.Array)
  assert ahead['token_ids'].sharding == first['token_ids'].sharding
  assert int(first['token_ids'][0, 0]) == 5
  assert int(next(batches)['token_ids'][0, 0]) == 6


def test_waiting_is_counted_and_working_is_not(
  batches: Batches, streams: list[Stream]
) -> None:
  [stream] = streams
  threading.Timer(0.3, stream.may_read.release).start()
  next(batches)
  assert batches.waited > 0.2
  before = batches.waited
  stream.may_read.release()
  soon(lambda: batches._ahead.done())
  time.sleep(0.3)  # a step
  next(batches)
  assert batches.waited - before < 0.1


def test_seeking_drops_what_was_read_ahead(
  batches: Batches, streams: list[Stream]
) -> None:
  streams[0].may_read.release(2)
  next(batches)
  batches.seek(40)
  assert streams[0].closed
  streams[1].may_read.release()
  assert int(next(batches)['token_ids'][0, 0]) == 40
  assert batches.position == 41


def test_what_fails_ahead_fails_when_it_is_asked_for(
  batches: Batches, streams: list[Stream]
) -> None:
  """The step before it is saved first, if it is to be."""
  streams[0].fails_at = 6
  streams[0].may_read.release(2)
  next(batches)
  soon(lambda: batches._ahead.done())
  with pytest.raises(OSError, match='no such batch'):
    next(batches)
