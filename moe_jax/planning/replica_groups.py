"""Which devices a collective joins: XLA's three ways of writing it.

A device is its place in the mesh, counted along the last axis fastest.
"""

import itertools
import math
import re

Group = tuple[int, ...]


def groups(attributes: str, num_devices: int) -> list[Group]:
  """The groups of devices that exchange data with one another.

  Args:
    attributes: of a collective, as its line has them: `replica_groups=` in any
      form, or `source_target_pairs=`, whose pairs are the groups.
    num_devices: in all: what empty groups stand for.
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
  """The axes of a mesh along which the devices of a group differ."""
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
  """`{0,1},{2,3}`."""
  return [tuple(_ints(each)) for each in re.findall(r'\{([^}]*)\}', text)]


def _iota(text: str) -> list[int]:
  """`[4,2]T(1,0)`: 0, 1, 2, ... in that shape, transposed, flat."""
  shape, order = re.fullmatch(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text).groups()
  sizes = _ints(shape)
  order = _ints(order) if order else list(range(len(sizes)))
  strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
  indices = itertools.product(*(range(sizes[axis]) for axis in order))
  return [
    sum(i * strides[axis] for i, axis in zip(index, order, strict=True))
    for index in indices
  ]


def _of_mesh(sizes: str, device_ids: str | None, named: str) -> list[Group]:
  """`'x'=4,'y'=2` and `'x'`, or a part of an axis: `'x':(before)size`."""
  mesh = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", sizes)}
  count = math.prod(mesh.values())
  devices = list(range(count))
  if device_ids:
    devices = _iota(device_ids) if '[' in device_ids else _ints(device_ids)
  # Of every device, the index along what is named and along the rest.
  parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named)
  found: dict[Group, list[int]] = {}
  for place, device in enumerate(devices):
    found.setdefault(_rest(place, mesh, parts), []).append(device)
  return [tuple(group) for group in found.values()]


def _rest(
  place: int, mesh: dict[str, int], parts: list[tuple[str, str, str]]
) -> Group:
  """A place's index along all but the named parts of axes."""
  index = {}
  for axis, size in reversed(mesh.items()):
    place, index[axis] = divmod(place, size)
  for axis, before, size in parts:
    # A part of an axis is some of the digits of its index.
    whole = mesh[axis]
    size = int(size or whole)
    after = whole // (int(before or 1) * size)
    digit = index[axis] // after % size
    index[axis] -= digit * after
  return tuple(index.values())


def _ints(text: str) -> list[int]:
  return [int(each) for each in re.findall(r'\d+', text)]
