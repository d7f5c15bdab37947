"""The losses of the routers."""

from typing import Any

import jax
from ml_collections import ConfigDict

from moe_jax.routing import balance
from moe_jax.routing.balance import Load

Metrics = dict[str, Any]


def auxiliary_loss(
  load: Load | None,
  config: ConfigDict,
  share: float = 1.0,
  whole: Load | None = None,
) -> tuple[jax.Array | float, Metrics]:
  """The weighted balance and z losses, and both unweighted as metrics.

  Args:
    load: of a micro-batch; None without MoE layers.
    config: the whole config; reads `loss`.
    share: of the micro-batch in the losses' mean over micro-batches.
    whole: of the global batch, if its shares are to be even, else None.
  """
  if load is None:
    return 0.0, {}
  bias_gradient = load.bias_gradient.sum()
  if config.loss.balance_layers == 'joined':
    load, whole = balance.joined(load), whole and balance.joined(whole)
  if config.loss.balance_scope == 'sequence':
    balance_loss = share * balance.sequence_balance_loss(load)
  elif whole is not None:
    balance_loss = balance.balance_loss(load, whole)
  else:
    balance_loss = share * balance.balance_loss(load)
  metrics = {
    'balance_loss': balance_loss,
    'z_loss': share * balance.z_loss(load),
  }
  weighted = (
    config.loss.balance_weight * metrics['balance_loss']
    + config.loss.z_weight * metrics['z_loss']
  )
  return weighted + bias_gradient, metrics
