"""Parameters of a model and what a token costs, counted from shapes alone."""

import re
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from moe_jax import config as config_lib

_EXPERT = r'gate_up_ND2F|down_NFD|up_NDF|up_bias_NF|down_bias_ND'
# Added or multiplied element by element: no matmul.
_ELEMENTWISE = r'(scale|shift)_.*|.*bias_.*'


class Parameters(NamedTuple):
  """How many parameters a model has.

  Attributes:
    total: all there are.
    active: those that one token meets: all but the experts it did not choose.
    router: those that choose: projectors, scores and the recurrent cell.
  """

  total: int
  active: int
  router: int


def count_parameters(config: ConfigDict, params: Any) -> Parameters:
  """Counts the parameters of the model that `config` describes.

  Args:
    config: validated.
    params: the model's tree of parameters, arrays or their shapes.
  """
  total = active = router = 0
  for keys, size in _leaves(params):
    total += size
    active += _active(config, keys, size)
    if 'router' in keys or keys[0] == 'cell':
      router += size
  return Parameters(total, active, router)


def flops_per_token(config: ConfigDict, params: Any) -> int:
  """Floating-point operations of training on one token, forward and backward.

  Counted are the matmuls: two operations per weight and use forward, four
  backward; and in attention the positions that a token sees: a span, whose
  keys and values in the memory are made anew for each sequence of
  `data.seq_len`, or what the causal mask lets it see, on average over such a
  sequence. Not counted are what is
  done element by element, the optimizer, the embedding's look-up, and what an
  implementation computes beyond need: masked or padded positions, recomputed
  activations.

  Args:
    config: validated.
    params: the model's tree of parameters, arrays or their shapes.
  """
  weights = sum(
    _active(config, keys, size) * _uses(config, keys)
    for keys, size in _leaves(params)
  )
  return 3 * (2 * round(weights) + _attention_flops(config))


def _attention_flops(config: ConfigDict) -> int:
  """Forward and per token, beside the projections."""
  model = config.model
  width = model.num_heads * config_lib.head_dim(config)
  if model.span:
    # Keys, keys of positions and values: 3 x 2 operations per head dimension.
    return 6 * width * model.span * model.num_layers
  # Scores and weighted values: 2 x 2 operations per head dimension and seen
  # position, of which there are (L + 1) / 2.
  return 2 * width * (config.data.seq_len + 1) * model.num_layers


def _leaves(params: Any) -> list[tuple[list[str], int]]:
  """The keys that lead to every parameter, and its size."""
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  return [([str(key.key) for key in path], leaf.size) for path, leaf in flat]


def _active(config: ConfigDict, keys: list[str], size: int) -> int:
  if re.fullmatch(_EXPERT, keys[-1]):
    return size // config.moe.num_experts * config.moe.top_k
  return size


def _uses(config: ConfigDict, keys: list[str]) -> float:
  """Matmuls that each weight of a parameter is part of, for one token."""
  if re.fullmatch(_ELEMENTWISE, keys[-1]):
    return 0
  if keys[-1] == 'key_pe_AW':
    return 0  # part of the attention
  if keys[-1] in ('key_DGA', 'value_DGA'):
    return 1 + config.model.span / config.data.seq_len
  if keys[-1] == 'embed_VD':
    return int(config.model.tie_embeddings)  # as the output head
  if keys[0] == 'cell':  # shared by every MoE sub-layer
    kinds = config_lib.layer_kinds(config)
    return kinds.count('moe') * config.moe.factors
  return 1
