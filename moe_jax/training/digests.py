"""Digests of arrays: 64 bits that change when any bit of an array does.

Every word of an array is mixed with its place in it, twice, and what comes out
is added up modulo 2^32. Such sums do not depend on the order of adding, so
neither mesh nor processes nor the dtype of an accumulator count, and each
device reads only what it holds. Of damage to several words, or of words that
change places, 1 case in 2^64 goes unseen; of damage to one word, none.

They tell damage, not malice.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding

# The finaliser of MurmurHash3, 32 bits (A. Appleby, public domain).
_FACTORS = (0x85EBCA6B, 0xC2B2AE35)
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: neighbouring places lie far apart
_CHUNK, _BATCH = 2**13, 64  # words, and how many of such a program reads
_SMALL_BYTES = 2**20  # below it, compiling costs more than it saves


def of_tree(tree: Any) -> dict[str, str]:
  """Returns the digests of arrays on devices, by the paths of the leaves.

  All processes of a run call this alike and get the same.

  Args:
    tree: A pytree of jax.Array whose dtypes have 1, 2 or 4 bytes.
  """
  leaves = flatten(tree)
  small = {path: leaf for path, leaf in leaves.items() if _is_small(leaf)}
  sums: dict[str, Any] = {
    path: on_devices(leaf) for path, leaf in leaves.items() if path not in small
  }
  sums |= zip(small, on_host(list(small.values())), strict=True)
  found = jax.device_get(sums)
  return {path: _hex(found[path]) for path in leaves}


def on_devices(leaf: jax.Array) -> jax.Array:
  """Returns the digest of an array as uint32 [2], computed where it lies."""
  return _jitted(everywhere(leaf.sharding))(leaf)


def on_host(leaves: Sequence[jax.Array]) -> np.ndarray:
  """Returns the digests of arrays as uint32 [leaves, 2], read by the hosts.

  In a run of several processes the arrays lie on the devices of all.
  """
  sums = _summed(
    len(leaves),
    (
      (number, *chunk)
      for number, leaf in enumerate(leaves)
      for shard in leaf.addressable_shards
      if shard.replica_id == 0
      for chunk in _chunks(
        np.asarray(shard.data),
        [side.start or 0 for side in shard.index],
        leaf.shape,
      )
    ),
  )
  if all(leaf.is_fully_addressable for leaf in leaves):
    return sums
  return multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)


def of_array(array: np.ndarray) -> str:
  """Returns the digest of one whole array in the memory of this host."""
  chunks = _chunks(array, [0] * array.ndim, array.shape)
  return _hex(_summed(1, ((0, *chunk) for chunk in chunks))[0])


def differing(saved: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
  """Returns the paths in `found` whose digest is another in `saved`, or not."""
  return [path for path, digest in found.items() if saved.get(path) != digest]


def layout(tree: Any) -> str:
  """Returns a digest of the paths, shapes and dtypes of the leaves.

  Args:
    tree: A pytree of arrays, or of what describes them.
  """
  lines = sorted(
    f'{path} {list(leaf.shape)} {np.dtype(leaf.dtype)}\n'
    for path, leaf in flatten(tree).items()
  )
  return of_text(''.join(lines))


def of_text(text: str) -> str:
  """Returns a digest of a text."""
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def flatten(tree: Any) -> dict[str, Any]:
  """Returns leaves by dotted path, the same for a state and its metadata."""
  flat = ocp.tree.to_flat_dict(tree)
  return {'.'.join(map(str, path)): leaf for path, leaf in flat.items()}


@functools.cache
def _jitted(sharding: Sharding) -> Any:
  """Returns `_sums`, jitted, with a result that is everywhere."""
  return jax.jit(_sums, out_shardings=sharding)


def _is_small(leaf: jax.Array) -> bool:
  """Returns whether it is not worth a program of its own."""
  on_cpu = {device.platform for device in leaf.devices()} == {'cpu'}
  return on_cpu and leaf.nbytes <= _SMALL_BYTES


def everywhere(sharding: Sharding) -> Sharding:
  """Returns the sharding by which all devices of `sharding` hold the whole."""
  if isinstance(sharding, NamedSharding):
    return NamedSharding(sharding.mesh, PartitionSpec())
  return sharding


def _sums(array: jax.Array) -> jax.Array:
  """Returns the digest of an array, uint32 [2]."""
  bits = array = jax.device_put(array, jax.memory.Space.Device)
  if array.dtype != bool:
    bits = jax.lax.bitcast_convert_type(array, _unsigned(array.dtype))
  # No reshape, which would gather what is sharded.
  places = jnp.zeros(array.shape, jnp.uint32)
  for axis, stride in enumerate(_strides(array.shape)):
    along = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    places += along * stride
  return _added(bits.astype(jnp.uint32), places)


def _added(words: jax.Array, places: jax.Array) -> jax.Array:
  """Returns the sums of the hashes of words in their places, uint32 [2]."""
  # Both at once: as two sums, each would read and mix anew.
  zero = np.uint32(0)
  sums = jax.lax.reduce(
    _mixed(words, places),
    (zero, zero),
    lambda one, other: (one[0] + other[0], one[1] + other[1]),
    tuple(range(words.ndim)),
  )
  return jnp.stack(sums)


_added_chunks = jax.jit(jax.vmap(_added))


def _summed(
  count: int, chunks: Iterable[tuple[int, np.ndarray, np.ndarray]]
) -> np.ndarray:
  """Returns digests uint32 [count, 2] from chunks of what they are of.

  One small program reads them all, so little is compiled and little waits.

  Args:
    count: The number of digests.
    chunks: Of which one, the words and their places, at most `_CHUNK`.
  """
  sums = np.zeros((count, 2), np.uint32)
  waiting = iter(chunks)
  # Filled again and again: new memory costs more than the copies.
  words, places = np.zeros((2, _BATCH, _CHUNK), np.uint32)
  while batch := list(itertools.islice(waiting, _BATCH)):
    for i, (_, some, where) in enumerate(batch):
      for row, values in ((words[i], some), (places[i], where)):
        row[: some.size] = values.reshape(-1)
        row[some.size :] = 0  # a word 0 in place 0 adds 0
    added = np.asarray(_added_chunks(words, places))
    np.add.at(sums, [number for number, *_ in batch], added[: len(batch)])
  return sums


def _chunks(
  part: np.ndarray, starts: Sequence[int], shape: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the words of a part of an array and their places in the array.

  Args:
    part: The part.
    starts: Where it begins in the array, along each axis.
    shape: The shape of the array.
  """
  if not part.size:
    return
  # Rows along the first axis; what is in a row lies alike in each.
  rows = len(part) if part.ndim else 1
  words = np.ascontiguousarray(part).reshape(rows, -1)
  words = words.view(_unsigned(part.dtype))
  along = [
    np.arange(start, start + size).astype(np.uint32) * stride
    for start, size, stride in zip(
      starts, part.shape, _strides(shape), strict=True
    )
  ]
  inside = np.zeros(1, np.uint32)
  for each in along[1:]:
    inside = np.add.outer(inside, each).reshape(-1)
  first = along[0] if along else np.zeros(1, np.uint32)
  height = max(1, _CHUNK // len(inside))
  for row in range(0, rows, height):
    for column in range(0, len(inside), _CHUNK):
      down, across = slice(row, row + height), slice(column, column + _CHUNK)
      yield words[down, across], np.add.outer(first[down], inside[across])


def _strides(shape: Sequence[int]) -> list[np.uint32]:
  """Returns by how many words places differ along each axis, modulo 2^32."""
  return [
    np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    for axis in range(len(shape))
  ]


def _unsigned(dtype: Any) -> np.dtype:
  """Returns the unsigned integer of as many bytes."""
  size = np.dtype(dtype).itemsize
  assert size in (1, 2, 4), f'an array of {dtype}'
  return np.dtype(f'u{size}')


def _mixed(words: Any, places: Any) -> tuple[Any, Any]:
  """Returns two hashes of each word in its place, all uint32."""
  first = _mix(words ^ places * np.uint32(_GOLDEN))
  return first, _mix(first + places)


def _mix(words: Any) -> Any:
  """Returns a bijection of uint32 by which each bit moves half of the bits."""
  for factor, shift in zip(_FACTORS, (16, 13), strict=True):
    words = (words ^ words >> np.uint32(shift)) * np.uint32(factor)
  return words ^ words >> np.uint32(16)


def _hex(sums: np.ndarray) -> str:
  return ''.join(f'{int(each):08x}' for each in sums)
