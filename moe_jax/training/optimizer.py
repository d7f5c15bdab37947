"""AdamW with warm-up, cosine decay, clipping and selective weight decay.

Some parameters are not its own: those of frozen routers and those that are
fixed for good are left alone, and the bias by which experts are chosen moves by
the sign of what its gradient counts.
"""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.parameter import (
  BIAS_UPDATED,
  CELL,
  FIXED,
  ROUTER,
  TRAINED,
  Declaration,
)

# Beside `TRAINED` and `BIAS_UPDATED`, the label of what stays as it is: what is
# declared `FIXED`, and what `optimizer.freeze` names.
FROZEN = 'frozen'
_FROZEN_PARTS = {
  'none': (),
  'router': (ROUTER,),
  'router_and_cell': (ROUTER, CELL),
}


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


def make(config: ConfigDict, declarations: Any) -> optax.GradientTransformation:
  """Returns the optimizer that a validated config describes.

  Args:
    config: The whole config.
    declarations: What each parameter is, a tree like that of the parameters.
  """
  optimizer = config.optimizer
  trained = optax.adamw(
    schedule(config),
    b1=optimizer.b1,
    b2=optimizer.b2,
    eps=optimizer.epsilon,
    weight_decay=optimizer.weight_decay,
    mask=decayed(declarations),
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
    labels(declarations, optimizer.freeze),
  )


def labels(declarations: Any, freeze: str) -> Any:
  """Returns a tree of `TRAINED`, `FROZEN` and `BIAS_UPDATED`.

  Args:
    declarations: What each parameter is, a tree like that of the parameters.
    freeze: The value of `optimizer.freeze`: 'router' stands for projectors and
      gates of all layers (RMoE, arXiv 2408.06793, fine-tuning),
      'router_and_cell' for the recurrent cell too.
  """

  def label(declared: Declaration) -> str:
    if declared.update == BIAS_UPDATED:
      return BIAS_UPDATED
    frozen = declared.update == FIXED or declared.part in _FROZEN_PARTS[freeze]
    return FROZEN if frozen else TRAINED

  return jax.tree.map(label, declarations)


def trained_norm(grads: Any, declarations: Any, freeze: str) -> jax.Array:
  """Returns the global norm of the gradient of what is trained."""
  trained = jax.tree.map(
    lambda grad, label: grad if label == TRAINED else None,
    grads,
    labels(declarations, freeze),
  )
  return optax.tree.norm(trained)


def decayed(declarations: Any) -> Any:
  """Returns a tree of bools: which parameters weight decay applies to."""
  return jax.tree.map(lambda declared: declared.decay, declarations)
