"""Where a model's routers lie in the tree of its parameters."""

import operator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from moe_jax.config import layer_kinds
from moe_jax.model import build


class Place(NamedTuple):
  """Where an MoE sub-layer lies.

  Attributes:
    path: The keys that lead to it.
    repetition: Which of the stacked periods is its own; None if it is in none.
    repeats: The number of periods.
  """

  path: tuple[str | int, ...]
  repetition: int | None
  repeats: int

  def within(self, tree: Any) -> Any:
    """Returns the part at `path` of nested dicts, or of a model."""
    for key in self.path:
      inside = isinstance(tree, dict) or isinstance(key, int)
      tree = tree[key] if inside else getattr(tree, str(key))
    return tree


def places(config: ConfigDict) -> list[Place]:
  """Returns where every MoE sub-layer of a model lies, from the lowest."""
  kinds, found = layer_kinds(config), list[Place]()
  first, period = build.repetition(kinds, config.moe.every)
  repeats = (len(kinds) - first) // period
  for layer, kind in enumerate(kinds):
    if kind != 'moe':
      continue
    block: tuple[str | int, ...] = ('prefix', 'blocks', layer)
    repetition = None
    if layer >= first:
      repetition, place = divmod(layer - first, period)
      block = ('periods', 'blocks', place)
    found += [
      Place((*block, 'chain', 'sub_layers', factor), repetition, repeats)
      for factor in range(config.moe.factors)
    ]
  return found


def by_router(tree: Any, config: ConfigDict, stacked: bool = True) -> list[Any]:
  """Returns the tree of every MoE sub-layer, from the lowest.

  Args:
    tree: The parameters, or part of them, or a tree like theirs.
    config: The config of the model.
    stacked: Whether leaves are arrays, those of scanned layers stacked.
  """
  found = []
  for place in places(config):
    sub_layer = place.within(tree)
    if stacked and place.repetition is not None:
      sub_layer = jax.tree.map(operator.itemgetter(place.repetition), sub_layer)
    found.append(sub_layer)
  return found
