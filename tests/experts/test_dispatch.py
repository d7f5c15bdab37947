"""On one device: a loop over experts in float64, and who finds room."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import config as config_lib
from moe_jax.experts.dispatch import (
  DISPATCHES,
  Capacity,
  by_position,
  by_probability,
  dropless,
  dropless_weighing_outputs,
)
from moe_jax.experts.mlp import SwiGLUExperts
from moe_jax.experts.permute import permute
from moe_jax.model import implementations
from moe_jax.routing.selection import Routing
from tests.helpers import dense_experts, own_parts, registries, tiny
from tests.helpers.dense_experts import D, F, T

K, N = 2, 8


def on_one_device(name: str, **moe: Any) -> Any:
  """The dispatch that a config's `moe.dispatch` means."""
  roomy = {'moe.capacity_factor': float(N)}  # room for all in one expert
  settings = {f'moe.{key}': value for key, value in moe.items()}
  return DISPATCHES[name](tiny.config(**(roomy | settings)).moe)


def check(dispatch: Any) -> None:
  """Holds a dispatch to the loop over experts, for every kind of routing."""
  computed = dense_experts.jitted(dispatch, N, dropout=True)
  for seed, choose in enumerate(dense_experts.CHOICES):
    of = dense_experts.problem(choose, N, K, seed, dropout=True)
    ours, done = computed(of)
    dense_experts.assert_close(ours, dense_experts.dense_loop(of))
    assert int(done.dropped) == 0 and done.overflowed is None


@pytest.mark.parametrize('name', DISPATCHES)
def test_equals_dense_loop(name: str) -> None:
  check(on_one_device(name))


def test_weighing_outputs_equals_dense_loop() -> None:
  check(dropless_weighing_outputs)


def test_capacity_by_weight_equals_dense_loop() -> None:
  check(on_one_device('capacity', priority='probability'))


def test_an_own_dispatch_keeps_the_contract(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  registries.forget(monkeypatch, DISPATCHES)
  DISPATCHES.register('own')(lambda moe: own_parts.every_expert)
  check(on_one_device('own'))
  config = tiny.config(**{'moe.dispatch': 'own'})
  config_lib.validate(config, 1)
  made = implementations.dispatch(config, None, jnp.float32)
  assert made is own_parts.every_expert


def test_capacity_keeps_the_first_tokens_of_an_expert() -> None:
  # 64 tokens x 2 assignments over 8 experts: a balanced share of 16. With
  # factor 0.5, experts 0 and 1 keep their first 8 tokens and drop 56 each.
  rng = np.random.default_rng(0)
  weights = jnp.ones((T, K))
  choice = jnp.int32(dense_experts.together(rng, N, K))
  logits = jnp.zeros((T, N))
  experts = SwiGLUExperts(N, D, F, init_std=1.0, rngs=nnx.Rngs(params=0))
  x = jax.random.normal(jax.random.key(0), (T, D))
  routing = Routing(weights, choice, logits, logits)
  whole, part = jax.jit(
    lambda x, routing: [
      dispatch(x, routing, experts)
      for dispatch in (dropless, Capacity(0.5, by_position))
    ]
  )(x, routing)
  assert (int(whole.dropped), int(part.dropped)) == (0, 112)
  np.testing.assert_allclose(
    part.y_TD[:8], whole.y_TD[:8], rtol=1e-5, atol=1e-4
  )
  np.testing.assert_array_equal(part.y_TD[8:], 0)


def test_capacity_keeps_the_heaviest_assignments_of_an_expert() -> None:
  rng = np.random.default_rng(5)
  weights = rng.random((T, K)).round(1)  # with many equal ones
  choice = dense_experts.varied(rng, N, K)
  choice[rng.random((T, K)) < 0.2] = N
  logits = jnp.zeros((T, N))
  routing = Routing(jnp.float32(weights), jnp.int32(choice), logits, logits)
  experts = SwiGLUExperts(N, D, F, init_std=1.0, rngs=nnx.Rngs(params=0))
  x = jax.random.normal(jax.random.key(0), (T, D))
  capacity = Capacity(0.5, by_probability)
  part = jax.jit(lambda x, routing: capacity(x, routing, experts))(x, routing)

  kept = np.zeros((T, K), bool)
  for expert in range(N):
    pairs = [tuple(pair) for pair in np.argwhere(choice == expert)]
    # Python's sort is stable: of equal weights the earlier token comes first.
    for pair in sorted(pairs, key=lambda pair: -weights[pair])[:8]:
      kept[pair] = True
  assert int(part.dropped) == (~kept & (choice < N)).sum() > 0
  alone = routing.only(jnp.array(kept))
  whole = jax.jit(lambda x, routing: dropless(x, routing, experts))(x, alone)
  np.testing.assert_allclose(part.y_TD, whole.y_TD, rtol=1e-5, atol=1e-4)


def test_backward_keeps_the_rows_and_not_what_experts_make_of_them() -> None:
  experts = SwiGLUExperts(N, D, F, init_std=0.3, rngs=nnx.Rngs(params=0))
  weights, choice = jnp.ones((T, K)), jnp.zeros((T, K), jnp.int32)
  logits = jnp.zeros((T, N))

  def kept(x_TD: jax.Array, weights_TK: jax.Array) -> Any:
    routing = Routing(weights_TK, choice, logits, logits)
    return jax.vjp(
      lambda x_TD, routing: dropless(x_TD, routing, experts).y_TD, x_TD, routing
    )[1]

  shapes = [
    leaf.shape
    for leaf in jax.tree.leaves(
      jax.eval_shape(kept, jnp.zeros((T, D)), weights)
    )
  ]
  assert shapes.count((T * K, D)) == 1 and (T * K, 2 * F) in shapes


def test_moving_all_rows_fills_in_no_zeros() -> None:
  """Which would be one more pass over what was gathered, of TPUs."""
  x_TD, order = jnp.zeros((T, D)), jnp.arange(T * K)

  def both_ways(complete: bool) -> str:
    def moved(x_TD: jax.Array) -> jax.Array:
      return permute(x_TD, order, order.reshape(T, K), complete).sum()

    return jax.jit(jax.value_and_grad(moved)).lower(x_TD).as_text()

  selects = [
    [line for line in both_ways(complete).splitlines() if 'select' in line]
    for complete in (True, False)
  ]
  assert not any(f'x{D}xf32>' in line for line in selects[0])
  assert any(f'tensor<{T * K}x{D}xf32>' in line for line in selects[1])
