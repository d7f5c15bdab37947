"""Rows on their way to the experts of other devices, and back.

All of it runs inside `shard_map`, on the U devices along one mesh axis. Rows
are assignments sorted by expert; see `moe_jax.experts.dispatch`.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.experts.dispatch import Experts
from moe_jax.experts.exchange_cost import Room
from moe_jax.experts.expert_parallel import static
from moe_jax.experts.permute import (
  fitting,
  fitting_on_arrival,
  gather_rows,
  offsets,
  regroup,
  segment_offsets,
  weighed,
)


class Exchange(Protocol):
  """Takes rows to the devices of their experts, and their outputs back.

  An exchange is planned for one routing: it knows how many rows go where. Of
  every expert's rows it takes as many as find room in its buffers; the others
  stay, and come back as zeros.

  Attributes:
    send_counts_UN: int32, the number of rows sent to each local expert of each
      device: the first so many of those for it.
    receive_counts_UX: int32, the number of rows that arrive: from each device
      one count for each local expert, then one for the unused rows before the
      next device's.
    num_computed: The rows that have room where they are computed; those that
      arrive are as many or fewer.
  """

  @property
  def num_computed(self) -> int: ...

  @property
  def send_counts_UN(self) -> jax.Array: ...

  @property
  def receive_counts_UX(self) -> jax.Array: ...

  def dispatch(self, rows_MD: jax.Array) -> jax.Array:
    """Sends rows sorted by expert; returns those that arrive, by device."""

  def combine(self, rows: jax.Array) -> jax.Array:
    """Sends rows in the order of their arrival back to be rows_MD."""


# (sizes_UN, num_rows, room, axis) -> Exchange: plans an exchange of num_rows
# rows, of which sizes_UN are for each local expert of each device, into buffers
# with so much room.
Plan = Callable[[jax.Array, int, Room, str], Exchange]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockExchange:
  """An `all_to_all` of one block of rows from every device to every other.

  Attributes:
    send_counts_UN: As in `Exchange`.
    receive_counts_UX: As in `Exchange`.
    source: int32, the row in each place of the blocks.
    target_M: int32, the place of each row; `len(source)` for none.
    num_computed: As in `Exchange`.
    axis: The mesh axis of the devices.
  """

  send_counts_UN: jax.Array
  receive_counts_UX: jax.Array
  source: jax.Array
  target_M: jax.Array
  num_computed: int = static()
  axis: str = static()

  @classmethod
  def plan(
    cls, sizes_UN: jax.Array, num_rows: int, room: Room, axis: str
  ) -> 'BlockExchange':
    """Plans an exchange in blocks; see `Plan`."""
    here, devices = lax.axis_index(axis), len(sizes_UN)
    places = devices * room.block
    # [from, to, expert]: what has room in its block, and then among all rows.
    sizes_UUN = fitting(lax.all_gather(sizes_UN, axis), room.block)
    counts_UUN = fitting_on_arrival(sizes_UUN, room.rows)
    send_counts_UN, counts_UN = counts_UUN[here], counts_UUN[:, here]
    sizes_U, first_U = sizes_UN.sum(1), jnp.arange(devices) * room.block
    sent_U = send_counts_UN.sum(1)

    # A row is at its place in its block, if so many are sent.
    row_M, block_M = segment_offsets(sizes_U, first_U, num_rows)
    fits_M = row_M - first_U[block_M] < sent_U[block_M]
    nth, block = (
      jnp.arange(places) % room.block,
      jnp.arange(places) // room.block,
    )
    unused_U = room.block - counts_UN.sum(1)
    return cls(
      send_counts_UN,
      jnp.concatenate([counts_UN, unused_U[:, None]], axis=1),
      jnp.where(nth < sent_U[block], offsets(sizes_U)[block] + nth, num_rows),
      jnp.where(fits_M, row_M, places),
      room.rows,
      axis,
    )

  def dispatch(self, rows_MD: jax.Array) -> jax.Array:
    """Sends rows to their experts' devices; see `Exchange`."""
    sent = gather_rows(rows_MD, self.source, self.target_M)
    return lax.all_to_all(sent, self.axis, 0, 0, tiled=True)

  def combine(self, rows: jax.Array) -> jax.Array:
    """Sends rows back to where they came from; see `Exchange`."""
    returned = lax.all_to_all(rows, self.axis, 0, 0, tiled=True)
    return gather_rows(returned, self.target_M, self.source)


@dataclasses.dataclass(frozen=True)
class RemoteExperts:
  """The N experts of all devices along an axis, as one device calls them.

  Attributes:
    local: The N / U experts that live here.
    axis: The mesh axis of the devices.
    exchange: The exchange planned for the rows that `grouped` will be given;
      None plans one that has room for all of them.
  """

  local: Experts
  axis: str
  exchange: Exchange | None = None

  @property
  def num_experts(self) -> int:
    """N, the number of experts of all devices."""
    return self.local.num_experts * lax.axis_size(self.axis)

  def grouped(
    self,
    rows_MD: jax.Array,
    sizes_N: jax.Array,
    seeds_M: jax.Array | None,
    weights_M: jax.Array | None = None,
  ) -> jax.Array:
    """Computes sorted rows; those without room come back as zeros."""
    exchange = self.exchange or self._exchange_all(sizes_N, len(rows_MD))
    arrived_MD = exchange.dispatch(rows_MD)
    counts_UX = exchange.receive_counts_UX
    source_M, target_M = regroup(counts_UX, len(arrived_MD))
    # The rows of experts are the first; behind them are places without any.
    source_M = source_M[: exchange.num_computed]
    if seeds_M is not None:
      seeds_M = exchange.dispatch(seeds_M[:, None])[source_M, 0]
    sorted_MD = gather_rows(arrived_MD, source_M, target_M)
    out_MD = self.local.grouped(sorted_MD, counts_UX[:, :-1].sum(0), seeds_M)
    out_MD = exchange.combine(gather_rows(out_MD, target_M, source_M))
    return weighed(out_MD, weights_M)  # which stayed here

  def batched(
    self, rows_NCD: jax.Array, seeds_NC: jax.Array | None
  ) -> jax.Array:
    """Computes C rows of every device for each of the N experts."""
    # [N, C, ...] of this device <-> [N / U, U C, ...] of all.
    rows_NCD, seeds_NC = jax.tree.map(
      lambda a: lax.all_to_all(a, self.axis, 0, 1, tiled=True),
      (rows_NCD, seeds_NC),
    )
    out_NCD = self.local.batched(rows_NCD, seeds_NC)
    return lax.all_to_all(out_NCD, self.axis, 1, 0, tiled=True)

  def unshard(self, dtype: jnp.dtype) -> 'RemoteExperts':
    """Returns the same with the parameters of each device gathered once."""
    return dataclasses.replace(self, local=self.local.unshard(dtype))

  def _exchange_all(self, sizes_N: jax.Array, num_rows: int) -> Exchange:
    sizes_UN = sizes_N.reshape(lax.axis_size(self.axis), -1)
    room = Room(num_rows * len(sizes_UN), num_rows)
    return BlockExchange.plan(sizes_UN, num_rows, room, self.axis)
