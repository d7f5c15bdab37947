"""The routers of examples/routers.py against their papers, in float64 numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.experts.dispatch import dropless
from moe_jax.experts.mlp import SwiGLUExperts
from moe_jax.routing import balance
from moe_jax.routing.gates import Gate, GateContext, GateOptions
from moe_jax.routing.selection import (
  SELECTIONS,
  Routing,
  Select,
  SelectOptions,
)
from tests.helpers import dense_experts, examples, gradients
from tests.helpers.routing_oracles import f64, softmax

X, N, V, T = 5, 6, 130, 40
OPTIONS = GateOptions(X, N, V, 7, 3, False, 0, 0.5, 0.5)
IDS_T = np.random.default_rng(3).integers(0, V, T)
KEY = jax.random.key(7)


@pytest.fixture(autouse=True, scope='module')
def own_names() -> Any:
  with examples.registered_here():
    yield


@pytest.fixture(autouse=True)
def float64() -> Any:
  with jax.enable_x64(True):
    yield


def context(rng: jax.Array | None = None) -> GateContext:
  return GateContext(jnp.asarray(IDS_T), jnp.ones(T, bool), jnp.int32(3), rng)


def features() -> np.ndarray:
  return np.random.default_rng(2).standard_normal((T, X))


def gate(name: str) -> tuple[nnx.GraphDef, Any]:
  made = getattr(examples.routers(), name)(OPTIONS, rngs=nnx.Rngs(params=0))
  return nnx.graphdef(made), nnx.to_pure_dict(nnx.state(made, nnx.Param))


def choose(select: Select, logits_TN: Any) -> Routing:
  return select(jnp.asarray(logits_TN))


def test_noisy_top_k_adds_noise_in_training_alone() -> None:
  """Shazeer et al. eq. 4, with the noise that the key stands for."""
  graphdef, params = gate('NoisyTopK')
  assert not params['noise_XN'].any()  # "all zeros", section 3.3
  params = gradients.random_like(params)
  noise_TN = np.asarray(jax.random.normal(KEY, (T, N)))

  def expected(tree: Any, _: Any) -> np.ndarray:
    weights = f64(tree['params'])
    softplus_TN = np.log1p(np.exp(tree['x_TX'] @ weights['noise_XN']))
    return tree['x_TX'] @ weights['weight_XN'] + noise_TN * softplus_TN

  def ours(tree: Any) -> jax.Array:
    return nnx.merge(graphdef, tree['params'])(tree['x_TX'], context(KEY))

  tree = {'params': params, 'x_TX': features()}
  gradients.check(ours, expected, tree, rtol=1e-6)
  quiet = nnx.merge(graphdef, params)(jnp.asarray(features()), context())
  np.testing.assert_allclose(quiet, features() @ params['weight_XN'])


def test_noisy_top_k_gates_are_a_softmax_of_the_k_best() -> None:
  """Shazeer et al. eq. 3 and 5."""
  logits_TN = np.random.default_rng(0).standard_normal((T, N))
  options = SelectOptions(N, 2, weights='chosen')
  routing = choose(SELECTIONS['top_k'](options), logits_TN)
  kept_TN = np.where(
    logits_TN >= np.sort(logits_TN)[:, -2:-1], logits_TN, -np.inf
  )
  gates_TN = np.zeros((T, N))
  rows_T1 = np.arange(T)[:, None]
  gates_TN[rows_T1, routing.indices_TK] = routing.weights_TK
  np.testing.assert_allclose(gates_TN, softmax(kept_TN), rtol=1e-6)


def test_a_token_is_routed_to_the_experts_that_it_sees() -> None:
  """MaskMoE: a rare token sees one expert, a frequent one several."""
  graphdef, params = gate('MaskGate')
  visible_VN = np.asarray(params['fixed_visible_VN']) > 0
  frequent_V = np.isin(np.arange(V), [*examples.routers().MaskGate.frequent])
  np.testing.assert_array_equal(visible_VN.sum(1), np.where(frequent_V, 4, 1))
  assert visible_VN.any(0).all()  # of all experts some token sees each

  def masked(logits_TN: Any) -> np.ndarray:
    return np.where(visible_VN[IDS_T], logits_TN, -np.inf)

  made: Gate = nnx.merge(graphdef, params)
  found = made(jnp.asarray(features()), context())
  expected_TN = masked(features() @ np.asarray(params['weight_XN']))
  np.testing.assert_allclose(found, expected_TN, rtol=1e-6)

  options = SelectOptions(N, 2, masked=made.masks)
  routing = choose(SELECTIONS['top_k'](options), found)
  for t, probabilities_N in enumerate(softmax(expected_TN)):
    best = np.argsort(-probabilities_N)[:2]
    best = best[probabilities_N[best] > 0]
    p = probabilities_N[best]
    np.testing.assert_array_equal(routing.indices_TK[t, : len(best)], best)
    np.testing.assert_array_equal(routing.indices_TK[t, len(best) :], N)
    np.testing.assert_allclose(
      routing.weights_TK[t, : len(best)], p / p.sum(), rtol=1e-6
    )


def test_a_mask_leaves_finite_gradients() -> None:
  graphdef, params = gate('MaskGate')
  select = SELECTIONS['top_k'](SelectOptions(N, 2, masked=True))

  def total(params: Any) -> jax.Array:
    logits_TN = nnx.merge(graphdef, params)(jnp.asarray(features()), context())
    routing = select(logits_TN)
    load = balance.load_of(
      routing, jnp.ones((1, T), bool), jnp.int32(0), select
    )
    losses = balance.balance_loss(load) + balance.z_loss(load)
    return (routing.weights_TK**2).sum() + losses

  found = jax.grad(total)(params)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
  assert np.abs(found['weight_XN']).max() > 0


def null_routing(logits_TN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """AdaMoE's weights of true experts [T, N], and the choices [T, N + null]."""
  p = softmax(logits_TN)
  chosen = np.zeros(p.shape, bool)
  np.put_along_axis(chosen, np.argsort(-p, 1)[:, :4], True, 1)
  weights = np.where(chosen, p, 0)[:, :N]
  sums = weights.sum(1, keepdims=True)
  return weights / np.where(sums > 0, sums, 1), chosen


def test_null_experts_compute_nothing() -> None:
  """AdaMoE: weights of true experts sum to 1, null ones contribute 0."""
  select = examples.routers().NullExperts(SelectOptions(N, 4))
  num_null = select.num_logits - N
  assert num_null == 8
  rng = np.random.default_rng(0)
  size = dense_experts.T
  logits_TN = rng.standard_normal((size, select.num_logits))
  logits_TN[0, N : N + 4] += 9  # this token has no true expert
  weights_TN, chosen = null_routing(logits_TN)
  assert not weights_TN[0].any()

  problem = dense_experts.problem(dense_experts.varied, N, 2)
  up_ND2F, down_NFD = (problem.params[k] for k in ('gate_up_ND2F', 'down_NFD'))
  expected_TD = np.zeros(problem.x.shape)
  for n in range(N):
    gate_TF, up_TF = np.einsum('TD,DgF->gTF', problem.x, up_ND2F[n])
    hidden_TF = gate_TF / (1 + np.exp(-gate_TF)) * up_TF
    expected_TD += weights_TN[:, n : n + 1] * (hidden_TF @ down_NFD[n])

  routing = choose(select, logits_TN)
  experts = SwiGLUExperts(
    N, dense_experts.D, dense_experts.F, init_std=1.0, rngs=nnx.Rngs(params=0)
  )
  nnx.update(experts, jax.tree.map(jnp.asarray, problem.params))
  y_TD = dropless(jnp.asarray(problem.x), routing.among(N), experts).y_TD
  gradients.close(y_TD, expected_TD, 1e-6, 'y')
  np.testing.assert_array_equal(
    (np.asarray(routing.indices_TK)[..., None] == np.arange(N + 8)).any(1),
    chosen,
  )


def test_null_experts_share_their_load() -> None:
  """AdaMoE's balance loss: f of a null expert is the mean over them."""
  select = examples.routers().NullExperts(SelectOptions(N, 4))
  logits_TN = np.random.default_rng(1).standard_normal((T, select.num_logits))

  def expected(logits_TN: np.ndarray, before_TN: np.ndarray) -> np.ndarray:
    _, chosen = null_routing(before_TN)
    f_N = chosen.mean(0)
    f_N[N:] = f_N[N:].mean()
    return np.array(len(f_N) * (f_N * softmax(logits_TN).mean(0)).sum())

  def ours(logits_TN: jax.Array) -> jax.Array:
    load = balance.load_of(
      select(logits_TN), jnp.ones((1, T), bool), jnp.int32(0), select
    )
    return balance.balance_loss(load)

  # Sums of the load are float32, whatever the logits.
  gradients.check(ours, expected, logits_TN, rtol=1e-5)
