"""The experts of all devices, as a bank that a dispatch of one device may use.

Each is the half of `moe_jax.experts.dispatch.Bank` that its dispatch uses; the
rows, in whatever form, go to the devices of their experts and come back. They
exist inside `shard_map`.
"""

import dataclasses

import jax
from jax import lax

from moe_jax.experts.dispatch import Bank
from moe_jax.experts.rows import move_rows
from moe_jax.experts.trip import Trip, regroup


@dataclasses.dataclass(frozen=True)
class QueuesToAll:
  """For queues of one length, the same for every expert.

  Attributes:
    bank: those that live here.
    axis: of the devices.
  """

  bank: Bank
  axis: str

  @property
  def num_experts(self) -> int:
    """Of all devices."""
    return self.bank.num_experts * lax.axis_size(self.axis)

  def batched(
    self, rows_NCD: jax.Array, seeds_NC: jax.Array | None
  ) -> jax.Array:
    """As in `Bank`, C rows from every device for each of the N experts."""
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

  bank: Bank
  trip: Trip

  def grouped(
    self, rows_MD: jax.Array, sizes_N: jax.Array, seeds_M: jax.Array | None
  ) -> jax.Array:
    """As in `Bank`; rows that find no room come back as zeros."""
    del sizes_N  # the trip knows
    trip, arriving_UX = self.trip, self.trip.arriving_UX
    arrived_MD = trip.there(rows_MD)
    order_M, place_M = regroup(arriving_UX, len(arrived_MD))
    if seeds_M is not None:
      seeds_M = trip.there(seeds_M[:, None])[order_M, 0]
    sorted_MD = move_rows(arrived_MD, order_M, place_M)
    out_MD = self.bank.grouped(sorted_MD, arriving_UX[:, :-1].sum(0), seeds_M)
    return trip.back(move_rows(out_MD, place_M, order_M))
