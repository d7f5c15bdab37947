"""Selection against numpy, with its ties and unused slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tiny


@pytest.mark.parametrize('k', [1, 2, 5, 8])
@pytest.mark.parametrize('renormalize', [True, False])
def test_top_k(k: int, renormalize: bool) -> None:
  logits = np.random.default_rng(0).standard_normal((50, 8))
  routing = tiny.select(8, k, renormalize=renormalize)(jnp.float32(logits))
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  order = np.argsort(-p, axis=-1, kind='stable')[:, :k]
  weights = np.take_along_axis(p, order, -1)
  if renormalize and k > 1:
    weights /= weights.sum(-1, keepdims=True)
  np.testing.assert_array_equal(routing.indices_TK, order)
  np.testing.assert_allclose(routing.weights_TK, weights, rtol=1e-6)
  np.testing.assert_allclose(routing.probabilities_TN, p, rtol=1e-6)


def test_of_equal_logits_the_lower_index_is_chosen() -> None:
  routing = tiny.select(6, 3)(jnp.zeros((1, 6)))
  np.testing.assert_array_equal(routing.indices_TK, [[0, 1, 2]])


def test_gradient_reaches_the_chosen_logits_as_through_lax_top_k() -> None:
  logits = jax.random.normal(jax.random.key(0), (20, 8))
  direction = jax.random.normal(jax.random.key(1), (20, 3))

  def ours(logits: jax.Array) -> jax.Array:
    return (tiny.select(8, 3)(logits).weights_TK * direction).sum()

  def reference(logits: jax.Array) -> jax.Array:
    weights, _ = jax.lax.top_k(jax.nn.softmax(logits), 3)
    return (weights / weights.sum(-1, keepdims=True) * direction).sum()

  np.testing.assert_allclose(
    jax.grad(ours)(logits), jax.grad(reference)(logits), atol=1e-6
  )


def test_slots_left_unused() -> None:
  routing = tiny.select(3)(jnp.array([[0.0, 3.0, 1.0]]))
  used = routing.only(jnp.array([[True, False]]))
  np.testing.assert_array_equal(used.indices_TK, [[1, 3]])
  assert float(used.weights_TK[0, 1]) == 0
  np.testing.assert_array_equal(used.logits_TN, routing.logits_TN)
