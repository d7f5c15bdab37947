"""What is said of routing: numbers by hand, names, and pictures."""

import jax
import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax.routing.balance import Load
from moe_jax.training.metrics import (
  load_map,
  router_scalars,
  routing_metrics,
)
from tests.helpers import tiny

# Two layers of two sub-layers with four experts, two of each token's 8 choices.
COUNTS = np.array(
  [
    [[4, 4, 4, 4], [16, 0, 0, 0]],
    [[8, 4, 4, 0], [6, 6, 2, 2]],
  ],
  np.float32,
)


def load(overflowed: bool = False) -> Load:
  per_router = np.arange(4, dtype=np.float32).reshape(2, 2)
  return Load(
    counts_N=COUNTS,
    probability_N=COUNTS / 2,
    tokens=np.full((2, 2), 8.0, np.float32),
    z=per_router,
    entropy=8 * per_router,
    dropped=np.array([[0, 8], [4, 0]], np.float32),
    overflowed=np.array([[0, 4], [2, 0]], np.float32) if overflowed else None,
    bias_gradient=per_router,
    sequence_balance=per_router,
    sequences=per_router,
  )


def test_every_router_has_numbers_of_its_own() -> None:
  found = routing_metrics(load())
  # The balanced share is 4 of 16 assignments; MaxVio = (max - mean) / mean.
  expected = {
    'routing/max_violation': [[0, 3], [1, 0.5]],
    'routing/idle_experts': [[0, 3], [1, 0]],
    'routing/entropy': [[0, 1], [2, 3]],
    'routing/dropped_share': [[0, 0.5], [0.25, 0]],
    'max_violation': (0 + 3 + 1 + 0.5) / 4,
    'max_load': [4, 2],
    'idle_experts': [3, 1],
    'router_entropy': [0.5, 2.5],
    'dropped_share': [0.5, 0.25],
  }
  for name, values in expected.items():
    np.testing.assert_allclose(found.pop(name), values, err_msg=name)
  np.testing.assert_array_equal(found.pop('expert_counts'), COUNTS)
  assert not found


def test_buffers_that_overflow_have_their_share() -> None:
  found = routing_metrics(load(overflowed=True))
  shares = found['routing/overflowed_share']
  np.testing.assert_allclose(shares, [[0, 0.25], [0.125, 0]])
  np.testing.assert_array_equal(found['exchange_overflows'], [4, 2])


def test_a_model_without_experts_has_none() -> None:
  assert routing_metrics(None) == {}


@pytest.mark.parametrize(
  'keys, names',
  [
    ({'model.num_layers': 3}, ['1', '2', '3']),
    # Layers 1 and 2 are dense, and then every second one is.
    (
      {'model.num_layers': 6, 'moe.first_dense': 2, 'moe.every': 2},
      ['3', '5'],
    ),
    ({'model.num_layers': 2, 'moe.factors': 2}, ['1A', '1B', '2A', '2B']),
    ({'moe.num_experts': 0}, []),
  ],
)
def test_routers_are_named_by_their_layer(keys: dict, names: list[str]) -> None:
  assert config_lib.router_names(tiny.config(**keys)) == names


def test_each_number_of_a_router_is_a_scalar() -> None:
  config = tiny.config(**{'model.num_layers': 2, 'moe.factors': 2})
  names = config_lib.router_names(config)
  found = router_scalars(names, routing_metrics(load()) | {'loss': 1.0})
  assert len(found) == 4 * len(names)
  assert found['max_violation/layer_1B'] == 3
  assert found['entropy/layer_2A'] == 2
  assert all(isinstance(value, float) for value in found.values())


def test_the_map_has_a_line_per_router_and_a_colour_per_load() -> None:
  pixels = load_map(COUNTS)
  assert pixels.dtype == np.uint8
  assert pixels.shape == (4 * 16, 4 * 16, 3)
  # Squares of one colour.
  cells = pixels.reshape(4, 16, 4, 16, 3)
  np.testing.assert_array_equal(cells.min((1, 3)), cells.max((1, 3)))
  [balanced, collapsed, skewed, _] = cells[:, 0, :, 0].astype(int)
  assert (balanced == 247).all()
  assert (collapsed[1:] == 0).all() and (skewed[3] == 0).all()
  # Four times the share is the reddest, twice lies halfway to it.
  np.testing.assert_array_equal(collapsed[0], [178, 24, 43])
  np.testing.assert_array_equal(skewed[0], [212, 135, 145])
  # Half of the share lies halfway to the bluest.
  half = load_map(np.array([[[2, 4, 4, 6]]]))[0, 0]
  np.testing.assert_array_equal(half, [140, 174, 209])


@pytest.mark.parametrize('experts, size', [(64, 16), (256, 4), (5000, 1)])
def test_a_map_is_no_wider_than_a_screen(experts: int, size: int) -> None:
  assert load_map(np.ones((3, 1, experts))).shape[:2] == (
    3 * size,
    experts * size,
  )


def test_nothing_is_said_of_a_batch_without_tokens() -> None:
  nothing = jax.tree.map(np.zeros_like, load())
  for name, values in routing_metrics(nothing).items():
    assert np.isfinite(values).all(), name
  assert not load_map(nothing.counts_N).any()
