"""The memory of a training step before it is compiled."""

import math
from typing import Any, NamedTuple

import jax

from moe_jax.parallel import mesh as mesh_lib
from moe_jax.planning import abstract_setup
from moe_jax.planning.temporaries import temporaries
from moe_jax.training import offload
from moe_jax.training.state import Setup

# Parts that grow with the batch, in proportion; the others do not.
_GROWING = ('segments', 'activations', 'dispatch', 'logits')


class Estimate(NamedTuple):
  """Bytes of one device: `fixed + per_sequence * train.batch_size`."""

  fixed: int
  per_sequence: float

  def at(self, batch_size: int) -> float:
    """Returns the bytes with so many sequences."""
    return self.fixed + self.per_sequence * batch_size

  def largest_batch(self, available: float) -> int:
    """Returns the most sequences that so many bytes hold, 0 or more."""
    return max(0, math.floor((available - self.fixed) / self.per_sequence))


def parts(setup: Setup, mesh: dict[str, int]) -> dict[str, int]:
  """Returns the bytes that one device needs for a training step, by their use.

  Args:
    setup: A setup on devices of the mesh's platform, whatever their number.
    mesh: The number of devices along every axis.
  """
  config, abstract = setup.config, setup.abstract
  parameters = _bytes_on_device(setup, abstract['params'], mesh)
  # Gradients have the parameters' shapes, dtypes and shardings; with
  # micro-batches there is also the sum of those done.
  copies = 1 if config.train.accumulation == 1 else 2
  segments = {name: abstract[name] for name in ('memory',) if name in abstract}
  resolved = abstract_setup.resolved(setup, mesh)
  device = setup.mesh.devices.flat[0]
  step = temporaries(resolved, setup.vocab_size, mesh, device)._asdict()
  return {
    'parameters': parameters,
    'gradients': copies * parameters,
    'optimizer': _optimizer(setup, mesh, sum(step.values())),
    # Hidden states that a span reaches back to, of the batch before and of this
    # one: which of them stay is known when the step is known to be finite.
    'segments': 2 * _bytes_on_device(setup, segments, mesh),
    **step,
  }


def _optimizer(setup: Setup, mesh: dict[str, int], temporary: int) -> int:
  """Returns the bytes that moments take of a device's memory.

  Offloaded they come in groups, and go again, after what is temporary in a step
  has gone.
  """
  whole = _of_optimizer(setup, mesh)
  if not setup.config.optimizer.offload:
    return whole
  moved = 2 * whole * offload.largest_share(setup.abstract['params'])
  return max(0, round(moved) - temporary)


def host_bytes(setup: Setup, mesh: dict[str, int]) -> int:
  """Returns the bytes that a device's share of the state takes of its host."""
  return _of_optimizer(setup, mesh) if setup.config.optimizer.offload else 0


def _of_optimizer(setup: Setup, mesh: dict[str, int]) -> int:
  return _bytes_on_device(setup, setup.abstract['opt_state'], mesh)


def estimate(setup: Setup, mesh: dict[str, int]) -> Estimate:
  """Returns the sum of the `parts` for any batch size."""
  sizes = parts(setup, mesh)
  growing = sum(sizes.pop(name) for name in _GROWING)
  per_sequence = growing / setup.config.train.batch_size
  return Estimate(sum(sizes.values()), per_sequence)


def format_bytes(number: float) -> str:
  """Returns bytes for people, as `512 B` or `1.50 GiB`."""
  for power, unit in ((40, 'TiB'), (30, 'GiB'), (20, 'MiB'), (10, 'KiB')):
    if number >= 1 << power:
      return f'{number / (1 << power):.2f} {unit}'
  return f'{number:.0f} B'


def _bytes_on_device(setup: Setup, part: Any, mesh: dict[str, int]) -> int:
  """Returns the bytes of a part of the train state that one device holds."""
  shardings = mesh_lib.shardings(
    part,
    setup.abstract['params'],
    setup.declarations,
    mesh_lib.abstract_mesh(mesh),
  )
  sizes = jax.tree.map(
    lambda leaf, sharding: (
      math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    ),
    part,
    shardings,
  )
  return sum(jax.tree.leaves(sizes))
