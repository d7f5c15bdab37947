"""Whether what devices hold in several copies is the same in all of them.

Nothing else would notice: a program that forgets a sum over devices may still
call its result replicated, a loss is read from one device, and copies that
have parted stay apart.
"""

import hashlib
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_DIGEST_WORDS = 2  # of 32 bits: jax would cut longer ones


class ReplicaError(RuntimeError):
  """Copies of one array differ; the message names it and the devices."""


def check(tree: Any) -> None:
  """Compares all copies of every piece of every array, bit by bit.

  It reads all arrays of which there are copies into the memory of the hosts,
  one at a time. All processes call this alike, with the same tree.

  Args:
    tree: of jax.Array, on any devices.

  Raises:
    ReplicaError: copies differ, in every process alike.
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
  """The devices that hold the same piece, by piece; where there are several."""
  pieces: dict[Hashable, list[jax.Device]] = {}
  indices = array.sharding.devices_indices_map(array.shape)
  for device, index in indices.items():
    sides = zip(index, array.shape, strict=True)
    place = tuple(side.indices(size) for side, size in sides)
    pieces.setdefault(place, []).append(device)
  return {place: held for place, held in pieces.items() if len(held) > 1}


def _digests(array: jax.Array) -> dict[int, np.ndarray]:
  """By device of this process, a digest of its piece, where it is a copy."""
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
  """By device of any process, uint32 [arrays, words]."""
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
