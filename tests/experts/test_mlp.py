"""ReLU experts with biases and dropout: every dispatch computes one sum."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.experts.dispatch import DISPATCHES, Dispatch
from moe_jax.experts.dropout import dropout, dropout_rows
from moe_jax.experts.mlp import ReLUExperts
from moe_jax.routing.selection import Routing
from tests.helpers import tiny
from tests.helpers.dense_experts import D, F, T
from tests.helpers.exchanges import N, across

K = 2
RATE = 0.4
# The bias of the output has to be in one part of the width only.
MESH = {'fsdp': 2, 'expert': 2, 'tensor': 2}
ALONE = ('dropless', 'capacity')


def on_one_device(name: str) -> Dispatch:
  moe = tiny.config(**{'moe.capacity_factor': float(N)}).moe  # room for all
  return DISPATCHES[name](moe)


EVERYWHERE = {
  **{name: functools.partial(on_one_device, name) for name in ALONE},
  'gather': lambda: across(MESH, 'gather'),
  'all_to_all': lambda: across(MESH, 'all_to_all', buffer_factor=0.8),
  'ragged': lambda: across(MESH, 'ragged', buffer_factor=0.8),
  'capacity all_to_all': lambda: across(
    MESH, 'all_to_all', dispatch='capacity'
  ),
}


def make_experts() -> ReLUExperts:
  return ReLUExperts(
    N, D, F, init_std=0.3, dropout=RATE, rngs=nnx.Rngs(params=0)
  )


def operands() -> tuple[Any, ...]:
  """x, weights, choice (a fifth of it unused), seeds and parameters."""
  rng = np.random.default_rng(0)
  choice = np.stack([rng.permutation(N)[:K] for _ in range(T)])
  choice[rng.random((T, K)) < 0.2] = N
  weights = rng.random((T, K)) * (choice < N)
  seeds = rng.integers(0, 2**32, (T, K), np.uint32)
  params = nnx.to_pure_dict(nnx.state(make_experts(), nnx.Param))
  noisy = {k: v + 0.2 * rng.standard_normal(v.shape) for k, v in params.items()}
  x = rng.standard_normal((T, D))
  single = functools.partial(jax.tree.map, jnp.float32)
  seeds = jnp.asarray(seeds)
  return single(x), single(weights), jnp.int32(choice), seeds, single(noisy)


def dense(
  x: jax.Array, weights: Any, choice: Any, mask_TKF: Any, params: dict
) -> jax.Array:
  """Every expert for every token, and a mask for each assignment."""
  hidden_TNF = jax.nn.relu(
    jnp.einsum('TD,NDF->TNF', x, params['up_NDF']) + params['up_bias_NF']
  )
  y = jnp.zeros_like(x)
  for k in range(K):
    for n in range(N):
      hidden_TF = hidden_TNF[:, n] * mask_TKF[:, k]
      out_TD = hidden_TF @ params['down_NFD'][n] + params['down_bias_ND'][n]
      here_T = weights[:, k] * (choice[:, k] == n)
      y += here_T[:, None] * out_TD
  return y


def masks(seeds: jax.Array) -> np.ndarray:
  """What hidden units are multiplied by, from each assignment's seed."""
  kept = [
    jax.random.bernoulli(jax.random.key(int(seed)), 1 - RATE, (F,))
    for seed in seeds.ravel()
  ]
  return np.stack(kept).reshape(T, K, F) / np.float32(1 - RATE)


@functools.cache
def expected(with_dropout: bool) -> Any:
  x, weights, choice, seeds, params = operands()
  mask_TKF = masks(seeds) if with_dropout else np.ones((T, K, F), np.float32)

  def total(x: jax.Array, weights: jax.Array, params: dict) -> Any:
    y = dense(x, weights, choice, mask_TKF, params)
    return jnp.sin(y).sum(), y

  gradient = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
  return jax.jit(gradient)(x, weights, params)


FAST = [('dropless', True), ('all_to_all', False)]


# Each dispatch and exchange has a test of its own, with other experts.
@pytest.mark.parametrize(
  'name, with_dropout',
  [
    pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow])
    for case in itertools.product(EVERYWHERE, (True, False))
  ],
)
def test_equals_every_expert_for_every_assignment(
  name: str, with_dropout: bool
) -> None:
  dispatch = EVERYWHERE[name]()
  x, weights, choice, seeds, params = operands()
  graphdef = nnx.graphdef(nnx.eval_shape(make_experts))

  def total(x: jax.Array, weights: jax.Array, params: dict) -> Any:
    logits = jnp.zeros((T, N))
    routing = Routing(
      weights, choice, logits, logits, seeds if with_dropout else None
    )
    y, dropped, _ = dispatch(x, routing, nnx.merge(graphdef, params))
    return jnp.sin(y).sum(), (y, dropped)

  gradient = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
  (_, (y, dropped)), grads = jax.jit(gradient)(x, weights, params)
  (_, expected_y), expected_grads = expected(with_dropout)
  assert int(dropped) == 0
  np.testing.assert_allclose(y, expected_y, rtol=1e-4, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    grads,
    expected_grads,
  )


def test_a_rows_mask_is_its_seeds_alone() -> None:
  """Neither its place nor the units held here change it."""
  hidden = jnp.ones((5, 8))
  seeds = np.arange(5, dtype=np.uint32)

  def drop(hidden: jax.Array, seeds: Any, first: int) -> jax.Array:
    return dropout_rows(hidden, 0.5, seeds, num_units=8, first_unit=first)

  whole = drop(hidden, seeds, 0)
  assert {0.0, 2.0} == set(np.unique(whole))
  np.testing.assert_array_equal(drop(hidden, seeds[::-1], 0), whole[::-1])
  np.testing.assert_array_equal(drop(hidden[:, :3], seeds, 5), whole[:, 5:])


def test_dropout_keeps_the_mean_and_none_is_none() -> None:
  x = jnp.ones((100, 100))
  dropped = dropout(x, 0.3, jax.random.key(0))
  assert abs(float(dropped.mean()) - 1) < 0.05
  assert abs(float((dropped == 0).mean()) - 0.3) < 0.02
  assert dropout(x, 0.3, None) is x
  assert dropout(x, 0.0, jax.random.key(0)) is x
