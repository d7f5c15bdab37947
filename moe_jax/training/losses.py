"""What training minimises: the loss of tokens and those of the routers.

The terms are computed elsewhere, `moe_jax.model.loss` and
`moe_jax.routing.balance`; here, and nowhere else, they are weighted and added.
"""

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from moe_jax.model.decoder import Head
from moe_jax.model.loss import Targets, cross_entropy
from moe_jax.routing import balance
from moe_jax.routing.balance import Load

Metrics = dict[str, Any]


class Share(NamedTuple):
  """How much of the global batch a micro-batch is.

  Attributes:
    tokens: Its share of the real tokens.
    sequences: Its share of the sequences with a real token.
    batch_load: The routing statistics of the whole batch if its shares are to
      be even, else None.
  """

  tokens: jax.Array | float
  sequences: jax.Array | float
  batch_load: Load | None


WHOLE = Share(1.0, 1.0, None)


class SourceLoss(NamedTuple):
  """The part that each of S sources has in a batch, float32.

  Attributes:
    loss_S: What its targets add to the mean loss.
    share_S: Their share of all targets.
  """

  loss_S: jax.Array
  share_S: jax.Array


def total_loss(
  config: ConfigDict,
  mesh: Mesh,
  x_BLD: jax.Array,
  head: Head,
  targets: Targets,
  load: Load | None,
  share: Share = WHOLE,
  source_BS: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
  """Returns the part of the loss that a micro-batch has, and its metrics.

  It is the cross-entropy, `loss.balance_weight` times the balance loss,
  `loss.z_weight` times the z-loss, and a 0 whose gradient is the update of the
  expert biases. The parts of a batch's micro-batches add up to its loss: each
  counts by its tokens or, where sequences are balanced, by its sequences.

  Args:
    config: The whole config; reads `loss`.
    mesh: Where the arrays are.
    x_BLD: What the head reads.
    head: The output head.
    targets: The next tokens, with weights that add up to 1 over the batch.
    load: The routing statistics of the micro-batch; None without MoE layers.
    share: What part of the batch the micro-batch is; all of it if left out.
    source_BS: 1 at the source of each row, of S; None of a single source.

  Returns:
    The loss, and `loss`, `balance_loss`, `z_loss` (unweighted), `load`, and of
    a mixture `sources`, a `SourceLoss`.
  """
  with jax.named_scope('loss'):
    loss, loss_BL, _ = cross_entropy(mesh, x_BLD, head, targets)
  metrics: Metrics = {'loss': loss, 'load': load}
  if source_BS is not None:
    metrics['sources'] = SourceLoss(
      loss_BL.sum(-1) @ source_BS, targets.weights_BL.sum(-1) @ source_BS
    )
  if load is None:
    return loss, metrics
  metrics |= _router_losses(config, load, share)
  weighted = (
    config.loss.balance_weight * metrics['balance_loss']
    + config.loss.z_weight * metrics['z_loss']
  )
  return loss + (weighted + load.bias_gradient.sum()), metrics


def _router_losses(config: ConfigDict, load: Load, share: Share) -> Metrics:
  """Returns the balance loss and the z-loss, both unweighted."""
  batch_load = share.batch_load
  if config.loss.balance_layers == 'joined':
    load = balance.joined(load)
    batch_load = batch_load and balance.joined(batch_load)
  if config.loss.balance_scope == 'sequence':
    balance_loss = share.sequences * balance.sequence_balance_loss(load)
  elif batch_load is not None:
    balance_loss = balance.balance_loss(load, batch_load)
  else:
    balance_loss = share.tokens * balance.balance_loss(load)
  return {
    'balance_loss': balance_loss,
    'z_loss': share.tokens * balance.z_loss(load),
  }
