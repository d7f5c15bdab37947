"""How tokens get to their experts and back, on one device.

A dispatch is `dispatch(x_TD, routing, experts) -> y_TD, dropped`: the sum over
a token's slots of weight times expert, and the number of slots (int32) that
found no room. Both forms sort the slots by expert once, stably, and move rows
by gathers alone, backward too: scatters are serial on CPU and slow on TPU.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from moe_jax.routing.selection import Routing


class Bank(Protocol):
  """Experts that live here: all, or a device's share.

  Attributes:
    num_experts: that live here.
  """

  num_experts: int

  def grouped(
    self, rows_MD: jax.Array, sizes_N: jax.Array, seeds_M: jax.Array | None
  ) -> jax.Array:
    """Rows sorted by expert, `sizes_N` each; `seeds_M` of their dropout."""

  def batched(
    self, rows_NCD: jax.Array, seeds_NC: jax.Array | None
  ) -> jax.Array:
    """C rows for every expert."""


class Dispatch(Protocol):
  """Brings tokens to their experts and the results back."""

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Bank
  ) -> tuple[jax.Array, jax.Array]:
    """y_TD in the dtype of x_TD, and the number of dropped slots, int32."""


def dropless(
  x_TD: jax.Array, routing: Routing, experts: Bank
) -> tuple[jax.Array, jax.Array]:
  """Every slot reaches its expert, however uneven the experts are used."""
  order_M, place_TK, sizes_N, _ = _sort(routing, experts.num_experts)
  rows_MD = _gather_rows(x_TD, order_M, place_TK)
  out_MD = experts.grouped(rows_MD, sizes_N, _seeds(routing, order_M))
  out_TKD = _return_rows(out_MD, order_M, place_TK)
  return _combine(out_TKD, routing.weights_TK), jnp.zeros_like(sizes_N[0])


@dataclasses.dataclass(frozen=True)
class Capacity:
  """At most C slots per expert; the rest is dropped.

  `C = ceil(factor * T * K / N)` over the tokens dispatched together (those of
  one group of devices along the expert axis), with N the router's experts. A
  token's output depends on other tokens of the batch.

  Attributes:
    factor: room over the balanced share.
    rank: of every slot, [T, K]: an expert takes the lowest first, and of equals
      the earliest; None for all alike. A value of `PRIORITIES`.
  """

  factor: float
  rank: Callable[[Routing], jax.Array | None]

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Bank
  ) -> tuple[jax.Array, jax.Array]:
    num_rows = routing.indices_TK.size
    capacity = math.ceil(self.factor * num_rows / routing.num_experts)
    order_M, place_TK, sizes_N, starts_N = _sort(
      routing, experts.num_experts, self.rank(routing)
    )
    used_NC = jnp.arange(capacity) < sizes_N[:, None]
    source_NC = starts_N[:, None] + jnp.arange(capacity)
    slot_NC = order_M[jnp.minimum(source_NC, num_rows - 1)]
    token_NC = slot_NC // routing.indices_TK.shape[1]
    rows_NCD = jnp.where(used_NC[..., None], x_TD[token_NC], 0)
    out_NCD = experts.batched(rows_NCD, _seeds(routing, slot_NC))

    expert_TK = jnp.minimum(routing.indices_TK, experts.num_experts - 1)
    nth_TK = place_TK - starts_N[expert_TK]  # position in the expert's queue
    present_TK = routing.indices_TK < experts.num_experts
    kept_TK = present_TK & (nth_TK < capacity)
    nth_TK = jnp.clip(nth_TK, 0, capacity - 1)
    weights_TK = jnp.where(kept_TK, routing.weights_TK, 0.0)
    y_TD = _combine(out_NCD[expert_TK, nth_TK], weights_TK)
    return y_TD, (present_TK & ~kept_TK).sum(dtype=jnp.int32)


def by_position(routing: Routing) -> None:
  """Earlier tokens come before later ones."""
  del routing


def by_probability(routing: Routing) -> jax.Array:
  """Slots to which the router gives more weight come before others."""
  return -jax.lax.stop_gradient(routing.weights_TK)


def _sort(
  routing: Routing, num_experts: int, rank_TK: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Sorts the T*K slots by expert; unused slots (index N) come last.

  Args:
    routing: of the tokens.
    num_experts: N.
    rank_TK: orders an expert's slots, lowest first; None, as they stand.

  Returns:
    order_M: the slot in each row; place_TK: the row of each slot; sizes_N and
    starts_N: rows of each expert and where they begin. All int32.
  """
  slots_M = routing.indices_TK.reshape(-1)
  if rank_TK is None:
    order_M = jnp.argsort(slots_M, stable=True)
  else:
    order_M = jnp.lexsort((rank_TK.reshape(-1), slots_M))  # a stable sort
  place_TK = jnp.argsort(order_M).reshape(routing.indices_TK.shape)
  edges = jnp.searchsorted(slots_M[order_M], jnp.arange(num_experts + 1))
  return order_M, place_TK, jnp.diff(edges), edges[:-1]


def _seeds(routing: Routing, slots: jax.Array) -> jax.Array | None:
  """The seeds of the dropout of these slots, if there is any."""
  if routing.seeds_TK is None:
    return None
  return routing.seeds_TK.reshape(-1)[slots]


def _combine(out_TKD: jax.Array, weights_TK: jax.Array) -> jax.Array:
  """Weighted sum over a token's slots, accumulated in float32."""
  y_TD = jnp.einsum(
    'TKD,TK->TD', out_TKD, weights_TK, preferred_element_type=jnp.float32
  )
  return y_TD.astype(out_TKD.dtype)


@jax.custom_vjp
def _gather_rows(
  x_TD: jax.Array, order_M: jax.Array, place_TK: jax.Array
) -> jax.Array:
  """Row m is the token of slot `order_M[m]`."""
  return x_TD[order_M // place_TK.shape[1]]


def _gather_rows_backward(
  place_TK: jax.Array, grad_MD: jax.Array
) -> tuple[jax.Array, None, None]:
  return grad_MD[place_TK].sum(1), None, None


_gather_rows.defvjp(
  lambda x_TD, order_M, place_TK: (
    _gather_rows(x_TD, order_M, place_TK),
    place_TK,
  ),
  _gather_rows_backward,
)


@jax.custom_vjp
def _return_rows(
  out_MD: jax.Array, order_M: jax.Array, place_TK: jax.Array
) -> jax.Array:
  """Back from rows to the slots of each token: the inverse permutation."""
  return out_MD[place_TK]


def _return_rows_backward(
  order_M: jax.Array, grad_TKD: jax.Array
) -> tuple[jax.Array, None, None]:
  return grad_TKD.reshape(len(order_M), -1)[order_M], None, None


_return_rows.defvjp(
  lambda out_MD, order_M, place_TK: (
    _return_rows(out_MD, order_M, place_TK),
    order_M,
  ),
  _return_rows_backward,
)


PRIORITIES = {'position': by_position, 'probability': by_probability}

DISPATCHES = {
  'dropless': lambda moe: dropless,
  'capacity': lambda moe: Capacity(
    moe.capacity_factor, PRIORITIES[moe.priority]
  ),
}
