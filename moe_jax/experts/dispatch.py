"""How tokens get to their experts and back, on one device.

A dispatch is `dispatch(x_TD, routing, experts) -> Dispatched`. Both forms sort
the assignments by expert once, stably, and move rows by `experts.permute`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from moe_jax.experts.permute import combine, permute
from moe_jax.routing.selection import Routing


class Experts(Protocol):
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


class Dispatched(NamedTuple):
  """What became of the tokens that were dispatched.

  Attributes:
    y_TD: in the dtype of the tokens.
    dropped: slots that found no room, int32.
    overflowed: slots that found no room in an exchange's buffers and were
      computed another way, int32; None where no buffer can overflow.
  """

  y_TD: jax.Array
  dropped: jax.Array
  overflowed: jax.Array | None = None


class Dispatch(Protocol):
  """Brings tokens to their experts and the results back."""

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Experts
  ) -> Dispatched:
    """For every token the sum over its slots of weight times expert."""


class Order(NamedTuple):
  """The T*K slots sorted by expert, those unused (index N) last; all int32.

  Attributes:
    assignment_M: the slot in each row.
    row_TK: the row of each slot.
    sizes_N: rows of each expert.
    offsets_N: where they begin.
  """

  assignment_M: jax.Array
  row_TK: jax.Array
  sizes_N: jax.Array
  offsets_N: jax.Array


def dropless(x_TD: jax.Array, routing: Routing, experts: Experts) -> Dispatched:
  """Every slot reaches its expert, however uneven the experts are used."""
  order = sort(routing, experts.num_experts)
  y_TD = in_order(order, x_TD, routing, experts)
  return Dispatched(y_TD, jnp.zeros_like(order.sizes_N[0]))


def in_order(
  order: Order, x_TD: jax.Array, routing: Routing, experts: Experts
) -> jax.Array:
  """y_TD of slots that are sorted already."""
  rows_MD = permute(x_TD, order.assignment_M, order.row_TK)
  seeds_M = _seeds(routing, order.assignment_M)
  out_MD = experts.grouped(rows_MD, order.sizes_N, seeds_M)
  return combine(out_MD, routing.weights_TK, order.row_TK, order.assignment_M)


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
    self, x_TD: jax.Array, routing: Routing, experts: Experts
  ) -> Dispatched:
    slots = routing.indices_TK.size
    capacity = math.ceil(self.factor * slots / routing.num_experts)
    order = sort(routing, experts.num_experts, self.rank(routing))
    assignment_NC, row_TK = _queues(order, routing, capacity)
    assignment_M, kept_TK = (
      assignment_NC.reshape(-1),
      row_TK < assignment_NC.size,
    )
    rows_MD = permute(x_TD, assignment_M, row_TK)
    rows_NCD = rows_MD.reshape(*assignment_NC.shape, -1)
    out_NCD = experts.batched(rows_NCD, _seeds(routing, assignment_NC))
    y_TD = combine(
      out_NCD.reshape(rows_MD.shape), routing.weights_TK, row_TK, assignment_M
    )
    dropped = order.sizes_N.sum() - kept_TK.sum(dtype=jnp.int32)
    return Dispatched(y_TD, dropped)


def by_position(routing: Routing) -> None:
  """Earlier tokens come before later ones."""
  del routing


def by_probability(routing: Routing) -> jax.Array:
  """Slots to which the router gives more weight come before others."""
  return -jax.lax.stop_gradient(routing.weights_TK)


def sort(
  routing: Routing, num_experts: int, rank_TK: jax.Array | None = None
) -> Order:
  """Sorts the slots by expert, once and stably.

  Args:
    routing: of the tokens.
    num_experts: N.
    rank_TK: orders an expert's slots, lowest first; None, as they stand.
  """
  slots_M = routing.indices_TK.reshape(-1)
  if rank_TK is None:
    assignment_M = jnp.argsort(slots_M, stable=True)
  else:
    assignment_M = jnp.lexsort((rank_TK.reshape(-1), slots_M))  # a stable sort
  row_TK = jnp.argsort(assignment_M).reshape(routing.indices_TK.shape)
  edges = jnp.searchsorted(
    slots_M[assignment_M], jnp.arange(num_experts + 1), method='compare_all'
  )
  return Order(assignment_M, row_TK, jnp.diff(edges), edges[:-1])


def queued(order: Order, routing: Routing) -> tuple[jax.Array, jax.Array]:
  """The expert of every slot, and how many of its slots come before.

  Both int32 [T, K]; of an unused slot the last expert, and any number.
  """
  expert_TK = jnp.minimum(routing.indices_TK, len(order.sizes_N) - 1)
  return expert_TK, order.row_TK - order.offsets_N[expert_TK]


def _queues(
  order: Order, routing: Routing, capacity: int
) -> tuple[jax.Array, jax.Array]:
  """The first `capacity` slots of every expert.

  Returns:
    assignment_NC: the slots, T*K where there is none; and row_TK: the place of
    each slot in it, flattened, N*C for slots without one. Both int32.
  """
  slots, num_experts = routing.indices_TK.size, len(order.sizes_N)
  nth_C = jnp.arange(capacity)
  row_NC = jnp.minimum(order.offsets_N[:, None] + nth_C, slots - 1)
  used_NC = nth_C < order.sizes_N[:, None]
  assignment_NC = jnp.where(used_NC, order.assignment_M[row_NC], slots)
  expert_TK, nth_TK = queued(order, routing)
  kept_TK = (routing.indices_TK < num_experts) & (nth_TK < capacity)
  row_TK = expert_TK * capacity + nth_TK
  return assignment_NC, jnp.where(kept_TK, row_TK, assignment_NC.size)


def _seeds(routing: Routing, slots: jax.Array) -> jax.Array | None:
  """The seeds of the dropout of these slots, if there is any."""
  if routing.seeds_TK is None:
    return None
  # A slot past the end is nobody's: any seed will do.
  return routing.seeds_TK.reshape(-1).at[slots].get(mode='clip')


PRIORITIES = {'position': by_position, 'probability': by_probability}

DISPATCHES = {
  'dropless': lambda moe: dropless,
  'capacity': lambda moe: Capacity(
    moe.capacity_factor, PRIORITIES[moe.priority]
  ),
}
