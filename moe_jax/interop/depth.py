"""Parameters by layer, whatever the scan over layers stacks of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

# The keys that lead to a parameter in a nested dict of them.
Path = tuple[str | int, ...]
# 'block', the number of the layer, then the keys within the block.
LayerPath = tuple[str | int, ...]


def by_layer(params: Mapping[str, Any]) -> dict[LayerPath, np.ndarray]:
  """Every parameter on its own, those of the layers by the layer's number."""
  flat = traverse_util.flatten_dict(dict(params))
  stands = places({path: array.shape for path, array in flat.items()})
  layers = {}
  for path, array in flat.items():
    for p, place in enumerate(stands[path]):
      in_stack = path[0] == 'periods'
      layers[place] = np.asarray(array[p] if in_stack else array)
  return layers


def stacked(
  layers: Mapping[LayerPath, np.ndarray],
  shapes: Mapping[Path, tuple[int, ...]],
) -> dict[str, Any]:
  """The nested dict of parameters of these shapes: undoes `by_layer`."""

  def array(path: Path, stands: list[LayerPath]) -> np.ndarray:
    parts = [layers[place] for place in stands]
    return np.stack(parts) if path[0] == 'periods' else parts[0]

  flat = {path: array(path, stands) for path, stands in places(shapes).items()}
  return traverse_util.unflatten_dict(flat)


def places(
  shapes: Mapping[Path, tuple[int, ...]],
) -> dict[Path, list[LayerPath]]:
  """Where every parameter stands by layer; a stack of them, where its parts do.

  Args:
    shapes: of every parameter, by its path.
  """
  # Layers before the pattern repeats, and layers of one repetition.
  prefix, period = (
    len({path[2] for path in shapes if path[0] == name})
    for name in ('prefix', 'periods')
  )

  def of(path: Path, shape: tuple[int, ...]) -> list[LayerPath]:
    if path[0] == 'prefix':
      return [('block', path[2], *path[3:])]
    if path[0] != 'periods':
      return [path]
    layers = range(prefix + path[2], prefix + shape[0] * period, period)
    return [('block', layer, *path[3:]) for layer in layers]

  return {path: of(path, shape) for path, shape in shapes.items()}
