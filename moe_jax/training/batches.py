"""What the steps of a run read: the data pipeline's rows, on the devices."""

import concurrent.futures
import functools
import time

from moe_jax.data.mixtures import Mixture
from moe_jax.data.pipeline import train_batches
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel import multihost
from moe_jax.training.state import Setup
from moe_jax.training.step import Batch


class Batches:
  """The batches of a run from a position on, as arrays over the mesh.

  While a step runs, a thread reads the batch of the next one and begins to
  transfer it to the devices.

  Attributes:
    position: The number of batches of the stream that lie behind.
    waited: The seconds that were spent waiting for a batch, up to now.
  """

  def __init__(self, setup: Setup, mixture: Mixture, position: int) -> None:
    """Begins to read; UserError if a source is too small for its order."""
    self.waited = 0.0
    config = setup.config
    sharding = mesh_lib.batch_sharding(setup.mesh)
    self._rows = multihost.Rows(sharding, mixture.batch_size)
    self._open = functools.partial(
      train_batches,
      mixture,
      rows=self._rows.local,
      seed=config.seed,
      threads=config.data.threads,
    )
    self._ahead: concurrent.futures.Future[Batch]
    self._begin(position)

  def __next__(self) -> Batch:
    began = time.perf_counter()
    batch = self._ahead.result()
    self.waited += time.perf_counter() - began
    self.position += 1
    self._ahead = self._thread.submit(self._read)
    return batch

  def seek(self, position: int) -> None:
    """Goes on from another position."""
    self.close()
    self._begin(position)

  def close(self) -> None:
    """Ends the threads that read ahead."""
    self._thread.shutdown(cancel_futures=True)
    self._stream.close()

  def _begin(self, position: int) -> None:
    """Reads on from a position."""
    self._stream, self.position = self._open(start=position), position
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'batches')
    self._ahead = self._thread.submit(self._read)

  def _read(self) -> Batch:
    """Reads the next batch; the transfer may still go on."""
    return self._rows.join(next(self._stream))
