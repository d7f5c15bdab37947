"""Every gate against float64 numpy: values, gradients, invariances."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.routing.gates import GATES, GateContext, GateOptions
from tests.helpers import gradients
from tests.helpers import routing_oracles as oracles

# The gates that `router.bias` gives a bias.
BIASED = ['linear', 'mlp', 'hyper']
CASES = [(name, False) for name in GATES] + [(name, True) for name in BIASED]
IDS_T = np.array([3, 0, 12, 3])
# In evaluation, as everywhere here.
CONTEXT = GateContext(jnp.asarray(IDS_T), jnp.ones(4, bool))


def make(name: str, bias: bool) -> tuple[nnx.GraphDef, Any]:
  """A gate of 5 features, 6 experts and 13 words; random parameters."""
  options = GateOptions(
    num_features=5,
    num_experts=6,
    vocab_size=13,
    width=7,
    reduced_size=3,
    bias=bias,
    salt=0,
    init_std=0.5,
    feature_std=0.5,
  )
  gate = GATES[name](options, rngs=nnx.Rngs(params=0))
  params = nnx.to_pure_dict(nnx.state(gate, nnx.Param))
  return nnx.graphdef(gate), gradients.random_like(params)


def features(tokens: int = 4) -> np.ndarray:
  return np.random.default_rng(2).standard_normal((tokens, 5))


@pytest.mark.parametrize(('name', 'bias'), CASES)
def test_values_and_gradients(name: str, bias: bool) -> None:
  def expected(tree: Any, _: Any) -> np.ndarray:
    weights, gate = oracles.f64(tree['params']), oracles.GATES[name]
    rows = zip(tree['x_TX'], IDS_T, strict=True)
    return np.stack([gate(x_X, token, weights) for x_X, token in rows])

  with jax.enable_x64(True):
    graphdef, params = make(name, bias)

    def ours(tree: Any) -> jax.Array:
      return nnx.merge(graphdef, tree['params'])(tree['x_TX'], CONTEXT)

    tree = {'params': params, 'x_TX': features()}
    gradients.check(ours, expected, tree, rtol=1e-6)


@pytest.mark.parametrize('name', GATES)
def test_permuted_experts_have_permuted_logits(name: str) -> None:
  graphdef, params = make(name, bias=name in BIASED)
  order = np.array([4, 0, 5, 2, 1, 3])

  def permuted(path: Any, leaf: np.ndarray) -> np.ndarray:
    letters = path[-1].key.split('_')[-1]
    axis = letters.find('N')
    return leaf if axis < 0 else np.take(leaf, order, axis)

  again = jax.tree_util.tree_map_with_path(permuted, params)
  x_TX = jnp.float32(features())
  logits = [
    nnx.merge(graphdef, jax.tree.map(jnp.float32, p))(x_TX, CONTEXT)
    for p in (params, again)
  ]
  np.testing.assert_allclose(logits[1], logits[0][:, order], rtol=2e-5)


@pytest.mark.parametrize('name', ['cosine', 'xmoe'])
def test_cosines_do_not_see_lengths(name: str) -> None:
  graphdef, params = make(name, bias=False)
  gate = nnx.merge(graphdef, jax.tree.map(jnp.float32, params))
  x_TX = jnp.float32(features())
  np.testing.assert_allclose(
    gate(1000 * x_TX, CONTEXT), gate(x_TX, CONTEXT), rtol=1e-4
  )
  bound = 1 / np.exp(params['log_temperature'])
  assert np.abs(gate(x_TX, CONTEXT)).max() <= bound


@pytest.mark.parametrize('name', ['cosine', 'xmoe'])
def test_a_zero_token_has_finite_logits_and_gradients(name: str) -> None:
  graphdef, params = make(name, bias=False)
  params = jax.tree.map(jnp.float32, params)

  def total(params: Any, x_TX: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params)(x_TX, CONTEXT).sum()

  value, found = jax.value_and_grad(total, argnums=(0, 1))(
    params, jnp.zeros((4, 5))
  )
  assert float(value) == 0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_the_temperature_starts_at_xmoes() -> None:
  for name in ('cosine', 'xmoe'):
    options = GateOptions(5, 6, 13, 7, 3, False, 0, 0.5, 0.5)
    gate = GATES[name](options, rngs=nnx.Rngs(params=0))
    assert float(np.exp(gate.log_temperature[...])) == pytest.approx(0.3)


@pytest.mark.parametrize('name', GATES)
def test_no_token_sees_another(name: str) -> None:
  """Each token alone is rated as among others: padding cannot matter."""
  graphdef, params = make(name, bias=False)
  gate = nnx.merge(graphdef, jax.tree.map(jnp.float32, params))
  x_TX = jnp.float32(features())
  together = gate(x_TX, CONTEXT)
  for t in range(4):
    context = GateContext(CONTEXT.token_ids_T[t : t + 1], jnp.ones(1, bool))
    alone = gate(x_TX[t : t + 1], context)
    np.testing.assert_allclose(alone[0], together[t], rtol=1e-4, atol=1e-6)


def test_equal_tokens_hash_equally_whatever_their_features() -> None:
  graphdef, params = make('hash', bias=False)
  gate = nnx.merge(graphdef, jax.tree.map(jnp.float32, params))
  logits = np.asarray(gate(jnp.float32(features()), CONTEXT))
  np.testing.assert_array_equal(logits[0], logits[3])
  assert np.abs(logits[0] - logits[1]).max() > 0
