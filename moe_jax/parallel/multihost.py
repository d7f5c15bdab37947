"""What the processes of a run do together.

Each process reads rows of its own, which are joined to arrays over all devices.
What one process finds on its disk, all of them have to know. And the copies of
an array that several devices hold have to be equal: nothing else would notice
where they are not, for a program that forgets a sum over devices may still call
its result replicated, and the loss is read from one device.
"""

import hashlib
import itertools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from orbax.checkpoint import multihost

from moe_jax.errors import RetryableError, UserError

T = TypeVar('T')

_A_DAY_MS = 24 * 3600 * 1000
_barriers = itertools.count()  # all processes come to the same ones, in order
_DIGEST_WORDS = 2  # of 32 bits, for jax would cut 64-bit ones


class Rows:
  """The rows of a global batch that devices of this process hold.

  Attributes:
    local: The numbers of these rows, ascending.
  """

  def __init__(self, sharding: Sharding, num_rows: int) -> None:
    """Finds the rows of this process.

    Args:
      sharding: The sharding of the batch's leading axis.
      num_rows: The number of rows of the global batch.
    """
    held: set[int] = set()
    indices = sharding.addressable_devices_indices_map((num_rows,))
    for index in indices.values():
      assert index is not None  # the devices are this process's
      held.update(range(*index[0].indices(num_rows)))
    self.local = sorted(held)
    self._place = {row: i for i, row in enumerate(self.local)}
    self._sharding = sharding
    self._num_rows = num_rows

  def join(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Joins every process's rows, `local` of each, to arrays over the mesh."""
    return {name: self._join(array) for name, array in batch.items()}

  def _join(self, local: np.ndarray) -> jax.Array:
    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None  # the devices are this process's
      wanted = range(*index[0].indices(self._num_rows))
      return local[[self._place[row] for row in wanted]][:, *index[1:]]

    shape = (self._num_rows, *local.shape[1:])
    return jax.make_array_from_callback(shape, self._sharding, piece)


def is_single_process() -> bool:
  """Returns whether this is the run's only process."""
  return jax.process_count() == 1


def is_main_process() -> bool:
  """Returns whether this process is the one that writes and prints."""
  return jax.process_index() == 0


def fail_together(make: Callable[[], T]) -> T:
  """Returns `make()`; where it fails in one process, it fails in all.

  So nobody waits for a process that has gone. All processes call this alike.

  Raises:
    UserError: Another process has failed.
    RetryableError: It has, and the same command may overcome that.
  """
  if is_single_process():
    return make()
  error = None
  try:
    result = make()
  except Exception as caught:
    error = caught
  _wait_for_all()
  mine = np.array([error is not None, not isinstance(error, RetryableError)])
  failed, final = multihost_utils.process_allgather(mine).T
  if error is not None:
    raise error
  if failed.any():
    kind = UserError if (failed & final).any() else RetryableError
    raise kind(
      f'process {failed.argmax()} of {len(failed)} has failed; its own message'
      ' says why'
    )
  return result


def first_process_first(make: Callable[[], T]) -> T:
  """Returns `make()`, which process 0 has done before the others begin.

  So one process alone prepares what they all read. Where one fails, all do.
  """
  first = fail_together(lambda: make() if is_main_process() else None)
  rest = fail_together(lambda: None if is_main_process() else make())
  return first if is_main_process() else rest  # type: ignore[return-value]


def any_process(flag: bool) -> bool:
  """Returns whether any process calls this with True; all call it alike."""
  if is_single_process():
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def broadcast_from_first(number: int) -> int:
  """Returns the number, below 2^31, that process 0 calls this with."""
  return int(multihost_utils.broadcast_one_to_all(np.array(number)))


def broadcast_text(text: str) -> str:
  """Returns the text that process 0 calls this with; all call it alike."""
  data = text.encode()
  size = broadcast_from_first(len(data))
  own = np.zeros(size, np.uint8)
  if is_main_process():
    own[:] = np.frombuffer(data, np.uint8)
  sent = np.asarray(multihost_utils.broadcast_one_to_all(own))
  return sent.astype(np.uint8).tobytes().decode()


def assert_equal(value: int, what: str) -> int:
  """Returns `value`, which has to be the same in all processes.

  Args:
    value: What this process found on the file system.
    what: The value's name, for the error.

  Raises:
    UserError: The values differ.
  """
  if is_single_process():
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


class ReplicaError(RuntimeError):
  """Copies of one array differ; the message names it and the devices."""


def check_replicas(tree: Any) -> None:
  """Compares all copies of every piece of every array, bit by bit.

  It reads all arrays of which there are copies into the memory of the hosts,
  one at a time. All processes call this alike, with the same tree.

  Args:
    tree: A tree of jax.Array, on any devices.

  Raises:
    ReplicaError: Copies differ. Every process raises it.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  arrays = [array for _, array in leaves]
  digests = _of_all_processes([_digests(array) for array in arrays])
  wrong = []
  for i, (path, array) in enumerate(leaves):
    for devices in _copies(array).values():
      groups: dict[bytes, list[int]] = {}
      for device in devices:
        groups.setdefault(digests[device.id][i].tobytes(), []).append(device.id)
      if len(groups) > 1:
        wrong.append((path, list(groups.values())))
  if wrong:
    raise ReplicaError(_message(wrong))


def _copies(array: jax.Array) -> dict[Hashable, list[jax.Device]]:
  """Returns the devices that hold the same piece, for pieces on several."""
  pieces: dict[Hashable, list[jax.Device]] = {}
  indices = array.sharding.devices_indices_map(array.shape)
  for device, index in indices.items():
    sides = zip(index, array.shape, strict=True)
    place = tuple(side.indices(size) for side, size in sides)
    pieces.setdefault(place, []).append(device)
  return {place: held for place, held in pieces.items() if len(held) > 1}


def _digests(array: jax.Array) -> dict[int, np.ndarray]:
  """Returns a digest for every device of this process that holds a copy."""
  held = {device for devices in _copies(array).values() for device in devices}
  return {
    shard.device.id: _digest(shard.data)
    for shard in array.addressable_shards
    if shard.device in held
  }


def _digest(data: jax.Array) -> np.ndarray:
  bits = hashlib.blake2b(
    np.asarray(data).tobytes(), digest_size=4 * _DIGEST_WORDS
  )
  return np.frombuffer(bits.digest(), np.uint32)


def _of_all_processes(
  digests: list[dict[int, np.ndarray]],
) -> dict[int, np.ndarray]:
  """Returns, for every device of the run, digests uint32 [arrays, words]."""
  none = np.zeros(_DIGEST_WORDS, np.uint32)
  local = [device.id for device in jax.local_devices()]
  table = np.stack(
    [np.stack([of.get(id, none) for of in digests]) for id in local]
  )
  ids, tables = np.array(local), table
  if jax.process_count() > 1:
    ids, tables = multihost_utils.process_allgather((ids, table), tiled=True)
  return dict(zip(ids.tolist(), tables, strict=True))


def _message(wrong: list[tuple[Any, list[list[int]]]]) -> str:
  path, groups = wrong[0]
  parts = ' and '.join(f'on {", ".join(map(str, group))}' for group in groups)
  names = list(dict.fromkeys(jax.tree_util.keystr(path) for path, _ in wrong))
  more = f'; so do those of {len(names) - 1} more arrays' if names[1:] else ''
  return (
    f'the copies of {names[0]} differ between devices: one {parts} (ids){more}'
  )
