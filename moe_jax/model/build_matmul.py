"""Which grouped matmul the experts run: what is asked for, or the best."""

import importlib.metadata
import logging
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from moe_jax.errors import UserError, choose
from moe_jax.experts.grouped_matmul import IMPLEMENTATIONS, TunedMatmul, tokamax
from moe_jax.model import tuned
from moe_jax.model.kernels import capability

_LOG = logging.getLogger(__name__)


def matmul(config: ConfigDict, mesh: jax.sharding.Mesh | None) -> TunedMatmul:
  """The grouped matmul of a validated config.

  Args:
    config: the whole config.
    mesh: where it will run; None for one device of the default platform.

  Raises:
    UserError: `moe.grouped_matmul` names what cannot run there.
  """
  devices = jax.devices() if mesh is None else mesh.devices.flat
  return chosen(config.moe.grouped_matmul, next(iter(devices)))


def chosen(asked: str, device: jax.Device) -> TunedMatmul:
  """What a value of `moe.grouped_matmul` means; see `matmul`.

  Args:
    asked: the value.
    device: of the kind that the program is for; it need not be here.

  Raises:
    UserError: the value names what cannot run there.
  """
  if asked == 'auto':
    possible = available(device)
    preferred = _PREFERRED.get(device.platform, _ELSEWHERE)
    name = next(n for n in preferred if n in possible)
    if name != preferred[0]:
      why = OBSTACLES[preferred[0]](device)
      _LOG.warning('grouped matmul %r: %r %s', name, preferred[0], why)
    measured = tuned.best(device, possible)
    return TunedMatmul(name, tuple(sorted(measured.items())))
  obstacle = OBSTACLES[choose('moe.grouped_matmul', asked, OBSTACLES)](device)
  if obstacle:
    raise UserError(
      f'moe.grouped_matmul = {asked!r} {obstacle}; here it can be auto,'
      f' {", ".join(available(device))}'
    )
  return TunedMatmul(asked)


def available(device: jax.Device) -> list[str]:
  """The implementations that can run there."""
  return [name for name in IMPLEMENTATIONS if not OBSTACLES[name](device)]


def _triton_obstacle(device: jax.Device) -> str | None:
  return _gpu_obstacle(device, (8, 0)) or _tokamax_obstacle('triton', 'cuda')


def _mosaic_obstacle(device: jax.Device) -> str | None:
  on_tpu = device.platform == 'tpu'
  if not on_tpu and (obstacle := _gpu_obstacle(device, (9, 0))):
    return obstacle
  if device not in jax.devices():
    return 'is compiled only where such a device is'
  return _tokamax_obstacle('mosaic', 'tpu' if on_tpu else 'cuda')


def _gpu_obstacle(device: jax.Device, least: tuple[int, int]) -> str | None:
  if device.platform != 'gpu':
    return f'does not run on {device.platform}'
  if capability(device) < least:
    needed = '.'.join(map(str, least))
    has = getattr(device, 'compute_capability', 'none')
    return f'needs compute capability {needed}, and this is {has}'
  return None


def _tokamax_obstacle(kernel: str, extra: str) -> str | None:
  if not tokamax.installed():
    return f"needs the package tokamax: pip install 'moe_jax[{extra}]'"
  if said := tokamax.missing(kernel):
    version = importlib.metadata.version('tokamax')
    return f'is not in tokamax {version}, which says {said!r}'
  return None


def _none(device: jax.Device) -> None:
  del device


# Of each implementation, why it cannot run somewhere, or None.
OBSTACLES: dict[str, Callable[[jax.Device], str | None]] = {
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
