"""A training step is the same by every exchange: losses, gradients, metrics."""

import functools
import itertools
from typing import Any

import jax
import numpy as np
import optax
import pytest

from moe_jax.parallel import mesh as mesh_lib
from moe_jax.training.metrics import routing_metrics
from moe_jax.training.step import make_train_step
from tests.helpers import marks, tiny
from tests.helpers.steps import (
  BALANCED,
  BOUNDED,
  EVERY_AXIS,
  batch,
  init,
  setup,
)

# As the model routes; mostly to the first experts; all to the same two.
SKEWS = (0.0, 0.02, 10.0)


def step(
  overrides: dict[str, Any], axes: dict[str, int], skew: float
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Metrics and state after one step of training.

  Args:
    overrides: of the tiny config; `loss.bias_rate` has to be above 0.
    axes: of the mesh.
    skew: by so much more than the next one each expert is preferred.
  """
  made, train_step = compiled(tuple(overrides.items()), tuple(axes.items()))
  state = init(made)

  def prefer(path: Any, leaf: jax.Array) -> jax.Array:
    if path[-1].key != 'choice_bias_N':
      return leaf
    order_N = skew * np.arange(leaf.shape[-1], 0, -1)
    return jax.device_put(leaf + order_N, leaf.sharding)

  state['params'] = jax.tree_util.tree_map_with_path(prefer, state['params'])
  data = batch(made.config)
  data = jax.device_put(data, mesh_lib.batch_sharding(made.mesh))
  state, metrics = train_step(state, data)
  return jax.tree.map(np.asarray, (metrics, state))


@functools.cache
def compiled(overrides: tuple, axes: tuple) -> Any:
  made = setup(tiny.config(**dict(overrides)), **dict(axes))
  return made, make_train_step(made)


def check(
  overrides: dict[str, Any], axes: dict[str, int], skew: float
) -> dict[str, Any]:
  """Holds one step on eight devices to one on one device; its metrics."""
  alone, state = step(overrides, {}, skew)
  metrics, together = step(overrides, axes, skew)
  load, expected = metrics.pop('load'), alone.pop('load')
  counted = routing_metrics(load)
  assert ('exchange_overflows' in counted) == (load.overflowed is not None)
  for name, value in routing_metrics(expected).items():
    np.testing.assert_allclose(counted[name], value, 1e-5, err_msg=name)
  for name, value in alone.items():
    np.testing.assert_allclose(metrics[name], value, 1e-5, err_msg=name)
  np.testing.assert_array_equal(load.counts_N, expected.counts_N)

  def near(path: Any, a: np.ndarray, b: np.ndarray) -> None:
    name = jax.tree_util.keystr(path)
    # Steps by a sign; gradients, as moments, to the largest of the array's.
    rate = 1e-7 if 'choice_bias_N' in name else 1e-5 * np.abs(b).max()
    np.testing.assert_allclose(a, b, 0, rate, err_msg=name)

  moments = [optax.tree.get(s['opt_state'], 'mu') for s in (together, state)]
  jax.tree_util.tree_map_with_path(near, *moments)
  biases = [
    {
      jax.tree_util.keystr(path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(s['params'])
      if path[-1].key == 'choice_bias_N'
    }
    for s in (together, state)
  ]
  assert len(biases[1]) == 2
  jax.tree_util.tree_map_with_path(near, *biases)
  return counted


@pytest.mark.slow
@pytest.mark.parametrize('skew', SKEWS)
def test_a_bounded_exchange_changes_no_metric(skew: float) -> None:
  counted = check(BOUNDED, EVERY_AXIS, skew)
  assert counted['exchange_overflows'].shape == (2,)
  assert (counted['exchange_overflows'] > 0).all()


EXCHANGES = [
  {'moe.exchange': 'gather'},
  {'moe.exchange': 'all_to_all', 'moe.buffer_factor': 16.0},
  {'moe.exchange': 'ragged', 'moe.buffer_factor': 0.6},
  {
    'moe.exchange': 'all_to_all',
    'moe.dispatch': 'capacity',
    'moe.capacity_factor': 8.0,  # nothing is dropped
  },
]
WITH_OTHERS = [
  {'moe.dispatch': 'capacity', 'moe.capacity_factor': 8.0}
  | {'moe.exchange': 'gather'},
  {'router.selection': 'top_p', 'moe.renormalize': False}
  | {'moe.exchange': 'ragged'},
  {'moe.exchange': 'all_to_all', 'model.dropout': 0.2},
  {'moe.exchange': 'all_to_all', 'model.remat': 'full'},
  {'moe.exchange': 'ragged', 'model.remat': 'dots'},
]


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes, axes',
  marks.at_first(
    6,
    [
      *((changes, EVERY_AXIS) for changes in WITH_OTHERS),
      *itertools.product(EXCHANGES, [{'expert': 8}, {'data': 2, 'expert': 4}]),
    ],
  ),
  ids=str,
)
def test_every_exchange_changes_no_metric(
  changes: dict[str, Any], axes: dict[str, int]
) -> None:
  for skew in SKEWS:
    counted = check(BALANCED | changes, axes, skew)
    if changes.get('moe.buffer_factor') == 16.0:
      np.testing.assert_array_equal(counted['exchange_overflows'], 0)
