"""AdamW with warm-up, cosine decay, clipping and selective weight decay.

Some parameters are not its own: those of frozen routers and those that are
fixed for good are left alone, and the bias by which experts are chosen moves by
the sign of what its gradient counts.
"""

import re
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from moe_jax import config as config_lib

# Norms, biases, temperatures, keys of positions and the router's cell: not
# pulled towards zero.
_UNDECAYED = (
  r'(scale|shift|key_pe)_.*|.*bias_.*|log_temperature'
  r'|(input|hidden)_[XR][34]?R'
)

# What happens to a parameter.
TRAINED, FROZEN, BIAS_UPDATED = 'trained', 'frozen', 'bias_updated'


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
  trained = optax.adamw(
    schedule(config),
    b1=optimizer.b1,
    b2=optimizer.b2,
    eps=optimizer.epsilon,
    weight_decay=optimizer.weight_decay,
    mask=decayed,
  )
  if optimizer.clip_norm:
    clip = optax.clip_by_global_norm(optimizer.clip_norm)
    trained = optax.chain(clip, trained)
  return optax.partition(
    {
      TRAINED: trained,
      FROZEN: optax.set_to_zero(),
      BIAS_UPDATED: optax.sign_sgd(config.loss.bias_rate),
    },
    lambda params: labels(params, optimizer.freeze),
  )


def labels(params: Any, freeze: str) -> Any:
  """A tree of `TRAINED`, `FROZEN` and `BIAS_UPDATED`.

  Args:
    params: of the model, or anything with the same keys.
    freeze: `optimizer.freeze`. 'router' stands for projectors and scores of all
      layers (RMoE, arXiv 2408.06793, fine-tuning), 'router_and_cell' for the
      recurrent cell too.
  """
  frozen = {
    'none': (),
    'router': ('router',),
    'router_and_cell': ('router', 'cell'),
  }[freeze]

  def label(path: tuple[Any, ...], _: Any) -> str:
    keys = [str(key.key) for key in path]
    if keys[-1] == 'choice_bias_N':
      return BIAS_UPDATED
    fixed = keys[-1].startswith('fixed_')
    return FROZEN if fixed or set(keys) & set(frozen) else TRAINED

  return jax.tree_util.tree_map_with_path(label, params)


def trained_norm(grads: Any, freeze: str) -> jax.Array:
  """The global norm of the gradient of what is trained; see `labels`."""
  of = jax.tree.map(
    lambda grad, label: grad if label == TRAINED else None,
    grads,
    labels(grads, freeze),
  )
  return optax.tree.norm(of)


def decayed(params: Any) -> Any:
  """A tree of bools: which parameters weight decay applies to."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: not re.fullmatch(_UNDECAYED, str(path[-1].key)), params
  )
