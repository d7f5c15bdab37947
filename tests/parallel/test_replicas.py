"""The check of copies: silent on real steps, and it finds what is broken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.parallel import multihost

AXES = ('data', 'model')


def mesh(*shape: int) -> jax.sharding.Mesh:
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2)


def assembled(
  pieces: list[np.ndarray], shape: tuple[int, ...], sharding: NamedSharding
) -> jax.Array:
  """An array of the pieces as they are, whatever its sharding says."""
  devices = sharding.mesh.devices.flat
  return jax.make_array_from_single_device_arrays(
    shape,
    sharding,
    [
      jax.device_put(piece, device)
      for piece, device in zip(pieces, devices, strict=True)
    ],
  )


def test_names_the_array_and_the_devices_that_differ() -> None:
  sharding = NamedSharding(mesh(8, 1), P())
  pieces = [np.ones(3, np.float32) for _ in range(8)]
  good = assembled(pieces, (3,), sharding)
  multihost.check_replicas({'params': {'weight_XN': good}})

  pieces[2] = np.nextafter(pieces[2], np.float32(2))
  pieces[5] = pieces[2]
  bad = assembled(pieces, (3,), sharding)
  with pytest.raises(multihost.ReplicaError) as error:
    multihost.check_replicas({'params': {'fine': good, 'weight_XN': bad}})
  assert "['params']['weight_XN']" in str(error.value)
  assert 'one on 0, 1, 3, 4, 6, 7 and on 2, 5' in str(error.value)
  assert 'fine' not in str(error.value)


def test_compares_the_copies_of_each_piece() -> None:
  """[4, 2] split over 2 of `model`: 4 devices hold each half."""
  sharding = NamedSharding(mesh(4, 2), P('model'))
  halves = [np.full((2, 2), i % 2, np.int32) for i in range(8)]
  multihost.check_replicas([assembled(halves, (4, 2), sharding)])
  halves[3] = halves[3] + 1
  with pytest.raises(multihost.ReplicaError, match='one on 1, 5, 7 and on 3'):
    multihost.check_replicas([assembled(halves, (4, 2), sharding)])


def test_a_piece_of_one_device_may_be_anything() -> None:
  sharding = NamedSharding(mesh(4, 2), P(AXES))
  rows = [np.full(1, i) for i in range(8)]
  multihost.check_replicas([assembled(rows, (8,), sharding)])


def test_bits_count_not_values() -> None:
  """A NaN is like itself, and 0 is not -0."""
  sharding = NamedSharding(mesh(8, 1), P())
  nans = [np.full(2, np.nan, np.float32)] * 8
  multihost.check_replicas([assembled(nans, (2,), sharding)])
  zeros = [np.zeros(2, np.float32)] * 7 + [-np.zeros(2, np.float32)]
  with pytest.raises(multihost.ReplicaError):
    multihost.check_replicas([assembled(zeros, (2,), sharding)])


def test_finds_a_sum_that_a_shard_map_forgot() -> None:
  """Unchecked, its result is called replicated, and no device agrees."""
  each = mesh(8, 1)
  x = jax.device_put(jnp.arange(8.0), NamedSharding(each, P('data')))

  def counts(x: jax.Array) -> jax.Array:
    return x.sum()

  def run(function: object) -> jax.Array:
    return jax.jit(
      jax.shard_map(
        function, mesh=each, in_specs=P('data'), out_specs=P(), check_vma=False
      )
    )(x)

  forgotten = run(counts)
  assert forgotten.sharding.is_fully_replicated
  with pytest.raises(multihost.ReplicaError):
    multihost.check_replicas({'bias_N': forgotten})
  multihost.check_replicas(
    {'bias_N': run(lambda x: jax.lax.psum(counts(x), 'data'))}
  )
