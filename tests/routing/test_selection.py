"""Selection against numpy, with its ties and unused slots; the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.registry import SELECTIONS
from moe_jax.routing.selection import Routing, Select, SelectOptions
from tests.helpers import examples, tiny


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


def keeps_the_contract(
  routing: Routing, logits: np.ndarray, disabled: int
) -> None:
  """Holds a routing to what dispatch, balance and metrics rely on."""
  num_tokens, num_logits = logits.shape
  assert routing.num_experts == num_logits
  indices, weights = routing.indices_TK, routing.weights_TK
  assert indices.dtype == jnp.int32 and weights.dtype == jnp.float32
  assert indices.shape == weights.shape and len(indices) == num_tokens
  np.testing.assert_array_equal(routing.logits_TN, logits)
  assert np.isfinite(weights).all() and (weights >= 0).all()
  assert (weights.sum(-1) <= 1 + 1e-6).all()
  assert not weights[indices == num_logits].any()
  assert routing.probabilities_TN.dtype == jnp.float32
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  np.testing.assert_allclose(routing.probabilities_TN, p, rtol=2e-6, atol=1e-30)
  for t, row in enumerate(np.asarray(indices)):
    assert ((row >= 0) & (row <= num_logits)).all()
    experts = row[row < num_logits].tolist()
    assert len(set(experts)) == len(experts)
    # Possible is what neither the gate's mask nor `disable_top` takes away.
    best = np.argsort(-logits[t], kind='stable')[disabled:]
    possible = {n for n in best.tolist() if logits[t, n] > -np.inf}
    assert set(experts) <= possible
    assert bool(experts) == bool(possible)


def selection(name: str, options: SelectOptions) -> Select:
  """The selection of that name, those of examples/routers.py included."""
  with examples.registered_here():
    if name == 'null_experts':
      return examples.routers().NullExperts(options)
    return SELECTIONS[name](options)


@pytest.mark.parametrize('disabled', [0, 2])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('name', [*SELECTIONS, 'null_experts'])
def test_every_selection_keeps_the_contract(
  name: str, masked: bool, disabled: int
) -> None:
  select = selection(
    name,
    SelectOptions(8, 3, top_p=0.5, masked=masked, disable_top=disabled),
  )
  rng = np.random.default_rng(0)
  logits = np.float32(2 * rng.standard_normal((40, select.num_logits)))
  logits[0] = 0  # a tie of all
  logits[1] = np.sign(logits[1]) * 1e4
  if masked:
    logits[rng.random(logits.shape) < 0.6] = -np.inf
    logits[np.isinf(logits).all(-1), 0] = 1
  keeps_the_contract(select(jnp.asarray(logits)), logits, disabled)

  def total(logits_TN: jax.Array) -> jax.Array:
    return (select(logits_TN).weights_TK ** 2).sum()

  found = jax.grad(total)(jnp.asarray(logits))
  assert np.isfinite(found).all() and found.any()
