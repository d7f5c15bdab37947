"""Trips of sorted rows to the devices of their experts, and back.

All of it runs inside `shard_map`, on the U devices along one axis. A trip takes
of every expert's rows as many as find room in its buffers; the others stay, and
come back as zeros.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.experts import exchange_size
from moe_jax.experts.exchange_size import Exchanged
from moe_jax.experts.rows import follow, move_rows, starts


class Trip(Protocol):
  """A trip that is planned: who sends how many rows to whom.

  Attributes:
    kept_UN: int32, of the rows for every local expert of every device the first
      so many travel.
    arriving_UX: int32, the rows that arrive: from every device one part for
      each local expert, then what lies before the next device's.
  """

  kept_UN: jax.Array
  arriving_UX: jax.Array

  def there(self, rows_MD: jax.Array) -> jax.Array:
    """From rows sorted by expert to those that arrive, device by device."""

  def back(self, rows: jax.Array) -> jax.Array:
    """From rows in the order of their arrival to rows_MD."""


class Plan(Protocol):
  """Plans trips."""

  def __call__(self, sizes_UN: jax.Array, sizes: Exchanged) -> Trip:
    """A trip of `sizes_UN` rows for each local expert of every device."""


def static(**options: Any) -> Any:
  """A field of a registered dataclass that is no array."""
  return dataclasses.field(metadata={'static': True}, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockTrip:
  """One block of rows, of the same size, from every device to every other.

  Attributes:
    kept_UN, arriving_UX: as in `Trip`.
    source: int32, the row in each place of the blocks.
    target_M: int32, the place of each row; `len(source)` for none.
    axis: of the devices.
  """

  kept_UN: jax.Array
  arriving_UX: jax.Array
  source: jax.Array
  target_M: jax.Array
  axis: str = static()

  def there(self, rows_MD: jax.Array) -> jax.Array:
    """As in `Trip`."""
    sent = move_rows(rows_MD, self.source, self.target_M)
    return lax.all_to_all(sent, self.axis, 0, 0, tiled=True)

  def back(self, rows: jax.Array) -> jax.Array:
    """As in `Trip`."""
    returned = lax.all_to_all(rows, self.axis, 0, 0, tiled=True)
    return move_rows(returned, self.target_M, self.source)


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Plans trips by `all_to_all`, in blocks of bounded size.

  Attributes:
    axis: of the devices.
    factor: room of a block over its balanced share.
  """

  axis: str
  factor: float

  def __call__(self, sizes_UN: jax.Array, sizes: Exchanged) -> BlockTrip:
    """As in `Plan`."""
    room = exchange_size.block_rows(sizes, self.factor)
    num_rows, places = sizes.tokens * sizes.slots, sizes.devices * room
    kept_UN = fitting(sizes_UN, room)
    sizes_U, first_U = sizes_UN.sum(1), jnp.arange(sizes.devices) * room

    # A row is at its place in its block, if the block goes as far.
    row_M, block_M = follow(sizes_U, first_U, num_rows)
    nth_M = row_M - first_U[block_M]
    fits_M = (nth_M < room) & (jnp.arange(num_rows) < sizes_U.sum())
    nth, block = jnp.arange(places) % room, jnp.arange(places) // room
    used = nth < kept_UN.sum(1)[block]
    arriving_UN = lax.all_to_all(kept_UN, self.axis, 0, 0, tiled=True)
    return BlockTrip(
      kept_UN,
      with_rest(arriving_UN, room - arriving_UN.sum(1)),
      jnp.where(used, starts(sizes_U)[block] + nth, num_rows),
      jnp.where(fits_M, row_M, places),
      self.axis,
    )


def regroup(
  arriving_UX: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
  """From rows sorted by device, then expert, to rows sorted by expert.

  Args:
    arriving_UX: of a trip.
    num_rows: their sum.

  Returns:
    order_M: the row that comes to each place, and place_M: the place of each
    row, both int32.
  """
  by_device, by_expert = arriving_UX.reshape(-1), arriving_UX.T.reshape(-1)
  row_UX = starts(by_device).reshape(arriving_UX.shape)
  place_UX = starts(by_expert).reshape(arriving_UX.T.shape).T
  order_M, _ = follow(by_expert, row_UX.T.reshape(-1), num_rows)
  place_M, _ = follow(by_device, place_UX.reshape(-1), num_rows)
  return order_M, place_M


def fitting(sizes: jax.Array, room: int) -> jax.Array:
  """How much of each part has room, the first parts first, on the last axis."""
  return jnp.clip(room - starts(sizes), 0, sizes)


def with_rest(arriving_UN: jax.Array, rest_U: jax.Array) -> jax.Array:
  """`arriving_UX`: one more part for the rows before the next device's."""
  return jnp.concatenate([arriving_UN, rest_U[:, None]], axis=1)
