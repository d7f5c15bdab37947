"""How tokens get to their experts and back, on one device.

A dispatch is `dispatch(x_TD, routing, experts) -> Dispatched`. An assignment is
a (token, expert) pair, number t K + k of T K. Both dispatches sort the
assignments by expert once, stably, permute the tokens into that order, let the
experts compute, and add up what comes out, each with its weight:

  rows_MD = permute(x_TD)    out_MD = experts(rows_MD)    y_TD = combine(out_MD)

A user's own dispatch registers a function that makes it from the config's
section `moe`:

  @DISPATCHES.register('mine')
  def mine(moe: ConfigDict) -> Dispatch: ...
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe_jax.experts.permute import add_up, combine, permute
from moe_jax.registry import DISPATCHES
from moe_jax.routing.selection import Routing


class Experts(Protocol):
  """N experts: all of a layer, those of one device, or those of all devices."""

  @property
  def num_experts(self) -> int:
    """N, the number of these experts."""

  def grouped(
    self,
    rows_MD: jax.Array,
    sizes_N: jax.Array,
    seeds_M: jax.Array | None,
    weights_M: jax.Array | None = None,
  ) -> jax.Array:
    """Computes rows that are sorted by expert.

    Args:
      rows_MD: The rows of expert 0, then those of expert 1, and so on.
      sizes_N: int32, the number of rows of each expert; the rows past their
        sum belong to none.
      seeds_M: uint32, the seed of each row's dropout; None for no dropout.
      weights_M: float32, what each row's output is multiplied by; None for 1.

    Returns:
      The output [M, D] of each row's expert.
    """

  def batched(
    self, rows_NCD: jax.Array, seeds_NC: jax.Array | None
  ) -> jax.Array:
    """Computes C rows for every expert and returns as many outputs.

    Args:
      rows_NCD: C rows for each expert, some of them padding.
      seeds_NC: uint32, as in `grouped`.
    """

  def unshard(self, dtype: jnp.dtype) -> 'Experts':
    """Returns the same experts, for who calls them many times.

    What a call would do with the parameters, gathering them from the devices
    and casting them to `dtype`, is done here once.
    """


class Dispatched(NamedTuple):
  """What became of the tokens that were dispatched.

  Attributes:
    y_TD: The layer's output, in the dtype of the tokens.
    dropped: int32, the number of assignments that found no room.
    overflowed: int32, the number of assignments that found no room in an
      exchange's buffers and were computed another way; None where no buffer
      can overflow.
  """

  y_TD: jax.Array
  dropped: jax.Array
  overflowed: jax.Array | None = None


class Dispatch(Protocol):
  """Brings tokens to their experts and the results back."""

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Experts
  ) -> Dispatched:
    """Computes `y_t = sum_k weights_tk expert_tk(x_t)` for every token t."""


class Order(NamedTuple):
  """The T K assignments sorted by expert, those unused (index N) last.

  Attributes:
    assignment_M: int32, the assignment in each row.
    row_TK: int32, the row of each assignment.
    sizes_N: int32, the number of rows of each expert.
    offsets_N: int32, the row at which each expert's rows begin.
  """

  assignment_M: jax.Array
  row_TK: jax.Array
  sizes_N: jax.Array
  offsets_N: jax.Array


def dropless(x_TD: jax.Array, routing: Routing, experts: Experts) -> Dispatched:
  """Computes every assignment, however unevenly the experts are used.

  Experts weigh their hidden units: so no gradient needs their outputs, and none
  are kept or made again.
  """
  order = sort(routing, experts.num_experts)
  assignment_M, row_TK, sizes_N, _ = order
  rows_MD = permute(x_TD, assignment_M, row_TK, complete=True)
  seeds_M = _seeds(routing, assignment_M)
  weights_M = permute(
    routing.weights_TK.reshape(-1),
    assignment_M,
    row_TK.reshape(-1, 1),
    complete=True,
  )
  out_MD = experts.grouped(rows_MD, sizes_N, seeds_M, weights_M)
  y_TD = add_up(out_MD, row_TK, assignment_M)
  return Dispatched(y_TD, jnp.zeros_like(sizes_N[0]))


def dropless_weighing_outputs(
  x_TD: jax.Array, routing: Routing, experts: Experts
) -> Dispatched:
  """Does what `dropless` does, for experts that are wider than their outputs.

  The outputs are weighed and kept, which is less than as many hidden units.
  """
  order = sort(routing, experts.num_experts)
  y_TD = compute_sorted(order, x_TD, routing, experts)
  return Dispatched(y_TD, jnp.zeros_like(order.sizes_N[0]))


def compute_sorted(
  order: Order, x_TD: jax.Array, routing: Routing, experts: Experts
) -> jax.Array:
  """Returns y_TD of assignments that are sorted already.

  Their weights need not be where the experts are.
  """
  rows_MD = permute(x_TD, order.assignment_M, order.row_TK, complete=True)
  seeds_M = _seeds(routing, order.assignment_M)
  out_MD = experts.grouped(rows_MD, order.sizes_N, seeds_M)
  return combine(out_MD, routing.weights_TK, order.row_TK, order.assignment_M)


@dataclasses.dataclass(frozen=True)
class Capacity:
  """Computes at most C assignments per expert; the rest is dropped.

  `C = ceil(factor * T * K / N)` over the tokens dispatched together (those of
  one group of devices along the expert axis), with N the router's experts. A
  token's output depends on other tokens of the batch.

  Attributes:
    factor: The room over the balanced share.
    rank: Returns a number for every assignment, [T, K]: an expert takes the
      lowest first, and of equals the earliest. None in its place makes all
      alike. It is a value of `PRIORITIES`.
  """

  factor: float
  rank: Callable[[Routing], jax.Array | None]

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Experts
  ) -> Dispatched:
    assignments = routing.indices_TK.size
    capacity = math.ceil(self.factor * assignments / routing.num_experts)
    order = sort(routing, experts.num_experts, self.rank(routing))
    assignment_NC, row_TK = _first_of_each(order, routing, capacity)
    assignment_M = assignment_NC.reshape(-1)
    kept_TK = row_TK < assignment_NC.size
    rows_MD = permute(x_TD, assignment_M, row_TK)
    rows_NCD = rows_MD.reshape(*assignment_NC.shape, -1)
    out_NCD = experts.batched(rows_NCD, _seeds(routing, assignment_NC))
    out_MD = out_NCD.reshape(rows_MD.shape)
    y_TD = combine(out_MD, routing.weights_TK, row_TK, assignment_M)
    dropped = order.sizes_N.sum() - kept_TK.sum(dtype=jnp.int32)
    return Dispatched(y_TD, dropped)


def by_position(routing: Routing) -> None:
  """Puts earlier tokens before later ones."""
  del routing


def by_probability(routing: Routing) -> jax.Array:
  """Puts assignments to which the router gives more weight before others."""
  return -jax.lax.stop_gradient(routing.weights_TK)


def sort(
  routing: Routing, num_experts: int, rank_TK: jax.Array | None = None
) -> Order:
  """Sorts the assignments by expert, once and stably.

  Args:
    routing: The routing of the tokens.
    num_experts: N.
    rank_TK: Orders an expert's assignments, the lowest first; None leaves them
      as they stand.
  """
  experts_M = routing.indices_TK.reshape(-1)
  if rank_TK is None:
    assignment_M = jnp.argsort(experts_M, stable=True)
  else:  # lexsort is stable
    assignment_M = jnp.lexsort((rank_TK.reshape(-1), experts_M))
  row_TK = jnp.argsort(assignment_M).reshape(routing.indices_TK.shape)
  edges = jnp.searchsorted(
    experts_M[assignment_M], jnp.arange(num_experts + 1), method='compare_all'
  )
  return Order(assignment_M, row_TK, jnp.diff(edges), edges[:-1])


def place_in_expert(
  order: Order, routing: Routing
) -> tuple[jax.Array, jax.Array]:
  """Returns the expert of every assignment, and how many come before it there.

  Both are int32 [T, K]; of an unused assignment they are the last expert and
  any number.
  """
  expert_TK = jnp.minimum(routing.indices_TK, len(order.sizes_N) - 1)
  return expert_TK, order.row_TK - order.offsets_N[expert_TK]


def _first_of_each(
  order: Order, routing: Routing, capacity: int
) -> tuple[jax.Array, jax.Array]:
  """Finds the first `capacity` assignments of every expert.

  Returns:
    assignment_NC, T K where an expert has none left; and row_TK, the place of
    each assignment in it, flattened, N C for those without one. Both int32.
  """
  assignments, num_experts = routing.indices_TK.size, len(order.sizes_N)
  nth_C = jnp.arange(capacity)
  row_NC = jnp.minimum(order.offsets_N[:, None] + nth_C, assignments - 1)
  used_NC = nth_C < order.sizes_N[:, None]
  assignment_NC = jnp.where(used_NC, order.assignment_M[row_NC], assignments)
  expert_TK, nth_TK = place_in_expert(order, routing)
  kept_TK = (routing.indices_TK < num_experts) & (nth_TK < capacity)
  row_TK = expert_TK * capacity + nth_TK
  return assignment_NC, jnp.where(kept_TK, row_TK, assignment_NC.size)


def _seeds(routing: Routing, assignments: jax.Array) -> jax.Array | None:
  """Returns the seeds of these assignments' dropout, if there is any."""
  if routing.seeds_TK is None:
    return None
  # An assignment past the end is nobody's: any seed will do.
  return routing.seeds_TK.reshape(-1).at[assignments].get(mode='clip')


PRIORITIES = {'position': by_position, 'probability': by_probability}


@DISPATCHES.register('dropless')
def _dropless(moe: ConfigDict) -> Dispatch:
  del moe
  return dropless


@DISPATCHES.register('capacity')
def _capacity(moe: ConfigDict) -> Dispatch:
  return Capacity(moe.capacity_factor, PRIORITIES[moe.priority])
