"""How tokens meet experts that live on other devices.

U devices along one mesh axis share the experts. Inside `shard_map` a dispatch
across them is given the tokens of one device, their routing to all N experts,
and the N / U experts that live here. What it returns may be a partial sum,
where a device has part of its experts' widths.

- `AllGather` takes the tokens of all devices to every expert.
- `CapacityAllToAll` runs a dispatch of one device as if all experts lived here;
  the rows of each expert go to its device and back.
- `BufferedAllToAll` sends sorted rows by an `Exchange` through buffers of
  bounded size. Assignments that find no room there take the way of
  `SequentialAllGather`, which is exact for any routing and needs the buffers of
  one device at a time.

`EXCHANGES` names these for `moe.exchange`. A user's own is registered with its
cost, by which 'auto' weighs it:

  EXCHANGES.register('mine')(ExchangeMethod(make=..., num_bytes=...))
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

from moe_jax.experts import exchange_cost
from moe_jax.experts.dispatch import (
  Dispatch,
  Dispatched,
  Experts,
  compute_sorted,
  dropless,
  place_in_expert,
  sort,
)
from moe_jax.experts.exchange_cost import ExchangeSizes, Room
from moe_jax.experts.expert_parallel import Layout
from moe_jax.experts.ragged_exchange import RaggedExchange
from moe_jax.experts.remat import add_if_needed
from moe_jax.experts.row_exchange import BlockExchange, Plan, RemoteExperts
from moe_jax.parallel.devices import limited_routing
from moe_jax.registry import EXCHANGES
from moe_jax.routing.selection import Routing


@dataclasses.dataclass(frozen=True)
class AllGather:
  """All devices' tokens go to all devices; the outputs are summed on the way.

  Attributes:
    inner: Dispatches all those tokens to the experts of one device.
    axis: The mesh axis of the devices.
  """

  inner: Dispatch
  axis: str

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Experts
  ) -> Dispatched:
    x_TD, assignments = jax.tree.map(
      self.dispatch, (x_TD, _Assignments.of(routing))
    )
    local = assignments.local(routing, experts, self.axis)
    done = self.inner(x_TD, local, experts)
    return done._replace(y_TD=self.combine(done.y_TD))

  def dispatch(self, x_TD: jax.Array) -> jax.Array:
    """Returns what all devices have of an array, device by device."""
    return lax.all_gather(x_TD, self.axis, tiled=True)

  def combine(self, y_TD: jax.Array) -> jax.Array:
    """Returns the sum over devices, of this device's own tokens."""
    return lax.psum_scatter(y_TD, self.axis, scatter_dimension=0, tiled=True)


@dataclasses.dataclass(frozen=True)
class SequentialAllGather:
  """As `AllGather`, but one device's tokens are computed after the other's.

  It is slower, with smaller matmuls; but what it works with is no more than
  one device's assignments, and nothing of it is kept.

  Attributes:
    inner: Dispatches one device's tokens to the experts of another.
    axis: The mesh axis of the devices.
  """

  inner: Dispatch
  axis: str

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Experts
  ) -> Dispatched:
    @jax.checkpoint
    def of_one_device(sent: tuple[jax.Array, _Assignments]) -> Dispatched:
      x_TD, assignments = sent
      local = assignments.local(routing, experts, self.axis)
      return self.inner(x_TD, local, experts)

    sent = x_TD, _Assignments.of(routing)
    done = lax.map(
      of_one_device, jax.tree.map(lambda a: lax.all_gather(a, self.axis), sent)
    )
    y_TD = lax.psum_scatter(done.y_TD, self.axis, scatter_dimension=0)
    counts = jax.tree.map(lambda count: count.sum(0), done[1:])
    return Dispatched(y_TD, *counts)


@dataclasses.dataclass(frozen=True)
class CapacityAllToAll:
  """Runs a dispatch of one device on its own tokens and all devices' experts.

  For a dispatch that calls `Experts.batched`, as `Capacity` does: from every
  device C rows travel to every expert. Of one that calls `Experts.grouped`
  every device sends every other a block with room for all its rows.

  Attributes:
    inner: Dispatches the tokens of one device to the experts of all.
    axis: The mesh axis of the devices.
  """

  inner: Dispatch
  axis: str

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Experts
  ) -> Dispatched:
    return self.inner(x_TD, routing, RemoteExperts(experts, self.axis))


@dataclasses.dataclass(frozen=True)
class BufferedAllToAll:
  """Dropless through bounded buffers, with an exact fallback on overflow.

  Attributes:
    plan: Plans the exchange.
    room: Returns how many rows its buffers hold.
    axis: The mesh axis of the devices that share the experts.
    all_axes: The axes of the whole mesh: all its devices take the fallback or
      none.
  """

  plan: Plan
  room: Callable[[ExchangeSizes], Room]
  axis: str
  all_axes: tuple[str, ...]

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Experts
  ) -> Dispatched:
    order = sort(routing, routing.num_experts)
    devices = lax.axis_size(self.axis)
    tokens, top_k = routing.indices_TK.shape
    sizes = ExchangeSizes(tokens, top_k, routing.num_experts, devices)
    exchange = self.plan(
      order.sizes_N.reshape(devices, -1),
      routing.indices_TK.size,
      self.room(sizes),
      self.axis,
    )
    overflowed = order.sizes_N.sum() - exchange.send_counts_UN.sum()
    y_TD = add_if_needed(
      self._through_buffers,
      self._overflow,
      lax.pmax(overflowed, self.all_axes) > 0,
      (x_TD, routing.weights_TK, experts),
      (routing, order, exchange),
    )
    return Dispatched(y_TD, jnp.zeros_like(overflowed), overflowed)

  def _through_buffers(self, moving: Any, fixed: Any) -> jax.Array:
    """Computes the assignments that have room; the others count 0."""
    x_TD, weights_TK, experts = moving
    routing, order, exchange = fixed
    routing = dataclasses.replace(routing, weights_TK=weights_TK)
    remote = RemoteExperts(experts, self.axis, exchange)
    return compute_sorted(order, x_TD, routing, remote)

  def _overflow(self, moving: Any, fixed: Any) -> jax.Array:
    """Computes the assignments that have no room."""
    x_TD, weights_TK, experts = moving
    routing, order, exchange = fixed
    expert_TK, nth_TK = place_in_expert(order, routing)
    stays_TK = nth_TK >= exchange.send_counts_UN.reshape(-1)[expert_TK]
    routing = dataclasses.replace(routing, weights_TK=weights_TK)
    fallback = SequentialAllGather(dropless, self.axis)
    # Unsharded before the loop over devices, not in each of its turns.
    unsharded = experts.unshard(x_TD.dtype)
    return fallback(x_TD, routing.only(stays_TK), unsharded).y_TD


class _Assignments(NamedTuple):
  """What of a routing travels with the tokens; see `Routing`."""

  weights_TK: jax.Array
  indices_TK: jax.Array
  seeds_TK: jax.Array | None

  @classmethod
  def of(cls, routing: Routing) -> '_Assignments':
    return cls(routing.weights_TK, routing.indices_TK, routing.seeds_TK)

  def local(self, routing: Routing, experts: Experts, axis: str) -> Routing:
    """Counts experts from this device's first; those of others are unused."""
    first = lax.axis_index(axis) * experts.num_experts
    local_TK = self.indices_TK - first
    here_TK = (local_TK >= 0) & (local_TK < experts.num_experts)
    return dataclasses.replace(
      routing,
      weights_TK=jnp.where(here_TK, self.weights_TK, 0.0),
      indices_TK=jnp.where(here_TK, local_TK, experts.num_experts),
      seeds_TK=self.seeds_TK,
    )


class ExchangeMethod(NamedTuple):
  """What a value of `moe.exchange` means.

  Attributes:
    make: (moe, inner, layout) -> Dispatch: makes the dispatch across devices,
      for use inside `shard_map`, from the config's section `moe`, the dispatch
      of one device and the mesh axes.
    num_bytes: (moe, sizes, row_bytes) -> bytes: the bytes that one device sends
      in the forward pass of one MoE sub-layer, with row_bytes those of a hidden
      state. Where rows travel on their own, experts count as balanced.
    dispatches: The values of `moe.dispatch` that it works with; None for all.
    obstacle: (device, count) -> str | None: why it does not compile for so many
      of these devices.
    auto_platforms: The platforms where 'auto' may choose it; None for all.
  """

  make: Callable[[ConfigDict, Dispatch, Layout], Dispatch]
  num_bytes: Callable[[ConfigDict, ExchangeSizes, int], float]
  dispatches: tuple[str, ...] | None = None
  obstacle: Callable[[jax.Device, int], str | None] = lambda device, count: None
  auto_platforms: tuple[str, ...] | None = None

  def suits(self, device: jax.Device, count: int) -> bool:
    """Returns whether 'auto' may choose it for so many of these devices."""
    platforms = self.auto_platforms
    usual = platforms is None or device.platform in platforms
    return usual and self.obstacle(device, count) is None


def exchanges_for(dispatch: str) -> tuple[str, ...]:
  """Returns the exchanges that work with a value of `moe.dispatch`."""
  return tuple(
    name
    for name in EXCHANGES
    if EXCHANGES[name].dispatches is None
    or dispatch in EXCHANGES[name].dispatches
  )


def _all_to_all(moe: ConfigDict, inner: Dispatch, layout: Layout) -> Dispatch:
  axis, factor = layout.expert_axis, moe.buffer_factor
  if moe.dispatch != 'dropless':
    return CapacityAllToAll(inner, axis)
  room = functools.partial(exchange_cost.blocks, factor=factor)
  return BufferedAllToAll(BlockExchange.plan, room, axis, layout.all_axes)


def _all_to_all_bytes(
  moe: ConfigDict, sizes: ExchangeSizes, row_bytes: int
) -> float:
  if moe.dispatch == 'capacity':
    factor = moe.capacity_factor
    return exchange_cost.capacity_bytes(sizes, row_bytes, factor)
  # Of a user's own dispatch the most that it can send.
  exact = moe.dispatch != 'dropless'
  factor = sizes.devices if exact else moe.buffer_factor
  return exchange_cost.block_bytes(sizes, row_bytes, factor)


def _ragged(moe: ConfigDict, inner: Dispatch, layout: Layout) -> Dispatch:
  del inner
  axis, factor = layout.expert_axis, moe.buffer_factor
  room = functools.partial(exchange_cost.buffer, factor=factor)
  return BufferedAllToAll(RaggedExchange.plan, room, axis, layout.all_axes)


def _ragged_obstacle(device: jax.Device, count: int) -> str | None:
  if limited_routing(device, count):
    return f'does not compile for {count} x {device.device_kind}'
  return None


EXCHANGES.register('gather')(
  ExchangeMethod(
    make=lambda moe, inner, layout: AllGather(inner, layout.expert_axis),
    num_bytes=lambda moe, sizes, row_bytes: exchange_cost.all_gather_bytes(
      sizes, row_bytes
    ),
  )
)
EXCHANGES.register('all_to_all')(
  ExchangeMethod(make=_all_to_all, num_bytes=_all_to_all_bytes)
)
EXCHANGES.register('ragged')(
  ExchangeMethod(
    make=_ragged,
    num_bytes=lambda moe, sizes, row_bytes: exchange_cost.ragged_bytes(
      sizes, row_bytes
    ),
    dispatches=('dropless',),
    obstacle=_ragged_obstacle,
    # XLA has no `ragged_all_to_all` on CPU, and a slow one on GPUs.
    auto_platforms=('tpu',),
  )
)
