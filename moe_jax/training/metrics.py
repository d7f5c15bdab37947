"""What is computed about a step beside its loss."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.routing.balance import Load
from moe_jax.training.losses import SourceLoss


def routing_metrics(load: Load | None) -> dict[str, Any]:
  """Returns what the routers did in a step, per layer.

  Args:
    load: NumPy or jax arrays with leading axes [layers, S], or None.

  Returns:
    Arrays with one number per MoE layer, the worst or mean of its sub-layers:
    `max_load` (rows of the busiest expert over the balanced share; 1 is
    perfect), `idle_experts` (experts that no token chose), `router_entropy`
    (nats per token; log N is uniform) and `dropped_share` (of assignments).
    `expert_counts` has the assignments to every expert, whole numbers
    [layers][sub-layers][N].
    Where devices exchange rows through buffers that may be too small, also
    `exchange_overflows`: the assignments of all sub-layers that took the
    overflow fallback.
  """
  if load is None:
    return {}
  load = jax.tree.map(np.asarray, load)
  assignments = np.maximum(load.counts_N.sum(-1), 1.0)
  tokens = np.maximum(load.tokens, 1.0)
  max_load = load.counts_N.max(-1) * load.counts_N.shape[-1] / assignments
  metrics: dict[str, Any] = {
    'max_load': max_load.max(1),
    'idle_experts': (load.counts_N == 0).sum((1, 2)),
    'router_entropy': (load.entropy / tokens).mean(1),
    'dropped_share': (load.dropped / assignments).max(1),
    'expert_counts': load.counts_N.round().astype(int),
  }
  if load.overflowed is not None:
    metrics['exchange_overflows'] = load.overflowed.sum(1)
  return metrics


def source_losses(
  names: Sequence[str], found: SourceLoss | None
) -> dict[str, float]:
  """Returns `loss/NAME` of every source with a target in the batch, in nats.

  Args:
    names: The names of the sources of a mixture.
    found: Their part in the batch; None of a single source.
  """
  if found is None:
    return {}
  pairs = zip(names, *map(np.asarray, found), strict=True)
  return {
    f'loss/{name}': float(loss / share) for name, loss, share in pairs if share
  }
