"""What two processes do together: run in both by test_several_processes.py."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.errors import RetryableError, UserError
from moe_jax.model import tuned
from moe_jax.model.implementations import chosen_matmul
from moe_jax.parallel import launch, multihost
from moe_jax.parallel import mesh as mesh_lib
from tests.helpers import tiny

NUM_ROWS = 8
# Sizes of the mesh, and the rows that each of the two processes has to read.
READS = (
  ({'data': 4}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
  ({'data': 2, 'tensor': 2}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
  ({'fsdp': 2, 'expert': 2, 'data': 1}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
  (
    {'data': 1, 'expert': 4, 'dcn.data': 1, 'dcn.expert': 2},
    [[0, 1, 2, 3], [4, 5, 6, 7]],
  ),
  # Each row's widths lie in both processes.
  (
    {'data': 2, 'tensor': 2, 'dcn.data': 1, 'dcn.tensor': 2},
    [[*range(8)], [*range(8)]],
  ),
  # Experts of one process, then of the other: all rows of each half of them.
  ({'data': 1, 'tensor': 4}, [[*range(8)], [*range(8)]]),
)


def mesh(**sizes: int) -> jax.sharding.Mesh:
  config = tiny.config(**{f'mesh.{axis}': n for axis, n in sizes.items()})
  return mesh_lib.from_config(config, jax.devices())


def check_rows() -> None:
  """Every process reads its rows and no others; together they are all."""
  whole = np.arange(NUM_ROWS * 3, dtype=np.int32).reshape(NUM_ROWS, 3)
  for sizes, expected in READS:
    rows = multihost.Rows(mesh_lib.batch_sharding(mesh(**sizes)), NUM_ROWS)
    assert rows.local == expected[jax.process_index()], sizes
    made = rows.join({'token_ids': whole[rows.local]})['token_ids']
    for shard in made.addressable_shards:
      np.testing.assert_array_equal(shard.data, whole[shard.index])
    gathered = multihost_utils.process_allgather(made, tiled=True)
    np.testing.assert_array_equal(gathered, whole)


def message(function: Callable[[], object]) -> str:
  """Of the UserError that calling it raises."""
  try:
    function()
  except (UserError, multihost.ReplicaError) as error:
    return str(error)
  raise AssertionError('no error')


def check_agreement(folder: Path, patience: float) -> None:
  """Order, failure and findings are those of all."""
  first = jax.process_index() == 0
  path = folder / 'made'

  def make() -> bool:
    if first:
      time.sleep(patience)
      assert not path.exists()
      path.touch()
    return path.exists()

  assert multihost.first_process_first(make)

  for kind in (UserError, RetryableError):

    def fail(kind: type[Exception] = kind) -> None:
      if not first:
        raise kind('no disk')

    expected = 'process 1 of 2 has failed' if first else 'no disk'
    with pytest.raises(kind, match=expected):
      multihost.fail_together(fail)
  assert multihost.assert_equal(7, 'x') == 7
  found = message(
    lambda: multihost.assert_equal(jax.process_index(), 'the newest step')
  )
  assert 'the newest step is 0 to process 0 and 1 to process 1' in found


def check_measurements(folder: Path) -> None:
  """Both take what process 0 has measured, whatever process 1 has."""
  name = 'padded' if jax.process_index() == 0 else 'ragged_dot'
  os.environ['MOE_JAX_TUNED'] = str(folder / f'{name}.json')
  device = jax.devices()[0]
  tuned.store(device, {'é': tuned.Measured({name: 1.0}, {'a': [name]})})
  assert dict(chosen_matmul('auto', device).measured) == {'é': name}
  tuned.share(multihost.broadcast_text)
  assert dict(chosen_matmul('auto', device).measured) == {'é': 'padded'}
  assert tuned.cases(device)['é'].tiles == {'a': ['padded']}


def check_copies() -> None:
  """A difference between processes is found in both."""
  sharding = NamedSharding(mesh(data=4), P())

  def array(value: float) -> jax.Array:
    pieces = [
      jax.device_put(np.full(3, value, np.float32), device)
      for device in jax.local_devices()
    ]
    return jax.make_array_from_single_device_arrays((3,), sharding, pieces)

  good, bad = array(1.0), array(jax.process_index())
  multihost.check_replicas({'good': good})
  found = message(lambda: multihost.check_replicas({'good': good, 'bad': bad}))
  here, there = ([d.id for d in jax.devices()][i : i + 2] for i in (0, 2))
  groups = [', '.join(map(str, group)) for group in (here, there)]
  assert (
    f"copies of ['bad'] differ between devices: one on {groups[0]} and"
    in (found)
  )
  assert f'and on {groups[1]} ' in found


if __name__ == '__main__':
  folder, patience, *flags = sys.argv[1:]
  values = dict(flag.removeprefix('--').split('=') for flag in flags)
  launch.initialize(
    values['coordinator'],
    int(values['num_processes']),
    int(values['process_id']),
  )
  check_rows()
  check_agreement(Path(folder), float(patience))
  check_measurements(Path(folder))
  check_copies()
