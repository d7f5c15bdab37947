"""The memory of a training step before it is compiled."""

import math
from typing import Any, NamedTuple

import jax

from moe_jax.model import memory
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.planning import setups
from moe_jax.training.state import Setup

# Parts that grow with the batch, in proportion; the others do not.
_GROWING = ('segments', 'activations', 'dispatch', 'logits')


class Estimate(NamedTuple):
  """Bytes of one device: `fixed + per_sequence * train.batch_size`."""

  fixed: int
  per_sequence: float

  def at(self, batch_size: int) -> float:
    """Bytes with so many sequences."""
    return self.fixed + self.per_sequence * batch_size

  def largest_batch(self, available: float) -> int:
    """The most sequences that so many bytes hold, 0 or more."""
    return max(0, math.floor((available - self.fixed) / self.per_sequence))


def parts(setup: Setup, mesh: dict[str, int]) -> dict[str, int]:
  """Bytes that one device of a mesh needs for a training step, by their use.

  Args:
    setup: on devices of the mesh's platform, whatever their number.
    mesh: devices along every axis.
  """
  config, abstract = setup.config, setup.abstract
  abstract_mesh = mesh_lib.abstract_mesh(mesh)

  def on_device(part: Any) -> int:
    bytes_ = jax.tree.map(
      lambda leaf, sharding: (
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      ),
      part,
      mesh_lib.shardings(
        part, abstract['params'], setup.declarations, abstract_mesh
      ),
    )
    return sum(jax.tree.leaves(bytes_))

  parameters = on_device(abstract['params'])
  # Of the parameters' shapes, dtypes and shardings; and with micro-batches
  # the sum of those done.
  copies = 1 if config.train.accumulation == 1 else 2
  segments = {name: abstract[name] for name in ('memory',) if name in abstract}
  resolved = setups.resolved(setup, mesh)
  device = setup.mesh.devices.flat[0]
  temporaries = memory.temporaries(resolved, setup.vocab_size, mesh, device)
  return {
    'parameters': parameters,
    'gradients': copies * parameters,
    'optimizer': on_device(abstract['opt_state']),
    'segments': on_device(segments),  # hidden states that a span reaches back
    **temporaries._asdict(),
  }


def of(setup: Setup, mesh: dict[str, int]) -> Estimate:
  """The sum of the `parts` at any batch size."""
  found = parts(setup, mesh)
  growing = sum(found.pop(name) for name in _GROWING)
  per_sequence = growing / setup.config.train.batch_size
  return Estimate(sum(found.values()), per_sequence)
