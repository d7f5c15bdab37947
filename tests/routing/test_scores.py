"""Every score against float64 numpy: values, gradients, invariances."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.routing.scores import SCORES, ScoreOptions
from tests.helpers import gradients
from tests.helpers import routing_oracles as oracles

# The scores that `router.bias` gives a bias.
BIASED = ['linear', 'mlp', 'hyper']
CASES = [(name, False) for name in SCORES] + [(name, True) for name in BIASED]
IDS_T = np.array([3, 0, 12, 3])


def make(name: str, bias: bool) -> tuple[nnx.GraphDef, Any]:
  """A score of 5 features, 6 experts and 13 words; random parameters."""
  options = ScoreOptions(
    num_features=5,
    num_experts=6,
    vocab_size=13,
    width=7,
    reduced_size=3,
    bias=bias,
    salt=0,
    init_std=0.5,
  )
  score = SCORES[name](options, rngs=nnx.Rngs(params=0))
  params = nnx.to_pure_dict(nnx.state(score, nnx.Param))
  return nnx.graphdef(score), gradients.random_like(params)


def features(tokens: int = 4) -> np.ndarray:
  return np.random.default_rng(2).standard_normal((tokens, 5))


@pytest.mark.parametrize(('name', 'bias'), CASES)
def test_values_and_gradients(name: str, bias: bool) -> None:
  def expected(tree: Any, _: Any) -> np.ndarray:
    weights, score = oracles.f64(tree['params']), oracles.SCORES[name]
    rows = zip(tree['x_TX'], IDS_T, strict=True)
    return np.stack([score(x_X, token, weights) for x_X, token in rows])

  with jax.enable_x64(True):
    graphdef, params = make(name, bias)

    def ours(tree: Any) -> jax.Array:
      return nnx.merge(graphdef, tree['params'])(
        tree['x_TX'], jnp.asarray(IDS_T)
      )

    tree = {'params': params, 'x_TX': features()}
    gradients.check(ours, expected, tree, rtol=1e-6)


@pytest.mark.parametrize('name', SCORES)
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
    nnx.merge(graphdef, jax.tree.map(jnp.float32, p))(x_TX, IDS_T)
    for p in (params, again)
  ]
  np.testing.assert_allclose(logits[1], logits[0][:, order], rtol=2e-5)


@pytest.mark.parametrize('name', ['cosine', 'xmoe'])
def test_cosines_do_not_see_lengths(name: str) -> None:
  graphdef, params = make(name, bias=False)
  score = nnx.merge(graphdef, jax.tree.map(jnp.float32, params))
  x_TX = jnp.float32(features())
  np.testing.assert_allclose(
    score(1000 * x_TX, IDS_T), score(x_TX, IDS_T), rtol=1e-4
  )
  bound = 1 / np.exp(params['log_temperature'])
  assert np.abs(score(x_TX, IDS_T)).max() <= bound


@pytest.mark.parametrize('name', ['cosine', 'xmoe'])
def test_a_zero_token_has_finite_logits_and_gradients(name: str) -> None:
  graphdef, params = make(name, bias=False)
  params = jax.tree.map(jnp.float32, params)

  def total(params: Any, x_TX: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params)(x_TX, IDS_T).sum()

  value, found = jax.value_and_grad(total, argnums=(0, 1))(
    params, jnp.zeros((4, 5))
  )
  assert float(value) == 0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_the_temperature_starts_at_xmoes() -> None:
  for name in ('cosine', 'xmoe'):
    options = ScoreOptions(5, 6, 13, 7, 3, False, 0, 0.5)
    score = SCORES[name](options, rngs=nnx.Rngs(params=0))
    assert float(np.exp(score.log_temperature[...])) == pytest.approx(0.3)


@pytest.mark.parametrize('name', SCORES)
def test_no_token_sees_another(name: str) -> None:
  """Each token alone scores as among others: padding cannot matter."""
  graphdef, params = make(name, bias=False)
  score = nnx.merge(graphdef, jax.tree.map(jnp.float32, params))
  x_TX = jnp.float32(features())
  together = score(x_TX, jnp.asarray(IDS_T))
  for t in range(4):
    alone = score(x_TX[t : t + 1], jnp.asarray(IDS_T[t : t + 1]))
    np.testing.assert_allclose(alone[0], together[t], rtol=1e-4, atol=1e-6)


def test_equal_tokens_hash_equally_whatever_their_features() -> None:
  graphdef, params = make('hash', bias=False)
  score = nnx.merge(graphdef, jax.tree.map(jnp.float32, params))
  logits = np.asarray(score(jnp.float32(features()), jnp.asarray(IDS_T)))
  np.testing.assert_array_equal(logits[0], logits[3])
  assert np.abs(logits[0] - logits[1]).max() > 0
