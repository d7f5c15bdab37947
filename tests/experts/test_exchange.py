"""Eight devices compute what one does, by every exchange, for any routing."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.experts.dispatch import DISPATCHES, dropless
from moe_jax.experts.exchange import EXCHANGES, ExchangeMethod, exchanges_for
from moe_jax.model import implementations
from moe_jax.parallel import mesh as mesh_lib
from tests.helpers import dense_experts, marks, own_parts, registries, tiny
from tests.helpers.dense_experts import T
from tests.helpers.exchanges import MESHES, N, across

# Room for all; for less than blocks hold; for the balanced share; for less.
FACTORS = (17.0, 2.0, 1.0, 0.3)
PAIRS = [
  (dispatch, exchange)
  for dispatch in DISPATCHES
  for exchange in exchanges_for(dispatch)
]
# The pairs whose buffers may overflow.
BOUNDED = [('dropless', 'all_to_all'), ('dropless', 'ragged')]
CONTRACT_MESHES = (
  'fsdp 2, expert 2, context 2',
  'data 2, expert 4',
  'fsdp 2, expert 2, tensor 2',
)


def overflows(
  choice: np.ndarray, axes: dict[str, int], exchange: str, factor: float
) -> int:
  """Assignments without room, counted with numpy."""
  experts, k = axes['expert'], choice.shape[1]
  groups = math.prod(axes.get(axis, 1) for axis in ('data', 'fsdp'))
  parts = axes.get('context', 1)
  tokens = T // groups // experts // parts
  # [group, from, part, token, assignment]: the device it goes to.
  device = (choice // (N // experts)).reshape(groups, experts, parts, tokens, k)
  device = device.swapaxes(1, 2).reshape(-1, experts, tokens, k)
  rows = np.stack([(device == to).sum((2, 3)) for to in range(experts)], -1)
  if exchange == 'ragged':
    return np.maximum(rows.sum(1) - math.ceil(factor * tokens * k), 0).sum()
  in_blocks = np.minimum(rows, math.ceil(factor * tokens * k / experts))
  # Of what blocks have to spare there is half for all rows of a device.
  room = math.ceil((1 + factor) / 2 * tokens * k)
  return rows.sum() - np.minimum(in_blocks.sum(1), room).sum()


def check(
  computed: Any,
  axes: dict[str, int],
  exchange: str,
  *,
  factor: float = 0.0,
  k: int = 2,
  num_experts: int = N,
  dropout: bool = False,
) -> None:
  """Holds one program to the loop over experts, for every kind of routing."""
  for seed, choose in enumerate(dense_experts.CHOICES):
    of = dense_experts.problem(choose, num_experts, k, seed, dropout)
    ours, done = computed(of)
    dense_experts.assert_close(ours, dense_experts.dense_loop(of))
    assert int(done.dropped) == 0
    if factor:
      expected = overflows(of.choice, axes, exchange, factor)
      assert int(done.overflowed) == expected, choose.__name__
    else:
      assert done.overflowed is None


@pytest.mark.parametrize(
  ('dispatch', 'exchange', 'mesh'),
  [
    (*pair, mesh)
    for pair, mesh in zip(PAIRS, itertools.cycle(CONTRACT_MESHES), strict=False)
  ],
)
def test_every_pair_of_the_registries_equals_the_loop(
  dispatch: str, exchange: str, mesh: str
) -> None:
  axes, factor = MESHES[mesh], 1.0
  made = across(axes, exchange, dispatch=dispatch, buffer_factor=factor)
  computed = dense_experts.jitted(made, N, dropout=True)
  bounded = factor if (dispatch, exchange) in BOUNDED else 0.0
  check(computed, axes, exchange, factor=bounded, dropout=True)


@pytest.mark.parametrize(
  'own',
  [
    'batched',
    # Rows sorted by expert go in blocks that have room for all.
    pytest.param('grouped', marks=pytest.mark.slow),
  ],
)
def test_an_own_dispatch_keeps_the_contract(
  own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  registries.forget(monkeypatch, DISPATCHES)
  function = {'batched': own_parts.every_expert, 'grouped': dropless}[own]
  DISPATCHES.register('own')(lambda moe: function)
  assert exchanges_for('own') == ('gather', 'all_to_all')
  axes = MESHES['fsdp 2, expert 2, tensor 2']
  for exchange in exchanges_for('own'):
    made = across(axes, exchange, dispatch='own')
    computed = dense_experts.jitted(made, N, dropout=True)
    check(computed, axes, exchange, dropout=True)


def test_an_own_exchange_keeps_the_contract_and_auto_weighs_it(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  registries.forget(monkeypatch, EXCHANGES)
  EXCHANGES.register('own')(
    ExchangeMethod(
      make=lambda moe, inner, layout: own_parts.SumEverywhere(
        inner, layout.expert_axis
      ),
      num_bytes=lambda moe, sizes, row_bytes: 1.0,  # so that it is the cheapest
    )
  )
  axes = MESHES['fsdp 2, expert 2, context 2']
  config = tiny.config(**{f'mesh.{axis}': size for axis, size in axes.items()})
  config_lib.validate(config, 8)
  mesh = mesh_lib.from_config(config, jax.devices())
  made = implementations.dispatch(config, mesh, jnp.float32)
  assert isinstance(made.inner, own_parts.SumEverywhere)
  check(dense_experts.jitted(made, N, dropout=True), axes, 'own', dropout=True)
  config.moe.exchange = 'own'
  config_lib.validate(config, 8)
  config.moe.exchange = 'ring'
  with pytest.raises(UserError, match=r"moe.exchange = 'ring'"):
    config_lib.validate(config, 8)


@pytest.mark.slow
@pytest.mark.parametrize('dropout', marks.at_first(1, [True, False]))
@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize(
  'dispatch, exchange, factor',
  [
    ('dropless', 'gather', 0.0),
    *itertools.product(['dropless'], ['all_to_all', 'ragged'], FACTORS),
    ('capacity', 'gather', 0.0),
    ('capacity', 'all_to_all', 0.0),
  ],
)
def test_every_exchange_on_every_mesh(
  dispatch: str, exchange: str, factor: float, mesh: str, dropout: bool
) -> None:
  axes = MESHES[mesh]
  made = across(axes, exchange, dispatch=dispatch, buffer_factor=factor)
  computed = dense_experts.jitted(made, N, dropout)
  check(computed, axes, exchange, factor=factor, dropout=dropout)


@pytest.mark.slow
@pytest.mark.parametrize('exchange', ['gather', 'all_to_all', 'ragged'])
@pytest.mark.parametrize(
  'num_experts, k, axes',
  [
    # More devices than experts: the rest of them split the widths.
    (4, 2, {'expert': 4, 'tensor': 2}),
    (2, 1, {'expert': 2, 'tensor': 4}),
    (16, 3, {'expert': 4, 'data': 2}),
    # As with top-p: as many assignments as experts, most of them unused.
    (8, 8, {'expert': 8}),
  ],
)
def test_other_numbers_of_experts_and_assignments(
  exchange: str, num_experts: int, k: int, axes: dict[str, int]
) -> None:
  dispatch = across(axes, exchange, num_experts, buffer_factor=0.5)
  computed = dense_experts.jitted(dispatch, num_experts)
  for seed, choose in enumerate(dense_experts.CHOICES):
    of = dense_experts.problem(choose, num_experts, k, seed)
    ours, done = computed(of)
    dense_experts.assert_close(ours, dense_experts.dense_loop(of))
    assert int(done.dropped) == 0
    if exchange != 'gather' and choose is dense_experts.together:
      assert int(done.overflowed) > 0


@pytest.mark.slow
@pytest.mark.parametrize('exchange', ['gather', 'all_to_all'])
def test_capacity_counts_drops_on_every_device(exchange: str) -> None:
  dispatch = across(
    {'data': 2, 'expert': 2, 'tensor': 2},
    exchange,
    dispatch='capacity',
    capacity_factor=0.5,
  )
  of = dense_experts.problem(dense_experts.together, N, 2)
  _, done = dense_experts.jitted(dispatch, N)(of)
  # Two groups of 32 tokens: queues of 4 for each of the two experts. Or each
  # of the four devices with 16 tokens: queues of 2.
  kept = {'gather': 2 * 2 * 4, 'all_to_all': 4 * 2 * 2}
  assert int(done.dropped) == 2 * T - kept[exchange]


def along_fsdp(jaxpr: Any, in_loop: bool = False) -> Iterator[bool]:
  """Of every gather and scatter along that axis, whether a loop repeats it."""
  for eqn in jaxpr.eqns:
    moves = eqn.primitive.name in ('all_gather', 'reduce_scatter')
    if moves and 'fsdp' in eqn.params['axis_name']:
      yield in_loop
    inner = in_loop or eqn.primitive.name in ('scan', 'while')
    for value in jax.tree.leaves(tuple(eqn.params.values())):
      if hasattr(getattr(value, 'jaxpr', value), 'eqns'):
        yield from along_fsdp(getattr(value, 'jaxpr', value), inner)


def test_no_loop_gathers_weights_or_scatters_their_gradients() -> None:
  # The exact way takes one device's tokens after the other's; a gather in each
  # turn would be slow, and libtpu fails on a sum of gradients in each.
  dispatch = across(MESHES['fsdp 2, expert 2, context 2'], 'all_to_all')
  computed = dense_experts.jitted(dispatch, N)
  of = dense_experts.problem(dense_experts.varied, N, 2)
  found = list(along_fsdp(jax.make_jaxpr(lambda: computed(of))().jaxpr))
  # Of two parameters, forward and backward, both ways.
  assert len(found) >= 8 and not any(found)


@pytest.mark.slow
def test_one_device_computes_the_same() -> None:
  """But for rounding: the oracle of the metrics' tests is one device."""
  alone = dense_experts.jitted(dropless, N)
  for exchange in ('gather', 'all_to_all', 'ragged'):
    dispatch = across(MESHES['data 2, expert 4'], exchange, buffer_factor=2.0)
    computed = dense_experts.jitted(dispatch, N)
    of = dense_experts.problem(dense_experts.varied, N, 2)
    dense_experts.assert_close(computed(of)[0], alone(of)[0])
