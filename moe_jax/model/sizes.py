"""Parameters of a model and what a token costs, counted from shapes alone."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.parameter import CELL, EXPERT, ROUTER, Declaration


class Parameters(NamedTuple):
  """How many parameters a model has.

  Fixed random weights count, as they do in the published sizes of RandomMoE
  and HyperMoE; the hash router's table does not, as in CartesianMoE's.

  Attributes:
    total: The number of all parameters, the idle ones included.
    active: The number of those that one token meets: all but the experts it did
      not choose, which with top-p may be none.
    router: The number of those that choose: projectors, gates and the cell.
    idle: `model.idle_parameters` of all layers, which are counted and never
      built.
  """

  total: int
  active: int
  router: int
  idle: int


def count_parameters(
  config: ConfigDict, params: Any, declarations: Any
) -> Parameters:
  """Counts the parameters of the model that `config` describes.

  Args:
    config: A validated config.
    params: The model's tree of parameters, arrays or their shapes.
    declarations: What each parameter is, a tree like `params`.
  """
  total = active = router = 0
  for declared, size in _sizes(params, declarations):
    if declared.counted:
      total += size
      active += _active(config, declared, size)
      router += size if declared.part in (ROUTER, CELL) else 0
  idle = config.model.idle_parameters * config.model.num_layers
  return Parameters(total + idle, active, router, idle)


def flops_per_token(config: ConfigDict, params: Any, declarations: Any) -> int:
  """Returns the operations of training on one token, forward and backward.

  Counted are the matmuls: two operations per weight and use forward, four
  backward (two where the weight is fixed); and in attention the positions that
  a token sees: `model.span` of them, whose keys and values in the memory are
  made anew for each sequence of `data.seq_len`, or what the causal mask lets it
  see, on average over such a sequence. Not counted are what is done element by
  element, the optimizer, the embedding's look-up, and what an implementation
  computes beyond need: masked or padded positions, recomputed activations.

  Args:
    config: A validated config.
    params: The model's tree of parameters, arrays or their shapes.
    declarations: What each parameter is, a tree like `params`.
  """
  missing = [
    (3 - declared.passes) * _uses(config, declared) * size
    for declared, size in _sizes(params, declarations)
  ]
  forward = flops_per_token_forward(config, params, declarations)
  return 3 * forward - round(2 * sum(missing))


def flops_per_token_forward(
  config: ConfigDict, params: Any, declarations: Any
) -> int:
  """Returns what `flops_per_token` counts, forward alone."""
  weights = sum(
    _active(config, declared, size) * _uses(config, declared)
    for declared, size in _sizes(params, declarations)
  )
  return round(2 * weights) + _attention(config)


def chosen_experts(config: ConfigDict) -> int:
  """Returns K, how many experts a token may choose; all of them with top-p."""
  moe = config.moe
  return moe.num_experts if config.router.selection == 'top_p' else moe.top_k


def _attention(config: ConfigDict) -> int:
  """Returns the operations on scores and values, which have no weights."""
  width = config.model.num_heads * config_lib.head_dim(config)
  if config.model.positions == 'span':
    # A token's query meets the keys of the positions before it and of their
    # distances, its weights the values.
    per_layer = 3 * 2 * width * config.model.span
  else:
    # 2 x 2 operations per head dimension and seen position, of which there
    # are (L + 1) / 2.
    per_layer = 2 * width * (config.data.seq_len + 1)
  return per_layer * config.model.num_layers


def _sizes(params: Any, declarations: Any) -> Iterator[tuple[Declaration, int]]:
  """Yields what every parameter is, with its number of elements."""
  declared = jax.tree.leaves(declarations)
  return zip(
    declared, (leaf.size for leaf in jax.tree.leaves(params)), strict=True
  )


def _active(config: ConfigDict, declared: Declaration, size: int) -> int:
  """Returns how many of a parameter's elements one token meets."""
  if EXPERT not in declared.axes:
    return size
  return size // config.moe.num_experts * chosen_experts(config)


def _uses(config: ConfigDict, declared: Declaration) -> float:
  """Returns how many matmuls of one token each of the elements is part of."""
  uses: float = declared.matmuls
  if declared.part == CELL:  # shared by every MoE sub-layer
    kinds = config_lib.layer_kinds(config)
    uses *= kinds.count('moe') * config.moe.factors
  if declared.remembered:
    # Applied to the memory of a span anew with every sequence.
    uses *= 1 + config.model.span / config.data.seq_len
  return uses
