"""Which grouped matmul the experts run: what is asked for, or the best."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from moe_jax.errors import UserError, choose
from moe_jax.experts import tokamax_kernels
from moe_jax.experts.grouped_matmul import IMPLEMENTATIONS, Chosen
from moe_jax.model import tuned

_LOG = logging.getLogger(__name__)


class Case(NamedTuple):
  """What decides which implementations are possible.

  Attributes:
    device: of the kind that the program is for; it need not be here.
    num_devices: that the program is for.
  """

  device: jax.Device
  num_devices: int


def matmul(config: ConfigDict, mesh: jax.sharding.Mesh | None) -> Chosen:
  """The grouped matmul of a validated config.

  Args:
    config: the whole config.
    mesh: where it will run; None for one device of the default platform.

  Raises:
    UserError: `moe.grouped_matmul` names what cannot run there.
  """
  devices = jax.devices()[:1] if mesh is None else [*mesh.devices.flat]
  return chosen(config.moe.grouped_matmul, Case(devices[0], len(devices)))


def chosen(asked: str, where: Case) -> Chosen:
  """What a value of `moe.grouped_matmul` means; see `matmul`."""
  if asked == 'auto':
    possible = available(where)
    preferred = _PREFERRED.get(where.device.platform, _ELSEWHERE)
    name = next(n for n in preferred if n in possible)
    if name != preferred[0]:
      why = OBSTACLES[preferred[0]](where)
      _LOG.warning('grouped matmul %r: %r %s', name, preferred[0], why)
    measured = tuned.best(where.device, possible)
    return Chosen(name, tuple(sorted(measured.items())))
  obstacle = OBSTACLES[choose('moe.grouped_matmul', asked, OBSTACLES)](where)
  if obstacle:
    raise UserError(
      f'moe.grouped_matmul = {asked!r} {obstacle}; here it can be auto,'
      f' {", ".join(available(where))}'
    )
  return Chosen(asked)


def available(where: Case) -> list[str]:
  """The implementations that can run there."""
  return [name for name in IMPLEMENTATIONS if not OBSTACLES[name](where)]


def _triton_obstacle(where: Case) -> str | None:
  return _gpu_obstacle(where, (8, 0)) or _tokamax_obstacle(where, 'cuda')


def _mosaic_obstacle(where: Case) -> str | None:
  if where.device.platform == 'tpu':
    if where.device not in jax.devices():
      return 'is compiled only where a TPU is'
    return _tokamax_obstacle(where, 'tpu')
  return _gpu_obstacle(where, (9, 0)) or _tokamax_obstacle(where, 'cuda')


def _gpu_obstacle(where: Case, least: tuple[int, int]) -> str | None:
  platform = where.device.platform
  if platform != 'gpu':
    return f'does not run on {platform}'
  capability = getattr(where.device, 'compute_capability', '0.0')
  if tuple(map(int, capability.split('.'))) < least:
    needed = '.'.join(map(str, least))
    return f'needs compute capability {needed}, and this is {capability}'
  return None


def _tokamax_obstacle(where: Case, extra: str) -> str | None:
  if not tokamax_kernels.installed():
    return f"needs the package tokamax: pip install 'moe_jax[{extra}]'"
  if where.num_devices > 1:
    return "runs on one device: JAX's checks of shard_map do not take it"
  return None


def _none(where: Case) -> None:
  del where


# Of each implementation, why it cannot run somewhere, or None.
OBSTACLES: dict[str, Callable[[Case], str | None]] = {
  'blocks': _none,
  'ragged_dot': _none,
  'padded': _none,
  'triton': _triton_obstacle,
  'mosaic': _mosaic_obstacle,
}

# By platform, the first that can run is taken where nothing was measured.
_PREFERRED = {
  'cpu': ('blocks',),
  'gpu': ('triton', 'padded'),
  'tpu': ('ragged_dot',),
}
_ELSEWHERE = ('ragged_dot',)
