"""What the processes of a run do together.

Each has rows of its own, of which arrays over all devices are made; and what
one finds on its disk, all have to know.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from orbax.checkpoint import multihost

from moe_jax.errors import UserError

T = TypeVar('T')

_A_DAY_MS = 24 * 3600 * 1000
_barriers = itertools.count()  # all processes come to the same ones, in order


class Rows:
  """The rows of a global batch that devices of this process hold.

  Attributes:
    local: their numbers, ascending.
  """

  def __init__(self, sharding: Sharding, num_rows: int) -> None:
    """Finds them.

    Args:
      sharding: of the batch's leading axis.
      num_rows: of the global batch.
    """
    found: set[int] = set()
    indices = sharding.addressable_devices_indices_map((num_rows,))
    for index in indices.values():
      found.update(range(*index[0].indices(num_rows)))
    self.local = sorted(found)
    self._place = {row: i for i, row in enumerate(self.local)}
    self._sharding = sharding
    self._num_rows = num_rows

  def join(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Joins every process's rows, `local` of each, to arrays over the mesh."""
    return {name: self._join(array) for name, array in batch.items()}

  def _join(self, local: np.ndarray) -> jax.Array:
    def piece(index: tuple[slice, ...]) -> np.ndarray:
      wanted = range(*index[0].indices(self._num_rows))
      return local[[self._place[row] for row in wanted]][:, *index[1:]]

    shape = (self._num_rows, *local.shape[1:])
    return jax.make_array_from_callback(shape, self._sharding, piece)


def is_alone() -> bool:
  """Whether this is the run's only process."""
  return jax.process_count() == 1


def is_first() -> bool:
  """Whether this process is the one that writes and prints."""
  return jax.process_index() == 0


def all_or_none(make: Callable[[], T]) -> T:
  """Returns `make()`; where it fails in one process, it fails in all.

  So nobody waits for a process that has gone. All processes call this alike.

  Raises:
    UserError: another process has failed.
  """
  if is_alone():
    return make()
  error = None
  try:
    made = make()
  except Exception as caught:
    error = caught
  _wait_for_all()
  failed = multihost_utils.process_allgather(np.array(error is not None))
  if error is not None:
    raise error
  if failed.any():
    raise UserError(
      f'process {failed.argmax()} of {len(failed)} has failed; its own message'
      ' says why'
    )
  return made


def in_turn(make: Callable[[], T]) -> T:
  """`all_or_none`, where process 0 is done before the others begin.

  So one process alone prepares what they all read.
  """
  made = all_or_none(lambda: make() if is_first() else None)
  rest = all_or_none(lambda: None if is_first() else make())
  return made if is_first() else rest


def of_first(number: int) -> int:
  """The number, below 2^31, that process 0 calls this with."""
  return int(multihost_utils.broadcast_one_to_all(np.array(number)))


def same(value: int, what: str) -> int:
  """Returns `value`, which all processes have to have found alike.

  Raises:
    UserError: they have not; `what` names it.
  """
  if is_alone():
    return value
  values = multihost_utils.process_allgather(np.array(value)).ravel()
  other = int((values != values[0]).argmax())
  if other:
    raise UserError(
      f'{what} is {values[0]} to process 0 and {values[other]} to process'
      f' {other}; all hosts have to share that file system'
    )
  return value


def _wait_for_all() -> None:
  """Waits until all processes are here, however long one of them takes.

  jax's coordinator is asked, and no device: on CPU a collective gives up after
  half a minute, and a data set may take hours to prepare.
  """
  wait = multihost.get_barrier_sync_fn()
  wait(key=f'moe_jax {next(_barriers)}', timeout_ms=_A_DAY_MS)
