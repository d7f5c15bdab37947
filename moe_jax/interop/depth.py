"""Parameters by layer, whatever the scan over layers stacks of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from moe_jax.interop.layouts import Path

# 'block', the number of the layer, then the keys within the block.
LayerPath = tuple[str | int, ...]


def by_layer(params: Mapping[str, Any]) -> dict[LayerPath, np.ndarray]:
  """Every parameter on its own, those of the layers by the layer's number."""
  flat = traverse_util.flatten_dict(dict(params))
  prefix, period = _counts(flat)
  layers = {}
  for path, array in flat.items():
    for p, place in enumerate(_places(path, array.shape, prefix, period)):
      in_stack = path[0] == 'periods'
      layers[place] = np.asarray(array[p] if in_stack else array)
  return layers


def stacked(
  layers: Mapping[LayerPath, np.ndarray],
  shapes: Mapping[Path, tuple[int, ...]],
) -> dict[str, Any]:
  """The nested dict of parameters of these shapes: undoes `by_layer`."""
  prefix, period = _counts(shapes)

  def array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    parts = [layers[at] for at in _places(path, shape, prefix, period)]
    return np.stack(parts) if path[0] == 'periods' else parts[0]

  flat = {path: array(path, shape) for path, shape in shapes.items()}
  return traverse_util.unflatten_dict(flat)


def _counts(flat: Mapping[Path, Any]) -> tuple[int, int]:
  """Layers before the pattern repeats, and layers of one repetition."""
  prefix = len({path[2] for path in flat if path[0] == 'prefix'})
  period = len({path[2] for path in flat if path[0] == 'periods'})
  return prefix, period


def _places(
  path: Path, shape: tuple[int, ...], prefix: int, period: int
) -> list[LayerPath]:
  """Where the parts of a parameter stand by layer."""
  if path[0] == 'prefix':
    return [('block', path[2], *path[3:])]
  if path[0] != 'periods':
    return [path]
  layers = range(prefix + path[2], prefix + shape[0] * period, period)
  return [('block', layer, *path[3:]) for layer in layers]
