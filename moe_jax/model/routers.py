"""Where a model's routers lie in the tree of its parameters."""

from typing import Any

import jax
from ml_collections import ConfigDict

from moe_jax.config import layer_kinds
from moe_jax.model import build


def by_router(tree: Any, config: ConfigDict, stacked: bool = True) -> list[Any]:
  """Returns the tree of every MoE sub-layer, from the lowest.

  Args:
    tree: The parameters, or part of them, or a tree like theirs.
    config: The config of the model.
    stacked: Whether leaves are arrays, those of scanned layers stacked.
  """
  kinds, found = layer_kinds(config), []
  first, period = build.repetition(kinds, config.moe.every)
  for layer, kind in enumerate(kinds):
    if kind != 'moe':
      continue
    repetition, place = divmod(layer - first, period)
    scanned = layer >= first
    blocks = tree['periods' if scanned else 'prefix']['blocks']
    chain = blocks[place if scanned else layer]['chain']
    for factor in range(config.moe.factors):
      sub_layer = chain['sub_layers'][factor]
      if scanned and stacked:
        sub_layer = jax.tree.map(lambda a, p=repetition: a[p], sub_layer)
      found.append(sub_layer)
  return found
