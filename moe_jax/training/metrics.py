"""What is computed about a step beside its loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.routing.balance import Load
from moe_jax.training.losses import SourceLoss

# Of names whose values are of every router, [layers, sub-layers].
OF_ROUTERS = 'routing/'

# Of a quarter of the balanced share of an expert, of that share and of four
# times it, as RGB; an expert that no token chose is black.
_COLOURS = np.array([[33, 102, 172], [247, 247, 247], [178, 24, 43]])
_WIDTH = 1024  # of a picture, in pixels, unless experts are more
_LARGEST_CELL = 16


def routing_metrics(load: Load | None) -> dict[str, Any]:
  """Returns what the routers did in a step, per layer and per router.

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
    The same of every router, [layers][sub-layers], as `routing/NAME`:
    `max_violation` (how far the busiest expert is above the balanced share, as
    a part of it: MaxVio of arXiv 2408.15664, of this batch), `idle_experts`,
    `entropy`, `dropped_share` and, with such buffers, `overflowed_share`.
    `max_violation` is its mean over all routers.
  """
  if load is None:
    return {}
  load = jax.tree.map(np.asarray, load)
  assignments = np.maximum(load.counts_N.sum(-1), 1.0)
  entropy = load.entropy / np.maximum(load.tokens, 1.0)
  max_load = load.counts_N.max(-1) * load.counts_N.shape[-1] / assignments
  idle = (load.counts_N == 0).sum(-1)
  dropped = load.dropped / assignments
  metrics: dict[str, Any] = {
    'max_load': max_load.max(1),
    'idle_experts': idle.sum(1),
    'router_entropy': entropy.mean(1),
    'dropped_share': dropped.max(1),
    'expert_counts': load.counts_N.round().astype(int),
    'max_violation': max_load.mean() - 1,
    f'{OF_ROUTERS}max_violation': max_load - 1,
    f'{OF_ROUTERS}idle_experts': idle,
    f'{OF_ROUTERS}entropy': entropy,
    f'{OF_ROUTERS}dropped_share': dropped,
  }
  if load.overflowed is not None:
    metrics['exchange_overflows'] = load.overflowed.sum(1)
    metrics[f'{OF_ROUTERS}overflowed_share'] = load.overflowed / assignments
  return metrics


def router_scalars(
  routers: Sequence[str], values: Mapping[str, Any]
) -> dict[str, float]:
  """Returns `NAME/layer_ROUTER` of every number that a router has.

  Args:
    routers: The names of the routers, from the lowest.
    values: Metrics, of which those count that are named `routing/NAME`.
  """
  return {
    f'{name.removeprefix(OF_ROUTERS)}/layer_{router}': float(value)
    for name, array in values.items()
    if name.startswith(OF_ROUTERS)
    for router, value in zip(routers, np.ravel(array), strict=True)
  }


def load_map(counts_WSN: np.ndarray) -> np.ndarray:
  """Returns a picture of the load of all experts, a line for each router.

  The balanced share is white, what is below it blue and what is above it red,
  the darker the further, up to a quarter and to four times of it. An expert
  that no token chose is black.

  Args:
    counts_WSN: The assignments to every expert, [layers, sub-layers, N].

  Returns:
    RGB, uint8 [lines, columns, 3]; an expert is a square of some pixels.
  """
  share_WS1 = np.maximum(counts_WSN.mean(-1, keepdims=True), 1e-9)
  fourfold_WSN = np.log2(np.maximum(counts_WSN / share_WS1, 1e-9)) / 2
  channels = [np.interp(fourfold_WSN, (-1, 0, 1), each) for each in _COLOURS.T]
  pixels_WSN3 = np.stack(channels, -1) * (counts_WSN > 0)[..., None]
  size = int(np.clip(_WIDTH // counts_WSN.shape[-1], 1, _LARGEST_CELL))
  lines = pixels_WSN3.astype(np.uint8).reshape(-1, *pixels_WSN3.shape[-2:])
  return lines.repeat(size, 0).repeat(size, 1)


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
