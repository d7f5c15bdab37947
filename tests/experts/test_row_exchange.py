"""Exchanges of rows: what arrives, what comes back, and JAX's offsets."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moe_jax.experts.exchange_cost import Room
from moe_jax.experts.permute import regroup
from moe_jax.experts.ragged_exchange import Offsets, RaggedExchange
from moe_jax.experts.row_exchange import BlockExchange

# Devices, tokens and assignments of each, experts: two on every device.
U, T, K, N = 4, 6, 2, 8
FACTOR = 0.75
ROOM = 9  # 0.75 * 6 * 2
BLOCK = 3  # 0.75 * 6 * 2 / 4, rounded up
COMPUTED = 10  # less than four blocks


@functools.cache
def travelled() -> dict[str, Any]:
  """Of two kinds of trips: offsets, and rows there and back, by device."""
  mesh = jax.make_mesh(
    (U,), ('expert',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:U]
  )

  def local(sizes_1UN: jax.Array, rows_MD: jax.Array) -> Any:
    found = {}
    for name, plan, room in (
      ('blocks', BlockExchange.plan, Room(COMPUTED, BLOCK)),
      ('ragged', RaggedExchange.plan, Room(ROOM, ROOM)),
    ):
      exchange = plan(sizes_1UN[0], T * K, room, 'expert')
      there = exchange.dispatch(rows_MD)
      order, place = regroup(exchange.receive_counts_UX, len(there))
      found[name] = {
        'exchange': exchange,
        'there': there,
        'sorted': there[order],
        'unsorted': there[order][place],
        'back': exchange.combine(there),
      }
    return jax.tree.map(lambda a: a[None], found)

  along = P('expert')
  run = jax.shard_map(
    local, mesh=mesh, in_specs=(along, along), out_specs=along, check_vma=True
  )
  found = jax.jit(run)(jnp.int32(sizes()), rows().reshape(U * T * K, 1))
  return jax.tree.map(np.asarray, found)


def sizes() -> np.ndarray:
  """[from, to, expert], some rows unused; everybody likes device 2."""
  rng = np.random.default_rng(3)
  wanted = np.array([0.5, 1, 3, 1, 8, 3, 0.5, 1])
  counts = rng.multinomial(T * K - 1, wanted / wanted.sum(), U)
  return counts.reshape(U, U, N // U)


def rows() -> np.ndarray:
  """Every row says which it is: 1000 * device + place."""
  return 1000.0 * np.arange(U)[:, None] + np.arange(T * K) + 0.5


def segment(device: int, to: int) -> np.ndarray:
  """The rows for a device, in their order."""
  ends = np.cumsum(sizes()[device].sum(1))
  return rows()[device, ends[to] - sizes()[device, to].sum() : ends[to]]


def exchanged(
  operand: np.ndarray, offsets: Offsets, num_rows: int
) -> np.ndarray:
  """`jax.lax.ragged_all_to_all` as its documentation has it, onto zeros."""
  result = np.zeros((U, num_rows))
  np.testing.assert_array_equal(offsets.send_U, offsets.receive_U.T)
  for device in range(U):
    for to in range(U):
      first, count = offsets.input_U[device, to], offsets.send_U[device, to]
      at = offsets.output_U[device, to]
      sent = operand[device, first : first + count]
      assert len(sent) == count and at + count <= num_rows
      result[to, at : at + count] = sent
  return result


def test_ragged_trips_fill_buffers_device_by_device() -> None:
  ragged = travelled()['ragged']
  for to in range(U):
    arriving = np.concatenate([segment(device, to) for device in range(U)])
    expected = np.zeros(ROOM)
    expected[: len(arriving)] = arriving[:ROOM]
    np.testing.assert_array_equal(ragged['there'][to, :, 0], expected)
  assert ragged['there'][2].all()  # full, and more was to come
  assert sizes()[:, 2].sum() > ROOM


def test_ragged_offsets_mean_the_same_to_the_collective() -> None:
  ragged = travelled()['ragged']
  exchange, there = ragged['exchange'], ragged['there'][..., 0]
  outward, homeward = exchange.outward, exchange.homeward
  np.testing.assert_array_equal(exchanged(rows(), outward, ROOM), there)
  back = exchanged(there, homeward, T * K)
  np.testing.assert_array_equal(back, ragged['back'][..., 0])


def test_blocks_hold_the_first_rows_for_every_device() -> None:
  there = travelled()['blocks']['there'][..., 0].reshape(U, U, BLOCK)
  for to in range(U):
    left = COMPUTED
    for device in range(U):
      sent = segment(device, to)[: min(BLOCK, left)]
      left -= len(sent)
      np.testing.assert_array_equal(there[to, device, : len(sent)], sent)
      np.testing.assert_array_equal(there[to, device, len(sent) :], 0)
  # Four full blocks were to come, and the last is cut.
  assert (sizes()[:, 2].sum(1) >= BLOCK).all() and not there[2, -1].all()


def test_what_travelled_comes_back_to_its_place_and_the_rest_as_zeros() -> None:
  for found in travelled().values():
    kept = found['exchange'].send_counts_UN
    for device in range(U):
      of_expert = np.repeat(np.arange(N), sizes()[device].reshape(-1))
      nth = np.concatenate([np.arange(n) for n in np.bincount(of_expert)])
      kept_N = kept[device].reshape(-1)
      expected = np.zeros(T * K)
      expected[: len(nth)] = np.where(
        nth < kept_N[of_expert], rows()[device, : len(nth)], 0
      )
      np.testing.assert_array_equal(found['back'][device, :, 0], expected)
    assert 0 < kept.sum() < sizes().sum()


def test_rows_are_regrouped_by_expert() -> None:
  for found in travelled().values():
    np.testing.assert_array_equal(found['unsorted'], found['there'])
    for device in range(U):
      arriving = found['exchange'].receive_counts_UX[device]
      expert = np.concatenate(
        [np.repeat(np.arange(arriving.shape[1]), row) for row in arriving]
      )
      order = np.argsort(expert, kind='stable')
      np.testing.assert_array_equal(
        found['sorted'][device], found['there'][device][order]
      )
