"""How tokens meet experts that live on other devices.

An exchange is a dispatch that runs inside `shard_map`, on the U devices along
one axis: of its own tokens, with their routing to all N experts, and with the
N / U experts that live here. What it returns may be a partial sum, where a bank
has part of its experts' widths.

- `Gathered` takes the tokens of all devices to every expert.
- `Queues` sends every expert's queue of slots, of the same length from all
  devices, with another dispatch's rule for who stands in it.
- `Bounded` sends the slots that there are, through buffers of bounded size;
  those that find no room take the way of `OneByOne`, which is exact for any
  routing and needs the buffers of one device at a time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.experts.dispatch import (
  Bank,
  Dispatch,
  Dispatched,
  dropless,
  in_order,
  queued,
  sort,
)
from moe_jax.experts.exchange_size import Exchanged
from moe_jax.experts.rarely import plus_rarely
from moe_jax.experts.remote import QueuesToAll, RowsToAll
from moe_jax.experts.shard import Shard
from moe_jax.experts.trip import Plan
from moe_jax.routing.selection import Routing


@dataclasses.dataclass(frozen=True)
class Gathered:
  """All devices' tokens go to all devices; the results are summed on the way.

  Attributes:
    inner: dispatches all those tokens to the experts of one device.
    axis: of the devices.
  """

  inner: Dispatch
  axis: str

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Bank
  ) -> Dispatched:
    travels = x_TD, _Slots.of(routing)
    x_TD, slots = jax.tree.map(
      lambda a: lax.all_gather(a, self.axis, tiled=True), travels
    )
    done = self.inner(x_TD, slots.here(routing, experts, self.axis), experts)
    y_TD = lax.psum_scatter(
      done.y_TD, self.axis, scatter_dimension=0, tiled=True
    )
    return done._replace(y_TD=y_TD)


@dataclasses.dataclass(frozen=True)
class OneByOne:
  """As `Gathered`, but one device's tokens are computed after the other's.

  Slower, with smaller matmuls; but what it works with is no more than one
  device's slots, and nothing of it is kept.

  Attributes:
    inner: dispatches one device's tokens to the experts of another.
    axis: of the devices.
  """

  inner: Dispatch
  axis: str

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Bank
  ) -> Dispatched:
    @jax.checkpoint
    def of_one(travels: tuple[jax.Array, _Slots]) -> Dispatched:
      x_TD, slots = travels
      return self.inner(x_TD, slots.here(routing, experts, self.axis), experts)

    travels = x_TD, _Slots.of(routing)
    done = lax.map(
      of_one, jax.tree.map(lambda a: lax.all_gather(a, self.axis), travels)
    )
    y_TD = lax.psum_scatter(done.y_TD, self.axis, scatter_dimension=0)
    counts = jax.tree.map(lambda count: count.sum(0), done[1:])
    return Dispatched(y_TD, *counts)


@dataclasses.dataclass(frozen=True)
class Queues:
  """Slots stand in queues of one length, C for every expert on every device.

  Attributes:
    inner: a dispatch that uses `Bank.batched`; it sees the tokens of one device
      and the experts of all.
    axis: of the devices.
  """

  inner: Dispatch
  axis: str

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Bank
  ) -> Dispatched:
    return self.inner(x_TD, routing, QueuesToAll(experts, self.axis))


@dataclasses.dataclass(frozen=True)
class Bounded:
  """Dropless through bounded buffers; slots that do not fit take the slow way.

  That way is exact too: see `OneByOne`.

  Attributes:
    plan: of the trips.
    axis: of the devices.
    all_axes: of the whole mesh: all its devices go the slow way or none.
  """

  plan: Plan
  axis: str
  all_axes: tuple[str, ...]

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Shard
  ) -> Dispatched:
    order = sort(routing, routing.num_experts)
    devices = lax.axis_size(self.axis)
    shape = routing.indices_TK.shape
    trip = self.plan(
      order.sizes_N.reshape(devices, -1),
      Exchanged(*shape, routing.num_experts, devices),
    )
    overflowed = order.sizes_N.sum() - trip.kept_UN.sum()
    y_TD = plus_rarely(
      _travelling,
      self._staying,
      lax.pmax(overflowed, self.all_axes) > 0,
      (x_TD, routing.weights_TK, experts),
      (routing, order, trip),
    )
    return Dispatched(y_TD, jnp.zeros_like(overflowed), overflowed)

  def _staying(self, moving: Any, fixed: Any) -> jax.Array:
    """Of the slots for which the trip has no room."""
    x_TD, weights_TK, experts = moving
    routing, order, trip = fixed
    expert_TK, nth_TK = queued(order, routing)
    stays_TK = nth_TK >= trip.kept_UN.reshape(-1)[expert_TK]
    routing = dataclasses.replace(routing, weights_TK=weights_TK)
    slow = OneByOne(dropless, self.axis)
    # Whole before the loop over devices, not in each of its turns.
    bank = experts.whole(x_TD.dtype)
    return slow(x_TD, routing.only(stays_TK), bank).y_TD


def _travelling(moving: Any, fixed: Any) -> jax.Array:
  """Of the slots for which the trip has room; the others count 0."""
  x_TD, weights_TK, experts = moving
  routing, order, trip = fixed
  routing = dataclasses.replace(routing, weights_TK=weights_TK)
  return in_order(order, x_TD, routing, RowsToAll(experts, trip))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Slots:
  """What of a routing travels with the tokens; see `Routing`."""

  weights_TK: jax.Array
  indices_TK: jax.Array
  seeds_TK: jax.Array | None

  @classmethod
  def of(cls, routing: Routing) -> '_Slots':
    return cls(routing.weights_TK, routing.indices_TK, routing.seeds_TK)

  def here(self, routing: Routing, experts: Bank, axis: str) -> Routing:
    """Experts counted from this device's first; the slots of others unused."""
    first = lax.axis_index(axis) * experts.num_experts
    local_TK = self.indices_TK - first
    here_TK = (local_TK >= 0) & (local_TK < experts.num_experts)
    return dataclasses.replace(
      routing,
      weights_TK=jnp.where(here_TK, self.weights_TK, 0.0),
      indices_TK=jnp.where(here_TK, local_TK, experts.num_experts),
      seeds_TK=self.seeds_TK,
    )
