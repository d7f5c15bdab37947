"""Digests: of the bits and their places, wherever the array lies."""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.training import digests
from tests.helpers.marks import fast_only

DTYPES = ['float32', 'bfloat16', 'int32', 'uint32', 'bool', 'int8']
WORD = 2**32


def expected(array: np.ndarray) -> str:
  """The digest of an array, word by word in Python's whole numbers."""

  def mix(word: int) -> int:
    word = (word ^ word >> 16) * 0x85EBCA6B % WORD
    word = (word ^ word >> 13) * 0xC2B2AE35 % WORD
    return word ^ word >> 16

  size = array.dtype.itemsize
  bits = array.tobytes()
  sums = [0, 0]
  for place in range(array.size):
    word = int.from_bytes(bits[place * size : (place + 1) * size], 'little')
    first = mix(word ^ place * 0x9E3779B9 % WORD)
    sums[0] += first
    sums[1] += mix((first + place) % WORD)
  return ''.join(f'{each % WORD:08x}' for each in sums)


def random(shape: tuple[int, ...], dtype: str) -> jax.Array:
  bits = jax.random.bits(jax.random.key(3), shape, jnp.uint32)
  if dtype == 'bool':
    return bits % 2 == 0
  return (bits.astype(jnp.float32) / 2**20 - 2000).astype(dtype)


def placements(array: jax.Array) -> Iterator[jax.Array]:
  """The array on one device, and split and repeated over eight."""
  yield jax.device_put(array, jax.devices()[0])
  mesh = jax.make_mesh((2, 4), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
  specs = [(), ('a',), (None, 'b'), ('b', 'a'), (('a', 'b'),)]
  for spec in specs[: 1 if not array.ndim else 3 if array.ndim < 2 else None]:
    if len(spec) <= array.ndim:
      yield jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


SHAPES = [(), (16,), (8, 12), (8, 4, 5)]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', fast_only([(8, 12)], SHAPES))
def test_is_the_same_on_any_mesh_by_numpy_and_in_python(
  shape: tuple[int, ...], dtype: str
) -> None:
  array = random(shape, dtype)
  wanted = expected(np.asarray(array))
  assert digests.of_array(np.asarray(array)) == wanted
  for placed in placements(array):
    assert digests.of_tree({'a': {'b': placed}}) == {'a.b': wanted}
    on_devices = digests.on_devices(placed)
    assert on_devices.sharding.is_fully_replicated
    assert digests._hex(np.asarray(on_devices)) == wanted


def test_chunks_of_numpy_are_one_digest(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  array = np.asarray(random((9, 7, 5), 'float32'))
  whole = digests.of_array(array)
  for words in (1, 6, 35, 36, 100):
    monkeypatch.setattr(digests, '_CHUNK', words)
    assert digests.of_array(array) == whole


def test_large_arrays_are_read_by_a_program() -> None:
  array = jnp.zeros((600, 600), jnp.float32).at[3, 5].set(1)
  assert not digests._is_small(array)
  wanted = digests.of_array(np.asarray(array))
  assert digests.of_tree({'w': array}) == {'w': wanted}


@pytest.mark.slow
def test_every_bit_counts() -> None:
  array = np.asarray(random((5, 3), 'float32'))
  seen = {digests.of_array(array)}
  for place, bit in itertools.product(range(array.size), range(32)):
    flipped = array.copy()
    flipped.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
    seen.add(digests.of_array(flipped))
  assert len(seen) == 1 + 15 * 32


def test_so_do_places_and_what_compares_equal() -> None:
  # Low bits are 0 and the places a power of two apart: plain weights by place
  # would add up to the same.
  array = np.zeros(2**17, np.float32)
  array[0], array[2**16] = 1, 2
  swapped = array.copy()
  swapped[[0, 2**16]] = array[[2**16, 0]]
  rolled = np.roll(array, 2**16)
  negative = -array
  found = [array, swapped, rolled, negative, array[::-1], array * 0]
  assert len({digests.of_array(each) for each in found[:2]}) == 2
  assert digests.of_array(swapped) == digests.of_array(rolled)
  assert len({digests.of_array(each) for each in found}) == 5
  nan = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
  assert digests.of_array(nan) != digests.of_array(nan[::-1])
  zeros = np.array([0.0, -0.0], np.float32)
  assert digests.of_array(zeros) != digests.of_array(abs(zeros))


def test_names_what_differs() -> None:
  saved = {'a': '1', 'b': '2', 'c': '3'}
  assert digests.differing(saved, {'a': '1', 'b': '9', 'd': '3'}) == ['b', 'd']


def test_a_layout_is_paths_shapes_and_dtypes() -> None:
  def layout(**leaves: jax.Array) -> str:
    return digests.layout({'params': leaves})

  a = jnp.zeros((2, 3))
  others = [
    layout(b=a),
    layout(a=a.T),
    layout(a=a.astype(jnp.int32)),
    layout(a=a, b=a),
    layout(),
  ]
  assert layout(a=a) == layout(a=a + 1) and layout(a=a) not in others
  assert len(set(others)) == len(others)
