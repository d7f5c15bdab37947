"""Where devices stand in a mesh whose slices a slow network joins.

The devices are made up: all that is read of one are a few attributes.
"""

import dataclasses
import itertools
import random

import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.parallel import slices
from tests.helpers import tiny


@dataclasses.dataclass(frozen=True)
class Device:
  """What jax tells of a device; `coords` of TPUs only."""

  id: int
  process_index: int
  slice_index: int
  platform: str
  device_kind: str
  coords: tuple[int, ...] = ()
  core_on_chip: int = 0


def tpus(num_slices: int, *torus: int) -> list[Device]:
  """v5p slices, four chips a host, listed in no good order."""
  chips = list(itertools.product(*map(range, torus)))
  found = [
    Device(
      id=part * len(chips) + i,
      process_index=(part * len(chips) + i) // 4,
      slice_index=part,
      platform='tpu',
      device_kind='TPU v5',
      coords=coords,
    )
    for part in range(num_slices)
    for i, coords in enumerate(chips)
  ]
  random.Random(0).shuffle(found)
  return found


def hosts(platform: str, count: int, each: int, known: bool) -> list[Device]:
  """Hosts with `each` devices, that do or do not report themselves slices."""
  return [
    Device(i, i // each, i // each if known else 0, platform, platform)
    for i in range(count * each)
  ]


def placed(devices: list[Device], **keys: int) -> np.ndarray:
  """The devices in their mesh; `dcn_data=2` is `mesh.dcn.data = 2`."""
  config = tiny.config(
    **{f'mesh.{key.replace("dcn_", "dcn.")}': n for key, n in keys.items()}
  )
  shape = config_lib.mesh_shape(config, len(devices))
  dcn = slices.slice_shape(config, shape, devices)
  return slices.arrange(shape, dcn, devices)


def lines(mesh: np.ndarray, axis: int) -> list[list[Device]]:
  """The groups of devices that differ in their place along `axis` alone."""
  return np.moveaxis(mesh, axis, -1).reshape(-1, mesh.shape[axis]).tolist()


def test_only_the_named_axes_cross_slices() -> None:
  for keys, along in (
    ({'data': 4, 'fsdp': 8, 'expert': 4}, [2, 1, 1, 1, 1]),
    ({'data': 2, 'fsdp': 16, 'context': 4}, [2, 1, 1, 1, 1]),
    ({'data': 1, 'fsdp': 32, 'expert': 4, 'dcn_fsdp': 2}, [1, 2, 1, 1, 1]),
    ({'data': 4, 'expert': 32, 'dcn_expert': 2}, [1, 1, 2, 1, 1]),
  ):
    mesh = placed(tpus(2, 4, 4, 4), **keys)
    assert len(set(mesh.flat)) == mesh.size == 128
    for axis, expected in enumerate(along):
      for line in lines(mesh, axis):
        assert len({device.slice_index for device in line}) == expected


def test_two_axes_cross_four_slices() -> None:
  keys = {'data': 4, 'fsdp': 8, 'expert': 8, 'dcn_data': 2, 'dcn_fsdp': -1}
  mesh = placed(tpus(4, 4, 4, 4), **keys)
  for axis, expected in enumerate([2, 2, 1, 1, 1]):
    for line in lines(mesh, axis):
      assert len({device.slice_index for device in line}) == expected


def test_an_axis_follows_a_line_of_the_torus() -> None:
  """Neighbours in the mesh are neighbours on the wire, where sizes allow it."""
  mesh = placed(tpus(2, 4, 4, 4), data=2, fsdp=4, expert=4, tensor=4)
  for axis in (1, 2, 4):
    for line in lines(mesh, axis):
      coords = np.array([device.coords for device in line])
      assert (coords != coords[0]).any(axis=0).sum() == 1


@pytest.mark.parametrize(
  ('platform', 'known'), [('cuda', True), ('cpu', False), ('cpu', True)]
)
def test_hosts_are_slices(platform: str, known: bool) -> None:
  """Those that report it, and asked for, those of processes."""
  devices = hosts(platform, 2, 4, known)
  mesh = placed(devices, data=2, fsdp=4, dcn_data=1, dcn_fsdp=2)
  for axis, expected in enumerate([1, 2, 1, 1, 1]):
    for line in lines(mesh, axis):
      assert len({device.process_index for device in line}) == expected


def test_without_slices_the_first_axis_crosses_processes() -> None:
  mesh = placed(hosts('cpu', 2, 4, known=False), data=2, tensor=4)
  assert [device.id for device in mesh.flat] == list(range(8))


@pytest.mark.parametrize(
  ('devices', 'keys', 'fragments'),
  [
    (
      tpus(2, 2, 2, 2),
      {'data': 1, 'fsdp': 16},
      ['mesh.dcn.data = -1 puts 2 slices along mesh.data = 1', 'dcn.fsdp = 2'],
    ),
    (
      tpus(2, 2, 2, 2),
      {'data': 4, 'fsdp': 4, 'dcn_data': 4},
      ['= 4 x 1 x 1 x 1 x 1 = 4, but the number of slices is 2'],
    ),
    (
      tpus(1, 2, 2, 2),
      {'dcn_fsdp': 2},
      ['mesh.dcn.fsdp', '= 2 x 1 x 1 x 1 = 2', 'number of slices, 1'],
    ),
    (tpus(2, 2, 2, 2), {'dcn_data': 0}, ['mesh.dcn.data = 0', 'at least 1']),
    (
      tpus(2, 2, 2, 2),
      {'dcn_fsdp': -1},
      ['mesh.dcn.data and mesh.dcn.fsdp are both -1'],
    ),
    (
      [*tpus(2, 2, 2, 2)[:-1], Device(99, 9, 2, 'tpu', 'TPU v5', (0, 0, 0))],
      {'data': 16, 'dcn_data': -1},
      ['3 slices', 'mesh.data = 16'],
    ),
    (
      [*hosts('cuda', 2, 4, known=True)[:7], Device(7, 0, 0, 'cuda', 'cuda')],
      {'data': 8},
      ['4 x 1 x 1 x 1 x 1 in each slice of 2', '4'],
    ),
  ],
)
def test_refuses_slices_that_do_not_fit(
  devices: list[Device], keys: dict[str, int], fragments: list[str]
) -> None:
  with pytest.raises(UserError) as error:
    placed(devices, **keys)
  for fragment in fragments:
    assert fragment in str(error.value)
