"""Every way to choose and weigh experts against float64 numpy."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing.selection import Routing, Select, TopK, TopP
from tests.helpers import gradients, tiny
from tests.helpers.choosing import Selection, select
from tests.helpers.marks import fast_only

N = 8
WEIGHTS = ['softmax', 'chosen', 'sigmoid']
PLAIN = Selection(top_k=3)

# What a token may choose from: everything, some groups, not its best experts.
LIMITS = {
  'all': {},
  'groups': {'groups': 4, 'top_groups': 2},
  'one group': {'groups': 2, 'top_groups': 1},
  'groups of one': {'groups': 8, 'top_groups': 5},
  'best disabled': {'disable_top': 1},
  'best two disabled, groups': {
    'disable_top': 2,
    'groups': 4,
    'top_groups': 3,
  },
}
PICKS = {
  'top 1': {'top_k': 1},
  'top 3': {'top_k': 3},
  'top p': {'selection': 'top_p', 'top_p': 0.4},
  'top p 0': {'selection': 'top_p', 'top_p': 0.0},
}
# Sigmoid scores do not sum to 1, so a bound on their sum is refused.
PAIRS = [
  (pick, weights)
  for pick, weights in itertools.product(PICKS, WEIGHTS)
  if weights != 'sigmoid' or 'top_k' in PICKS[pick]
]


def make(how: Selection, bias_N: Any = None) -> Select:
  top_k = how.selection == 'top_k'
  made = tiny.select(
    N,
    pick=TopK(how.top_k) if top_k else TopP(how.top_p),
    weights=how.weights,
    renormalize=how.renormalize,
    groups=how.groups,
    top_groups=how.top_groups,
    disable_top=how.disable_top,
    biased=bias_N is not None,
  )
  if bias_N is not None:
    made.choice_bias_N[...] = jnp.asarray(bias_N)
  return made


def logits(tokens: int = 40, scale: float = 1.5) -> np.ndarray:
  return scale * np.random.default_rng(0).standard_normal((tokens, N))


def agree(routing: Routing, how: Selection, logits_TN: Any, bias: Any) -> None:
  """The slots' order is ours; unused ones are marked and weigh nothing."""
  indices = np.full(routing.indices_TK.shape, N)
  weights = np.zeros(routing.weights_TK.shape)
  probabilities = np.zeros(routing.probabilities_TN.shape)
  for t, logits_N in enumerate(np.asarray(logits_TN, np.float64)):
    expected = select(logits_N, how, 0.0 if bias is None else bias)
    used = len(expected.experts)
    indices[t, :used] = expected.experts
    weights[t, :used] = expected.weights
    probabilities[t] = expected.probabilities_N
  np.testing.assert_array_equal(routing.indices_TK, indices)
  np.testing.assert_allclose(routing.weights_TK, weights, rtol=1e-6)
  np.testing.assert_allclose(routing.probabilities_TN, probabilities, rtol=2e-6)


@pytest.mark.parametrize('renormalize', fast_only([False], [True, False]))
@pytest.mark.parametrize(('pick', 'weights'), PAIRS)
def test_choice_and_weights(pick: str, weights: str, renormalize: bool) -> None:
  """Under every limit, with and without a bias on the choice."""
  with jax.enable_x64(True):
    for limit, bias in itertools.product(LIMITS.values(), (None, bias_N())):
      how = Selection(
        **PICKS[pick] | limit, weights=weights, renormalize=renormalize
      )
      agree(make(how, bias)(jnp.asarray(logits())), how, logits(), bias)


def bias_N() -> np.ndarray:
  """Large enough to change most choices."""
  return np.array([0.0, 0.3, -0.2, 0.1, 0.5, -0.4, 0.2, 0.0])


@pytest.mark.parametrize('renormalize', fast_only([False], [True, False]))
@pytest.mark.parametrize(('pick', 'weights'), PAIRS)
def test_gradients(pick: str, weights: str, renormalize: bool) -> None:
  """Of the weights and of the probabilities, while the choice stays."""
  how = Selection(
    **PICKS[pick] | LIMITS['groups'], weights=weights, renormalize=renormalize
  )

  def dense(indices: Any, weights: Any, probabilities: Any, np_: Any) -> Any:
    chosen = (np_.arange(N)[:, None] == indices) * weights
    return np_.concatenate([chosen.sum(-1), probabilities])

  def expected(logits_TN: Any, _: Any) -> np.ndarray:
    tokens = [select(row, how, bias_N()) for row in logits_TN]
    return np.stack(
      [
        dense(np.array(t.experts), t.weights, t.probabilities_N, np)
        for t in tokens
      ]
    )

  with jax.enable_x64(True):
    module = make(how, bias_N())

    def ours(logits_TN: jax.Array) -> jax.Array:
      routing = module(logits_TN)
      return jax.vmap(lambda *token: dense(*token, jnp))(
        routing.indices_TK, routing.weights_TK, routing.probabilities_TN
      )

    gradients.check(ours, expected, logits(6), rtol=1e-6)


def test_groups_by_hand() -> None:
  """Two groups of four by sigmoid scores: 1.5 beats 1.0 + tiny beats none."""
  # sigmoid: [0.75, 0.75, ~0, ~0 | ~1, ~0, ~0, ~0]: 1.5 against 1.
  near, far = float(np.log(3.0)), 20.0
  row = [[near, near, -far, -far, far, -far, -far, -far]]
  how = Selection(top_k=2, weights='sigmoid', groups=2, top_groups=1)
  routing = make(how)(jnp.array(row))
  np.testing.assert_array_equal(routing.indices_TK, [[0, 1]])
  np.testing.assert_allclose(routing.weights_TK, [[0.5, 0.5]], rtol=1e-6)
  # A bias of -0.3 on the first: 0.45 + 0.75 still wins, in the other order ...
  biased = make(how, [-0.3, 0, 0, 0, 0, 0, 0, 0])(jnp.array(row))
  np.testing.assert_array_equal(biased.indices_TK, [[1, 0]])
  np.testing.assert_allclose(biased.weights_TK, [[0.5, 0.5]], rtol=1e-6)
  # ... and one of -0.6 makes 0.15 + 0.75 < 1: the other group.
  biased = make(how, [-0.6, 0, 0, 0, 0, 0, 0, 0])(jnp.array(row))
  np.testing.assert_array_equal(biased.indices_TK, [[4, 5]])


def test_top_p_by_hand() -> None:
  """Probabilities 0.3, 0.2, ...: 0.4 is exceeded by two, 0.55 by three."""
  p = np.array([0.1, 0.3, 0.05, 0.2, 0.15, 0.05, 0.05, 0.1])
  for bound, kept in ((0.29, [1]), (0.4, [1, 3]), (0.55, [1, 3, 4])):
    how = Selection(selection='top_p', top_p=bound, renormalize=False)
    routing = make(how)(jnp.log(p)[None])
    unused = [N] * (N - len(kept))
    np.testing.assert_array_equal(routing.indices_TK[0], kept + unused)
    np.testing.assert_allclose(
      routing.weights_TK[0, : len(kept)], p[kept], rtol=1e-6
    )


@pytest.mark.parametrize('weights', WEIGHTS)
def test_of_equals_the_lower_index(weights: str) -> None:
  how = dataclasses.replace(PLAIN, weights=weights)
  routing = make(how)(jnp.zeros((1, N)))
  np.testing.assert_array_equal(routing.indices_TK, [[0, 1, 2]])
  grouped = dataclasses.replace(how, groups=4, top_groups=2)
  routing = make(grouped)(jnp.zeros((1, N)))
  np.testing.assert_array_equal(routing.indices_TK, [[0, 1, 2]])
  without = dataclasses.replace(how, disable_top=2)
  routing = make(without)(jnp.zeros((1, N)))
  np.testing.assert_array_equal(routing.indices_TK, [[2, 3, 4]])


@pytest.mark.parametrize('bias', [None, 10.0 * np.arange(N)])
@pytest.mark.parametrize(('pick', 'weights'), PAIRS)
def test_extreme_logits(pick: str, weights: str, bias: Any) -> None:
  """At +-1e4 every number and every gradient is finite, the sums as ever.

  A bias on the choice brings in experts that have no weight at all.
  """
  how = Selection(**PICKS[pick], weights=weights)
  signs = np.sign(logits(9))
  signs[0], signs[1] = 1, -1
  extreme = jnp.float32(1e4 * signs)

  def total(logits_TN: jax.Array) -> tuple[jax.Array, Routing]:
    routing = make(how, bias)(logits_TN)
    watched = routing.weights_TK[:, 0] + routing.probabilities_TN[:, 1]
    return watched.sum(), routing

  gradient, routing = jax.grad(total, has_aux=True)(extreme)
  for leaf in jax.tree.leaves((gradient, routing)):
    assert np.isfinite(leaf).all()
  np.testing.assert_allclose(routing.probabilities_TN.sum(-1), 1.0, rtol=1e-6)
  assert (routing.weights_TK >= 0).all()
  assert (routing.weights_TK.sum(-1) <= 1 + 1e-6).all()


@pytest.mark.parametrize('weights', WEIGHTS)
def test_permuted_experts_are_chosen_permuted(weights: str) -> None:
  how = dataclasses.replace(PLAIN, weights=weights)
  order = np.random.default_rng(3).permutation(N)
  plain = make(how, bias_N())(jnp.float32(logits()))
  permuted = make(how, bias_N()[order])(jnp.float32(logits()[:, order]))
  np.testing.assert_array_equal(order[permuted.indices_TK], plain.indices_TK)
  np.testing.assert_allclose(permuted.weights_TK, plain.weights_TK, rtol=1e-5)


def test_a_bias_moves_the_choice_and_never_the_weights() -> None:
  how = dataclasses.replace(PLAIN, top_k=N, renormalize=False)
  plain = make(how)(jnp.float32(logits()))
  biased = make(how, bias_N())(jnp.float32(logits()))
  assert (plain.indices_TK != biased.indices_TK).any()
  found = np.take_along_axis(
    np.asarray(plain.probabilities_TN), np.asarray(biased.indices_TK), -1
  )
  np.testing.assert_array_equal(biased.weights_TK, found)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(('pick', 'weights'), PAIRS)
def test_a_broken_token_breaks_no_other(
  pick: str, weights: str, bad: float
) -> None:
  """Its experts are experts all the same, and the rest is as without it."""
  how = Selection(**PICKS[pick] | LIMITS['groups'], weights=weights)
  broken = np.float32(logits())
  broken[7, 2] = bad
  found = make(how)(jnp.asarray(broken))
  plain = make(how)(jnp.float32(logits()))
  others = np.arange(len(broken)) != 7
  for ours, expected in zip(
    jax.tree.leaves(found), jax.tree.leaves(plain), strict=True
  ):
    np.testing.assert_array_equal(ours[others], expected[others])
  indices = np.asarray(found.indices_TK[7])
  assert ((indices >= 0) & (indices <= N)).all()
  real = indices[indices < N]
  assert len(set(real.tolist())) == len(real)


@pytest.mark.parametrize('weights', WEIGHTS)
def test_an_expert_at_minus_infinity_is_not_chosen(weights: str) -> None:
  how = dataclasses.replace(PLAIN, weights=weights)
  masked = np.float32(logits())
  masked[:, 2] = -np.inf
  routing = make(how)(jnp.asarray(masked))
  assert (np.asarray(routing.indices_TK) != 2).all()
  for leaf in (routing.weights_TK, routing.probabilities_TN):
    assert np.isfinite(leaf).all()
