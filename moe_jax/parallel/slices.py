"""Which device stands where in a mesh, also where a slow network joins them.

Devices lie in slices: those of one TPU slice, or of hosts joined by NVLink,
exchange data fast, and a slower network (the data centre's, DCN) joins the
slices. `mesh.dcn.X` says how many slices lie along the axis X; the devices
along all other axes then share a slice.
"""

import contextlib
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.errors import UserError


def slice_shape(
  config: ConfigDict, shape: dict[str, int], devices: Sequence[jax.Device]
) -> dict[str, int]:
  """Returns the slices along every mesh axis; -1 has taken what is left.

  Args:
    config: A config; reads `mesh.dcn`.
    shape: The devices along every axis, as `config.mesh_shape` returns them.
    devices: The devices of the mesh.

  Raises:
    UserError: The axes do not multiply to the number of slices, or one does
      not divide the devices along it.
  """
  asked = {axis: config.mesh.dcn[axis] for axis in shape}
  fixed = math.prod(size for size in asked.values() if size > 0)
  attribute = _attribute(devices, fixed)
  count = len({getattr(device, attribute, 0) for device in devices})
  dcn = config_lib.fill(asked, 'mesh.dcn', count, 'slices')
  for axis, size in dcn.items():
    if shape[axis] % size:
      fitting = [name for name in shape if shape[name] % count == 0]
      hint = f'; mesh.dcn.{fitting[0]} = {count} would do' if fitting else ''
      raise UserError(
        f'mesh.dcn.{axis} = {asked[axis]} puts {size} slices along mesh.{axis}'
        f' = {shape[axis]}, which {size} does not divide{hint}'
      )
  return dcn


def arrange(
  shape: dict[str, int],
  dcn: dict[str, int],
  devices: Sequence[jax.Device],
) -> np.ndarray:
  """Returns the devices as an array, near ones along the later axes.

  Args:
    shape: The devices along every axis, from the one that sends least.
    dcn: The slices along every axis, as `slice_shape` returns them.
    devices: As many as `shape` holds; on CPU in the order they fill it.

  Raises:
    UserError: The slices differ in size, or their torus has no such parts.
  """
  inside = [shape[axis] // dcn[axis] for axis in shape]
  count = math.prod(dcn.values())

  def place(split: bool) -> np.ndarray:
    if count == 1:
      return mesh_utils.create_device_mesh(
        inside, devices, allow_split_physical_axes=split
      )
    return mesh_utils.create_hybrid_device_mesh(
      inside,
      list(dcn.values()),
      devices,
      process_is_granule=_attribute(devices, count) == 'process_index',
      allow_split_physical_axes=split,
    )

  # An axis of a TPU's torus may be too long to be assigned whole.
  with contextlib.suppress(NotImplementedError, ValueError):
    return place(split=False)
  try:
    return place(split=True)
  except (NotImplementedError, ValueError) as error:
    sizes = ' x '.join(map(str, inside))
    raise UserError(
      f'the mesh cannot be laid out on these devices, {sizes} in each slice'
      f' of {count}: {error}'
    ) from error


def _attribute(devices: Sequence[jax.Device], asked: int) -> str:
  """Returns the name of the attribute of a device that tells slices apart.

  Hosts without a faster network between some of them report one slice; asked
  for several, their processes are taken for the slices.
  """
  reported = {getattr(device, 'slice_index', 0) for device in devices}
  if asked == 1 or len(reported) > 1 or devices[0].platform == 'tpu':
    return 'slice_index'
  return 'process_index'
