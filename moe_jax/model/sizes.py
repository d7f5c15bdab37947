"""Parameters of a model and what a token costs, counted from shapes alone."""

import re
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from moe_jax import config as config_lib

# No matmul per token: added, multiplied or looked up. HyperMoE's network works
# once a step, whatever the number of tokens; positions count with attention.
_ELEMENTWISE = (
  r'(scale|shift)_.*|.*bias_.*|log_temperature|fixed_table_VN|key_pe_AW'
  r'|embedding_X|fixed_up_XF|fixed_weights_FXN'
)
# Of G's shape, the linear weights that HyperMoE's network makes and that each
# token meets.
_HYPER_WEIGHTS = 'fixed_weights_bias_XN'
# Weights without a gradient: backward only sends one on to their inputs.
_FIXED = 'fixed_weight_XN'
# Random numbers by token id, not weights that anything is multiplied by.
_TABLE = 'fixed_table_VN'


class Parameters(NamedTuple):
  """How many parameters a model has.

  Fixed random weights count, as they do in the published sizes of RandomMoE
  and HyperMoE; the hash router's table does not, as in CartesianMoE's.

  Attributes:
    total: all there are, and the idle ones.
    active: those that one token meets: all but the experts it did not choose,
      which with top-p may be none.
    router: those that choose: projectors, scores and the recurrent cell.
    idle: `model.idle_parameters` of all layers; counted and never built.
  """

  total: int
  active: int
  router: int
  idle: int


def count_parameters(config: ConfigDict, params: Any) -> Parameters:
  """Counts the parameters of the model that `config` describes.

  Args:
    config: validated.
    params: the model's tree of parameters, arrays or their shapes.
  """
  total = active = router = 0
  for keys, size in _leaves(params):
    if keys[-1] == _TABLE:
      continue
    total += size
    active += _active(config, keys, size)
    if 'router' in keys or keys[0] == 'cell' or keys[-1] == 'choice_bias_N':
      router += size
  idle = config.model.idle_parameters * config.model.num_layers
  return Parameters(total + idle, active, router, idle)


def flops_per_token(config: ConfigDict, params: Any) -> int:
  """Floating-point operations of training on one token, forward and backward.

  Counted are the matmuls: two operations per weight and use forward, four
  backward (two where the weight is fixed); and in attention the positions that
  a token sees: `model.span` of them, whose keys and values in the memory are
  made anew for each sequence of `data.seq_len`, or what the causal mask lets it
  see, on average over such a sequence. Not counted are what is done element by
  element, the optimizer, the embedding's look-up, and what an
  implementation computes beyond need: masked or padded positions, recomputed
  activations.

  Args:
    config: validated.
    params: the model's tree of parameters, arrays or their shapes.
  """
  fixed = sum(
    _uses(config, keys) * size
    for keys, size in _leaves(params)
    if keys[-1] == _FIXED
  )
  return 3 * flops_per_token_forward(config, params) - 2 * fixed


def flops_per_token_forward(config: ConfigDict, params: Any) -> int:
  """What `flops_per_token` counts, forward alone."""
  weights = sum(
    _active(config, keys, size) * _uses(config, keys)
    for keys, size in _leaves(params)
  )
  return round(2 * weights) + _attention(config)


def _attention(config: ConfigDict) -> int:
  """Scores and weighted values of all layers: matmuls without a weight."""
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


def _leaves(params: Any) -> list[tuple[list[str], int]]:
  """The keys that lead to every parameter, and its size."""
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  return [([str(key.key) for key in path], leaf.size) for path, leaf in flat]


def _active(config: ConfigDict, keys: list[str], size: int) -> int:
  if 'experts' not in keys:
    return size
  return size // config.moe.num_experts * chosen_experts(config)


def chosen_experts(config: ConfigDict) -> int:
  """K: how many experts a token may choose; with top-p up to all of them."""
  moe = config.moe
  return moe.num_experts if config.router.selection == 'top_p' else moe.top_k


def _uses(config: ConfigDict, keys: list[str]) -> float:
  """Matmuls that each weight of a parameter is part of, for one token."""
  name = keys[-1]
  if name == _HYPER_WEIGHTS:
    return 1
  if re.fullmatch(_ELEMENTWISE, name):
    return 0
  if name == 'embed_VD':
    return int(config.model.tie_embeddings)  # as the output head
  if keys[0] == 'cell':  # shared by every MoE sub-layer
    kinds = config_lib.layer_kinds(config)
    return kinds.count('moe') * config.moe.factors
  if config.model.positions == 'span' and name in ('key_DGA', 'value_DGA'):
    # Those of the segment memory are projected again with every segment.
    return 1 + config.model.span / config.data.seq_len
  return 1
