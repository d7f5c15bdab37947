"""Optimizers, with clipping, selective weight decay and frozen parameters.

An optimizer is a function of the whole config, a schedule and what each
parameter declares; it returns an `optax.GradientTransformation` for those that
are trained. `OPTIMIZERS` has those of the library, all from optax; a user's own
is registered in a config file:

  @OPTIMIZERS.register('mine')
  def mine(config, schedule, declarations): return optax.sgd(schedule)

Some parameters are not an optimizer's own: those of frozen routers and those
that are fixed for good are left alone, and the bias by which experts are chosen
moves by the sign of what its gradient counts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from ml_collections import ConfigDict
from optax import contrib

from moe_jax.parameter import (
  BIAS_UPDATED,
  CELL,
  EMBED,
  EXPERT,
  FIXED,
  MODEL,
  ROUTER,
  TRAINED,
  VOCAB,
  Declaration,
)
from moe_jax.registry import OPTIMIZERS, SCHEDULES
from moe_jax.training import schedules  # noqa: F401 (registers them)

# Beside `TRAINED` and `BIAS_UPDATED`, the label of what stays as it is: what is
# declared `FIXED`, and what `optimizer.freeze` names.
FROZEN = 'frozen'
_FROZEN_PARTS = {
  'none': (),
  'router': (ROUTER,),
  'router_and_cell': (ROUTER, CELL),
}

MakeOptimizer = Callable[
  [ConfigDict, optax.Schedule, Any], optax.GradientTransformation
]


def schedule(config: ConfigDict) -> optax.Schedule:
  """Returns the learning rate over the steps that a validated config names."""
  return SCHEDULES[config.optimizer.schedule](config)


def make(config: ConfigDict, declarations: Any) -> optax.GradientTransformation:
  """Returns the optimizer that a validated config describes.

  Args:
    config: The whole config.
    declarations: What each parameter is, a tree like that of the parameters.
  """
  optimizer = config.optimizer
  make_trained: MakeOptimizer = OPTIMIZERS[optimizer.name]
  trained = make_trained(config, schedule(config), declarations)
  if optimizer.router_rate != 1:
    trained = optax.chain(
      trained,
      optax.masked(
        optax.scale(optimizer.router_rate), of_routers(declarations)
      ),
    )
  if optimizer.clip_norm:
    trained = optax.chain(_clip(optimizer.clip_norm), trained)
  return optax.partition(
    {
      TRAINED: trained,
      FROZEN: optax.set_to_zero(),
      BIAS_UPDATED: optax.sign_sgd(config.loss.bias_rate),
    },
    labels(declarations, optimizer.freeze),
  )


def _clip(max_norm: float) -> optax.GradientTransformation:
  """Returns `optax.clip_by_global_norm`, on CPU as one factor.

  A quotient of every element is dear enough there for XLA to keep it, as large
  as the gradient; a product it makes again for each of its readers.
  """
  clip = optax.clip_by_global_norm(max_norm)

  def scaled(updates: Any) -> Any:
    norm = optax.tree.norm(updates)
    scale = jnp.where(norm < max_norm, 1, max_norm / norm)
    return jax.tree.map(lambda update: update * scale, updates)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    clipped = lax.platform_dependent(
      updates,
      cpu=scaled,
      default=lambda updates: clip.update(updates, state)[0],
    )
    return clipped, state

  return optax.GradientTransformation(clip.init, update)


@OPTIMIZERS.register('adamw')
def adamw(
  config: ConfigDict, schedule: optax.Schedule, declarations: Any
) -> optax.GradientTransformation:
  """Returns AdamW (arXiv 1711.05101)."""
  optimizer = config.optimizer
  return optax.adamw(
    schedule,
    b1=optimizer.b1,
    b2=optimizer.b2,
    eps=optimizer.epsilon,
    weight_decay=optimizer.weight_decay,
    mask=decayed(declarations),
  )


@OPTIMIZERS.register('lion')
def lion(
  config: ConfigDict, schedule: optax.Schedule, declarations: Any
) -> optax.GradientTransformation:
  """Returns Lion (arXiv 2302.06675), which wants a rate 3 to 10 times lower."""
  optimizer = config.optimizer
  return optax.lion(
    schedule,
    b1=optimizer.b1,
    b2=optimizer.b2,
    weight_decay=optimizer.weight_decay,
    mask=decayed(declarations),
  )


@OPTIMIZERS.register('adafactor')
def adafactor(
  config: ConfigDict, schedule: optax.Schedule, declarations: Any
) -> optax.GradientTransformation:
  """Returns Adafactor (arXiv 1804.04235): factored second moments, no first.

  The learning rate and weight decay mean what they mean for AdamW: steps are
  not scaled by the size of the parameters (the paper's section 8).
  """
  return optax.chain(
    optax.scale_by_factored_rms(),
    optax.clip_by_block_rms(1.0),
    optax.add_decayed_weights(
      config.optimizer.weight_decay, decayed(declarations)
    ),
    optax.scale_by_learning_rate(schedule),
  )


@OPTIMIZERS.register('muon')
def muon(
  config: ConfigDict, schedule: optax.Schedule, declarations: Any
) -> optax.GradientTransformation:
  """Returns Muon for the model's matrices, and AdamW for everything else.

  A matrix leads from the hidden state to all other axes of a parameter or
  back; each layer's and each expert's is its own. Embedding, head, routers and
  vectors are AdamW's. Updates are scaled to the size of AdamW's, so that both
  share a learning rate (Liu et al., arXiv 2502.16982, section 2.2).
  """
  optimizer = config.optimizer

  def matrices(params: Any) -> Any:
    return jax.tree.map(_matrix, declarations, params)

  def of_matrices(params: Any) -> Any:
    return jax.tree.map(
      lambda sides, _: 'adamw' if sides is None else 'muon',
      matrices(params),
      params,
      is_leaf=lambda node: (
        node is None or isinstance(node, contrib.MuonDimensionNumbers)
      ),
    )

  # Not `contrib.muon` for all of them: its own AdamW decays vectors too.
  return optax.partition(
    {
      'muon': contrib.muon(
        schedule,
        beta=optimizer.momentum,
        weight_decay=optimizer.weight_decay,
        weight_decay_mask=decayed(declarations),
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
      ),
      'adamw': adamw(config, schedule, declarations),
    },
    of_matrices,
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


def of_routers(declarations: Any) -> Any:
  """Returns a tree of bools: what belongs to routers or to their cell."""
  return jax.tree.map(
    lambda declared: declared.part in (ROUTER, CELL), declarations
  )


def _matrix(
  declared: Declaration, param: jax.Array | optax.MaskedNode
) -> contrib.MuonDimensionNumbers | optax.MaskedNode | None:
  """Returns the two sides of a parameter's matrix; None where Muon has none."""
  if isinstance(param, optax.MaskedNode):
    return param  # not trained: not this optimizer's
  axes = declared.axes
  if declared.part != MODEL or EMBED not in axes or VOCAB in axes:
    return None
  first = param.ndim - len(axes)  # after those of stacked layers
  embed = first + axes.index(EMBED)
  others = tuple(
    first + i for i, axis in enumerate(axes) if axis not in (EMBED, EXPERT)
  )
  if not others:
    return None
  # The hidden state is read where its axis comes first, and written elsewhere.
  if embed < min(others):
    return contrib.MuonDimensionNumbers((embed,), others)
  return contrib.MuonDimensionNumbers(others, (embed,))
