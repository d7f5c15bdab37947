"""An exchange on which the used rows alone travel, by `ragged_all_to_all`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.experts.exchange_cost import Room
from moe_jax.experts.expert_parallel import static
from moe_jax.experts.permute import fitting_on_arrival, offsets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Offsets:
  """Arguments of `lax.ragged_all_to_all`, all int32 [U].

  Attributes:
    input_U: The rows at which those for each device begin.
    send_U: Their number.
    output_U: The places at which they begin over there.
    receive_U: The number of rows that each device sends here.
  """

  input_U: jax.Array
  send_U: jax.Array
  output_U: jax.Array
  receive_U: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedExchange:
  """A `ragged_all_to_all` of the used rows, into a buffer of bounded size.

  Attributes:
    send_counts_UN: As in `moe_jax.experts.row_exchange.Exchange`.
    receive_counts_UX: As there.
    outward: The way from the rows to the buffer.
    homeward: The way from the buffer to the rows.
    num_rows: M, the number of rows.
    num_computed: As in `Exchange`: the number of rows of the buffer.
    axis: The mesh axis of the devices.
  """

  send_counts_UN: jax.Array
  receive_counts_UX: jax.Array
  outward: Offsets
  homeward: Offsets
  num_rows: int = static()
  num_computed: int = static()
  axis: str = static()

  @classmethod
  def plan(
    cls, sizes_UN: jax.Array, num_rows: int, room: Room, axis: str
  ) -> 'RaggedExchange':
    """Plans an exchange into buffers of `room.rows` rows.

    Args:
      sizes_UN: int32, the rows for each local expert of each device.
      num_rows: M, the number of rows, unused ones among them.
      room: How many rows a device can receive.
      axis: The mesh axis of the devices.
    """
    here, devices = lax.axis_index(axis), len(sizes_UN)
    # [from, to, expert]: every device knows all, and so all offsets.
    sizes_UUN = lax.all_gather(sizes_UN, axis)
    counts_UUN = fitting_on_arrival(sizes_UUN, room.rows)
    counts_UU = counts_UUN.sum(2)
    row_UU = offsets(sizes_UUN.sum(2))
    place_UU = offsets(counts_UU.T).T
    outward = Offsets(
      row_UU[here], counts_UU[here], place_UU[here], counts_UU[:, here]
    )
    homeward = Offsets(
      place_UU[:, here], counts_UU[:, here], row_UU[:, here], counts_UU[here]
    )
    receive_counts_UN = counts_UUN[:, here]
    last_U = jnp.arange(devices) == devices - 1
    unused_U = jnp.where(last_U, room.rows - receive_counts_UN.sum(), 0)
    return cls(
      counts_UUN[here],
      jnp.concatenate([receive_counts_UN, unused_U[:, None]], axis=1),
      outward,
      homeward,
      num_rows,
      room.rows,
      axis,
    )

  def dispatch(self, rows_MD: jax.Array) -> jax.Array:
    """Sends rows to their experts' devices; returns the buffer."""
    return _ragged(
      self.axis,
      self.num_computed,
      self.num_rows,
      rows_MD,
      self.outward,
      self.homeward,
    )

  def combine(self, rows: jax.Array) -> jax.Array:
    """Sends the buffer's rows back to where they came from."""
    return _ragged(
      self.axis,
      self.num_rows,
      self.num_computed,
      rows,
      self.homeward,
      self.outward,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ragged(
  axis: str,
  num_out: int,
  num_in: int,
  rows: jax.Array,
  outward: Offsets,
  homeward: Offsets,
) -> jax.Array:
  """Exchanges rows; what nobody sends stays 0. The gradient goes back.

  JAX would derive as much, with two more exchanges of offsets.
  """
  del num_in, homeward
  empty = jnp.zeros_like(rows, shape=(num_out, *rows.shape[1:]))
  exchange = functools.partial(lax.platform_dependent, rows, empty, outward)
  # XLA has no such collective on CPU.
  return exchange(
    cpu=functools.partial(_emulated, axis),
    default=functools.partial(_native, axis),
  )


def _ragged_forward(
  axis: str,
  num_out: int,
  num_in: int,
  rows: jax.Array,
  outward: Offsets,
  homeward: Offsets,
) -> tuple[jax.Array, tuple[Offsets, Offsets]]:
  out = _ragged(axis, num_out, num_in, rows, outward, homeward)
  return out, (outward, homeward)


def _ragged_backward(
  axis: str,
  num_out: int,
  num_in: int,
  offsets: tuple[Offsets, Offsets],
  grad: jax.Array,
) -> tuple[jax.Array, None, None]:
  outward, homeward = offsets
  return _ragged(axis, num_in, num_out, grad, homeward, outward), None, None


_ragged.defvjp(_ragged_forward, _ragged_backward)


def _native(
  axis: str, rows: jax.Array, empty: jax.Array, offsets: Offsets
) -> jax.Array:
  return lax.ragged_all_to_all(
    rows,
    empty,
    offsets.input_U,
    offsets.send_U,
    offsets.output_U,
    offsets.receive_U,
    axis_name=axis,
  )


def _emulated(
  axis: str, rows: jax.Array, empty: jax.Array, offsets: Offsets
) -> jax.Array:
  """Does the same by gathering everything, the others' offsets too."""
  here = lax.axis_index(axis)
  rows_UM, all_offsets = jax.tree.map(
    lambda a: lax.all_gather(a, axis), (rows, offsets)
  )
  first_U, send_U = all_offsets.output_U[:, here], all_offsets.send_U[:, here]
  place = jnp.arange(len(empty))[:, None]
  sent = (place >= first_U) & (place < first_U + send_U)
  device = jnp.argmax(sent, axis=1)
  row = all_offsets.input_U[device, here] + place[:, 0] - first_U[device]
  # Past the end: nobody sent it.
  row = jnp.where(sent.any(1), row, len(rows))
  return rows_UM.at[device, row].get(mode='fill', fill_value=0)
