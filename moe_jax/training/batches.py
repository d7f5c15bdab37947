"""What the steps of a run read: the data pipeline's rows, on the devices."""

import functools

from moe_jax.data.pipeline import TokenSequences, train_batches
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel import multihost
from moe_jax.training.state import Setup
from moe_jax.training.step import Batch


class Batches:
  """The batches of a run from a position on, as arrays over the mesh.

  Attributes:
    position: The number of batches of the stream that lie behind.
  """

  def __init__(
    self, setup: Setup, sequences: TokenSequences, position: int
  ) -> None:
    """Begins to read; UserError if the split is too small for its order."""
    self.position = position
    config = setup.config
    size = config.train.batch_size
    self._rows = multihost.Rows(mesh_lib.batch_sharding(setup.mesh), size)
    self._open = functools.partial(
      train_batches,
      sequences,
      batch_size=size,
      rows=self._rows.local,
      seed=config.seed,
      threads=config.data.threads,
      order=config.data.order,
    )
    self._stream = self._open(start=position)

  def __next__(self) -> Batch:
    batch = self._rows.join(next(self._stream))
    self.position += 1
    return batch

  def seek(self, position: int) -> None:
    """Goes on from another position."""
    self.close()
    self._stream, self.position = self._open(start=position), position

  def close(self) -> None:
    """Ends the threads that read ahead."""
    self._stream.close()
