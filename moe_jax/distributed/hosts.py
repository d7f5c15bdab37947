"""Between a process's own arrays and arrays over all processes' devices."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Sharding


def local_rows(sharding: Sharding, num_rows: int) -> list[int]:
  """The rows of a global batch that devices of this process hold, ascending.

  Args:
    sharding: of the batch's leading axis.
    num_rows: of the global batch.
  """
  rows: set[int] = set()
  for index in sharding.addressable_devices_indices_map((num_rows,)).values():
    rows.update(range(*index[0].indices(num_rows)))
  return sorted(rows)


def global_batch(
  batch: Mapping[str, np.ndarray],
  sharding: Sharding,
  rows: Sequence[int],
  num_rows: int,
) -> dict[str, jax.Array]:
  """Joins every process's rows to arrays over the whole mesh.

  Args:
    batch: arrays whose leading axis is `rows`.
    sharding: of the leading axis.
    rows: what `local_rows` said.
    num_rows: of the global batch.
  """
  place = {row: i for i, row in enumerate(rows)}

  def join(local: np.ndarray) -> jax.Array:
    def piece(index: tuple[slice, ...]) -> np.ndarray:
      wanted = range(*index[0].indices(num_rows))
      return local[[place[row] for row in wanted]][:, *index[1:]]

    shape = (num_rows, *local.shape[1:])
    return jax.make_array_from_callback(shape, sharding, piece)

  return {name: join(array) for name, array in batch.items()}
