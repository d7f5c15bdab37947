"""Reads which devices a collective joins, in XLA's three notations.

A device is its place in the mesh, counted along the last axis fastest.
"""

import itertools
import math
import re

Group = tuple[int, ...]


def groups(attributes: str, num_devices: int) -> list[Group]:
  """Returns the groups of devices that exchange data with one another.

  Args:
    attributes: The attributes of a collective, as its line has them:
      `replica_groups=` in any form, or `source_target_pairs=`, whose pairs are
      the groups.
    num_devices: The number of all devices, for which empty groups stand.
  """
  if pairs := re.search(r'source_target_pairs=\{(\{.*?\})\}', attributes):
    return _listed(pairs[1])
  if listed := re.search(r'replica_groups=\{(\{[\d,{} ]*\})\}', attributes):
    return _listed(listed[1])
  if iota := re.search(
    r'replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', attributes
  ):
    rows, columns = _ints(iota[1])
    devices = _iota(iota[2])
    return [tuple(devices[columns * i :][:columns]) for i in range(rows)]
  if mesh := re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}',
    attributes,
  ):
    return _of_mesh(mesh[1], mesh[2], mesh[3])
  return [tuple(range(num_devices))]


def axes(group: Group, mesh: dict[str, int]) -> tuple[str, ...]:
  """Returns the axes of a mesh along which the devices of a group differ."""
  places = []
  for device in group:
    place = []
    for size in reversed(mesh.values()):
      device, index = divmod(device, size)
      place.append(index)
    places.append(place[::-1])
  columns = zip(mesh, zip(*places, strict=True), strict=True)
  return tuple(axis for axis, indices in columns if len(set(indices)) > 1)


def _listed(text: str) -> list[Group]:
  """Reads `{0,1},{2,3}`."""
  return [tuple(_ints(each)) for each in re.findall(r'\{([^}]*)\}', text)]


def _iota(text: str) -> list[int]:
  """Reads `[4,2]T(1,0)`: 0, 1, 2, ... in that shape, transposed, flat."""
  shape, _, transposition = text.partition('T')
  sizes = _ints(shape)
  order = _ints(transposition) or list(range(len(sizes)))
  strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
  indices = itertools.product(*(range(sizes[axis]) for axis in order))
  return [
    sum(i * strides[axis] for i, axis in zip(index, order, strict=True))
    for index in indices
  ]


def _of_mesh(sizes: str, device_ids: str | None, named: str) -> list[Group]:
  """Reads `'x'=4,'y'=2` and `'x'`, or a part of an axis: `'x':(before)size`."""
  mesh = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", sizes)}
  count = math.prod(mesh.values())
  devices = list(range(count))
  if device_ids:
    devices = _iota(device_ids) if '[' in device_ids else _ints(device_ids)
  # Devices of one group differ along the named parts only.
  parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named)
  by_rest: dict[Group, list[int]] = {}
  for place, device in enumerate(devices):
    by_rest.setdefault(_rest(place, mesh, parts), []).append(device)
  return [tuple(group) for group in by_rest.values()]


def _rest(
  place: int, mesh: dict[str, int], parts: list[tuple[str, str, str]]
) -> Group:
  """Returns a place's index along all but the named parts of axes."""
  index = {}
  for axis, size in reversed(mesh.items()):
    place, index[axis] = divmod(place, size)
  for axis, before, part in parts:
    # A part of an axis is some of the digits of its index.
    size = int(part or mesh[axis])
    after = mesh[axis] // (int(before or 1) * size)
    digit = index[axis] // after % size
    index[axis] -= digit * after
  return tuple(index.values())


def _ints(text: str) -> list[int]:
  return [int(each) for each in re.findall(r'\d+', text)]
