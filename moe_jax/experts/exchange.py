"""How tokens meet experts that live on other devices.

An exchange is a dispatch that runs inside `shard_map`, on the U devices along
one axis: of its own tokens, with their routing to all N experts, and with the
N / U experts that live here. What it returns may be a partial sum, where a bank
has part of its experts' widths.

- `AllGather` takes the tokens of all devices to every expert.
- `CapacityAllToAll` sends every expert's queue of assignments, of the same
  length from all devices, with another dispatch's rule for who stands in it.
- `BufferedAllToAll` sends the assignments that there are, through buffers of
  bounded size; those that find no room take the way of `SequentialAllGather`,
  which is exact for any routing and needs the buffers of one device at a time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.experts import exchange_cost
from moe_jax.experts.dispatch import (
  Dispatch,
  Dispatched,
  Experts,
  dropless,
  in_order,
  queued,
  sort,
)
from moe_jax.experts.exchange_cost import ExchangeSizes
from moe_jax.experts.expert_parallel import LocalExperts, static
from moe_jax.experts.permute import gather_rows, offsets, segment_offsets
from moe_jax.routing.selection import Routing


class Trip(Protocol):
  """A trip that is planned: who sends how many rows to whom.

  Attributes:
    send_counts_UN: int32, of the rows for every local expert of every device
      the first so many travel.
    receive_counts_UX: int32, the rows that arrive: from every device one part
      for each local expert, then what lies before the next device's.
  """

  send_counts_UN: jax.Array
  receive_counts_UX: jax.Array

  def there(self, rows_MD: jax.Array) -> jax.Array:
    """From rows sorted by expert to those that arrive, device by device."""

  def back(self, rows: jax.Array) -> jax.Array:
    """From rows in the order of their arrival to rows_MD."""


class Plan(Protocol):
  """Plans trips."""

  def __call__(self, sizes_UN: jax.Array, sizes: ExchangeSizes) -> Trip:
    """A trip of `sizes_UN` rows for each local expert of every device."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockTrip:
  """One block of rows, of the same size, from every device to every other.

  Attributes:
    send_counts_UN, receive_counts_UX: as in `Trip`.
    source: int32, the row in each place of the blocks.
    target_M: int32, the place of each row; `len(source)` for none.
    axis: of the devices.
  """

  send_counts_UN: jax.Array
  receive_counts_UX: jax.Array
  source: jax.Array
  target_M: jax.Array
  axis: str = static()

  def there(self, rows_MD: jax.Array) -> jax.Array:
    """As in `Trip`."""
    sent = gather_rows(rows_MD, self.source, self.target_M)
    return lax.all_to_all(sent, self.axis, 0, 0, tiled=True)

  def back(self, rows: jax.Array) -> jax.Array:
    """As in `Trip`."""
    returned = lax.all_to_all(rows, self.axis, 0, 0, tiled=True)
    return gather_rows(returned, self.target_M, self.source)


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Plans trips by `all_to_all`, in blocks of bounded size.

  Attributes:
    axis: of the devices.
    factor: room of a block over its balanced share.
  """

  axis: str
  factor: float

  def __call__(self, sizes_UN: jax.Array, sizes: ExchangeSizes) -> BlockTrip:
    """As in `Plan`."""
    room = exchange_cost.block_rows(sizes, self.factor)
    num_rows, places = sizes.tokens * sizes.slots, sizes.devices * room
    send_counts_UN = fitting(sizes_UN, room)
    sizes_U, first_U = sizes_UN.sum(1), jnp.arange(sizes.devices) * room

    # A row is at its place in its block, if the block goes as far.
    row_M, block_M = segment_offsets(sizes_U, first_U, num_rows)
    nth_M = row_M - first_U[block_M]
    fits_M = (nth_M < room) & (jnp.arange(num_rows) < sizes_U.sum())
    nth, block = jnp.arange(places) % room, jnp.arange(places) // room
    used = nth < send_counts_UN.sum(1)[block]
    receive_counts_UN = lax.all_to_all(
      send_counts_UN, self.axis, 0, 0, tiled=True
    )
    return BlockTrip(
      send_counts_UN,
      with_rest(receive_counts_UN, room - receive_counts_UN.sum(1)),
      jnp.where(used, offsets(sizes_U)[block] + nth, num_rows),
      jnp.where(fits_M, row_M, places),
      self.axis,
    )


def regroup(
  receive_counts_UX: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
  """From rows sorted by device, then expert, to rows sorted by expert.

  Args:
    receive_counts_UX: of a trip.
    num_rows: their sum.

  Returns:
    order_M: the row that comes to each place, and place_M: the place of each
    row, both int32.
  """
  by_device, by_expert = (
    receive_counts_UX.reshape(-1),
    receive_counts_UX.T.reshape(-1),
  )
  row_UX = offsets(by_device).reshape(receive_counts_UX.shape)
  place_UX = offsets(by_expert).reshape(receive_counts_UX.T.shape).T
  order_M, _ = segment_offsets(by_expert, row_UX.T.reshape(-1), num_rows)
  place_M, _ = segment_offsets(by_device, place_UX.reshape(-1), num_rows)
  return order_M, place_M


def fitting(sizes: jax.Array, room: int) -> jax.Array:
  """How much of each part has room, the first parts first, on the last axis."""
  return jnp.clip(room - offsets(sizes), 0, sizes)


def with_rest(receive_counts_UN: jax.Array, rest_U: jax.Array) -> jax.Array:
  """Appends one more part, the rows before the next device's."""
  return jnp.concatenate([receive_counts_UN, rest_U[:, None]], axis=1)


@dataclasses.dataclass(frozen=True)
class QueuesToAll:
  """For queues of one length, the same for every expert.

  Attributes:
    bank: those that live here.
    axis: of the devices.
  """

  bank: Experts
  axis: str

  @property
  def num_experts(self) -> int:
    """Of all devices."""
    return self.bank.num_experts * lax.axis_size(self.axis)

  def batched(
    self, rows_NCD: jax.Array, seeds_NC: jax.Array | None
  ) -> jax.Array:
    """As in `Experts`, C rows from every device for each of the N experts."""
    # [N, C, ...] of this device <-> [N / U, U C, ...] of all.
    rows_NCD, seeds_NC = jax.tree.map(
      lambda a: lax.all_to_all(a, self.axis, 0, 1, tiled=True),
      (rows_NCD, seeds_NC),
    )
    out_NCD = self.bank.batched(rows_NCD, seeds_NC)
    return lax.all_to_all(out_NCD, self.axis, 1, 0, tiled=True)


@dataclasses.dataclass(frozen=True)
class RowsToAll:
  """For sorted rows, of which a trip takes as many as it has room for.

  Attributes:
    bank: those that live here.
    trip: for the rows that will be given.
  """

  bank: Experts
  trip: Trip

  def grouped(
    self, rows_MD: jax.Array, sizes_N: jax.Array, seeds_M: jax.Array | None
  ) -> jax.Array:
    """As in `Experts`; rows that find no room come back as zeros."""
    del sizes_N  # the trip knows
    trip, receive_counts_UX = self.trip, self.trip.receive_counts_UX
    arrived_MD = trip.there(rows_MD)
    order_M, place_M = regroup(receive_counts_UX, len(arrived_MD))
    if seeds_M is not None:
      seeds_M = trip.there(seeds_M[:, None])[order_M, 0]
    sorted_MD = gather_rows(arrived_MD, order_M, place_M)
    out_MD = self.bank.grouped(
      sorted_MD, receive_counts_UX[:, :-1].sum(0), seeds_M
    )
    return trip.back(gather_rows(out_MD, place_M, order_M))


_Function = Callable[[Any, Any], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def add_if_needed(
  usual: _Function, rare: _Function, needed: jax.Array, moving: Any, fixed: Any
) -> jax.Array:
  """`usual(moving, fixed)`, plus `rare(moving, fixed)` where it is needed.

  The usual part lies outside of the condition, so that the compiler may overlap
  its collectives with other work. What backward needs of the rare part it
  computes again: as branches of one `lax.cond`, differentiated by JAX, both
  would write what both keep, in every step. Where the rare part is not needed,
  result and gradients go through the condition as they are.

  Args:
    usual: returns an array.
    rare: returns another one like it.
    needed: bool, the same on all devices if `rare` has collectives.
    moving: a tree of floating-point arrays, which get gradients.
    fixed: a tree of arrays, which get none.
  """
  return _plus(rare, usual(moving, fixed), needed, moving, fixed)


def _plus(
  rare: _Function, y: jax.Array, needed: jax.Array, moving: Any, fixed: Any
) -> jax.Array:
  return lax.cond(needed, lambda y: y + rare(moving, fixed), lambda y: y, y)


def _forward(
  usual: _Function, rare: _Function, needed: jax.Array, moving: Any, fixed: Any
) -> tuple[jax.Array, Any]:
  y, backward = jax.vjp(lambda moving: usual(moving, fixed), moving)
  y = _plus(rare, y, needed, moving, fixed)
  return y, (backward, needed, moving, fixed)


def _backward(
  usual: _Function, rare: _Function, residuals: Any, grad: jax.Array
) -> tuple[None, Any, None]:
  del usual
  backward, needed, moving, fixed = residuals
  [grads] = backward(grad)

  def plus(grads: Any) -> Any:
    _, backward = jax.vjp(lambda moving: rare(moving, fixed), moving)
    return jax.tree.map(jnp.add, grads, backward(grad)[0])

  return None, lax.cond(needed, plus, lambda grads: grads, grads), None


add_if_needed.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class AllGather:
  """All devices' tokens go to all devices; the results are summed on the way.

  Attributes:
    inner: dispatches all those tokens to the experts of one device.
    axis: of the devices.
  """

  inner: Dispatch
  axis: str

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Experts
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
class SequentialAllGather:
  """As `AllGather`, but one device's tokens are computed after the other's.

  Slower, with smaller matmuls; but what it works with is no more than one
  device's slots, and nothing of it is kept.

  Attributes:
    inner: dispatches one device's tokens to the experts of another.
    axis: of the devices.
  """

  inner: Dispatch
  axis: str

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Experts
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
class CapacityAllToAll:
  """Slots stand in queues of one length, C for every expert on every device.

  Attributes:
    inner: a dispatch that uses `Experts.batched`; it sees the tokens of one
      device and the experts of all.
    axis: of the devices.
  """

  inner: Dispatch
  axis: str

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Experts
  ) -> Dispatched:
    return self.inner(x_TD, routing, QueuesToAll(experts, self.axis))


@dataclasses.dataclass(frozen=True)
class BufferedAllToAll:
  """Dropless through bounded buffers; slots that do not fit take the slow way.

  That way is exact too: see `SequentialAllGather`.

  Attributes:
    plan: of the trips.
    axis: of the devices.
    all_axes: of the whole mesh: all its devices go the slow way or none.
  """

  plan: Plan
  axis: str
  all_axes: tuple[str, ...]

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: LocalExperts
  ) -> Dispatched:
    order = sort(routing, routing.num_experts)
    devices = lax.axis_size(self.axis)
    shape = routing.indices_TK.shape
    trip = self.plan(
      order.sizes_N.reshape(devices, -1),
      ExchangeSizes(*shape, routing.num_experts, devices),
    )
    overflowed = order.sizes_N.sum() - trip.send_counts_UN.sum()
    y_TD = add_if_needed(
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
    stays_TK = nth_TK >= trip.send_counts_UN.reshape(-1)[expert_TK]
    routing = dataclasses.replace(routing, weights_TK=weights_TK)
    slow = SequentialAllGather(dropless, self.axis)
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

  def here(self, routing: Routing, experts: Experts, axis: str) -> Routing:
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
