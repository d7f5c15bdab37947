"""What is computed about a step beside its loss."""

import math
from typing import Any

import jax
import numpy as np

from moe_jax.errors import UserError
from moe_jax.routing.balance import Load


def routing_metrics(load: Load | None) -> dict[str, Any]:
  """What the routers did in a step, per layer.

  Args:
    load: numpy or jax arrays with leading axes [layers, S], or None.

  Returns:
    Lists with one number per MoE layer, the worst or mean of its sub-layers:
    `max_load` (rows of the busiest expert over the balanced share; 1 is
    perfect), `idle_experts` (experts that no token chose), `router_entropy`
    (nats per token; log N is uniform) and `dropped_share` (of slots). Where
    devices exchange slots through buffers that may be too small, also
    `exchange_overflows`: slots of all sub-layers that took the slower way.
  """
  if load is None:
    return {}
  load = jax.tree.map(np.asarray, load)
  slots = np.maximum(load.counts_N.sum(-1), 1.0)
  tokens = np.maximum(load.tokens, 1.0)
  max_load = load.counts_N.max(-1) * load.counts_N.shape[-1] / slots
  metrics = {
    'max_load': max_load.max(1),
    'idle_experts': (load.counts_N == 0).sum((1, 2)),
    'router_entropy': (load.entropy / tokens).mean(1),
    'dropped_share': (load.dropped / slots).max(1),
  }
  if load.overflowed is not None:
    metrics['exchange_overflows'] = load.overflowed.sum(1)
  return metrics


def check_finite(loss: float, step: int) -> float:
  """Returns the loss.

  Raises:
    UserError: it is not finite.
  """
  if not math.isfinite(loss):
    raise UserError(
      f'the loss is {loss} at step {step}: training has diverged; lower'
      ' optimizer.learning_rate or raise optimizer.warmup_steps'
    )
  return loss
