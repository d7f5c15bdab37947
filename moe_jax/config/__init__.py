"""A run's config: its keys, its checks, and what follows from it.

`schema` holds every key with its default and its meaning. This module has what
other rooms ask of a config; reading config files is `loading`'s business, the
config beside a run's checkpoints `saved`'s.
"""

from moe_jax.config.checks import check_given, validate
from moe_jax.config.derived import (
  BATCH_AXES,
  MESH_AXES,
  TOKEN_AXES,
  decay_end,
  eval_batch_size,
  fill,
  flatten,
  get,
  head_dim,
  is_read,
  layer_kinds,
  mesh_shape,
  moe_layers,
  profiled_steps,
  router_names,
  vocab_rows,
  vocab_size,
)
from moe_jax.config.schema import get_config

__all__ = [
  'BATCH_AXES',
  'MESH_AXES',
  'TOKEN_AXES',
  'check_given',
  'decay_end',
  'eval_batch_size',
  'fill',
  'flatten',
  'get',
  'get_config',
  'head_dim',
  'is_read',
  'layer_kinds',
  'mesh_shape',
  'moe_layers',
  'profiled_steps',
  'router_names',
  'validate',
  'vocab_rows',
  'vocab_size',
]
