"""AdamW with warm-up, cosine decay, clipping and selective weight decay."""

import re
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from moe_jax import config as config_lib

# Norms, biases, keys of positions and the router's cell are not pulled towards
# zero.
_UNDECAYED = r'(scale|shift|key_pe)_.*|.*bias_.*|(input|hidden)_R3R'


def schedule(config: ConfigDict) -> optax.Schedule:
  """Linear warm-up to the peak, cosine decay, then constant at its end.

  Args:
    config: the whole config; reads `optimizer` and `train.steps`.
  """
  optimizer = config.optimizer
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=optimizer.learning_rate,
    warmup_steps=optimizer.warmup_steps,
    decay_steps=config_lib.decay_end(config),
    end_value=optimizer.learning_rate * optimizer.final_fraction,
  )


def make(config: ConfigDict) -> optax.GradientTransformation:
  """The optimizer that a validated config describes."""
  optimizer = config.optimizer
  adamw = optax.adamw(
    schedule(config),
    b1=optimizer.b1,
    b2=optimizer.b2,
    eps=optimizer.epsilon,
    weight_decay=optimizer.weight_decay,
    mask=decayed,
  )
  if not optimizer.clip_norm:
    return adamw
  return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw)


def decayed(params: Any) -> Any:
  """A tree of bools: which parameters weight decay applies to."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: not re.fullmatch(_UNDECAYED, str(path[-1].key)), params
  )
