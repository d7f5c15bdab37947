"""A dense model made into a Mixture of Experts starts at the dense loss."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from moe_jax.errors import UserError
from moe_jax.interop import released
from moe_jax.interop import upcycle as upcycle_lib
from tests.helpers import tiny
from tests.helpers.marks import fast_only

WIDTH = 48  # of the dense network
COPIES = {'moe.expert_width': WIDTH}
HALVES = {'moe.expert_width': WIDTH // 2}
QUARTERS = {'moe.expert_width': WIDTH // 4, 'moe.top_k': 4}
CARTESIAN = {'moe.expert_width': WIDTH, 'moe.factors': 2}


def shared(mixing: str, width: int, **more: Any) -> dict:
  keys = {'mixing': mixing, 'width': width} | more
  return {f'moe.shared.{key}': value for key, value in keys.items()}


EXACT = {
  'copies': COPIES,
  'copies, top-1 of the chosen': COPIES
  | {'moe.top_k': 1, 'router.weights': 'chosen'},
  'copies, recurrent': COPIES | {'router.recurrent': 'gru'},
  'copies, sigmoid renormalised': COPIES | {'router.weights': 'sigmoid'},
  'copies, top-p renormalised': COPIES | {'router.selection': 'top_p'},
  'wider than the network': {'moe.expert_width': WIDTH + 5},
  'halves': HALVES,
  'parts that do not divide it': {'moe.expert_width': 20, 'moe.top_k': 3}
  | {'moe.num_experts': 6},
  'quarters by cosine': QUARTERS | {'router.score': 'cosine'},
  'quarters by a deep score, biased': QUARTERS
  | {'router.score': 'mlp', 'router.bias': True},
  'halves by a hypernetwork': HALVES | {'router.score': 'hyper'},
  'halves by a hash': HALVES | {'router.score': 'hash'},
  'halves, grouped experts': HALVES
  | {'router.groups': 4, 'router.top_groups': 2},
  'halves, residual scores': HALVES | {'router.residual': 0.5},
  'every second layer': HALVES | {'moe.every': 2, 'moe.offset': 1},
  'shared, summed': COPIES | shared('sum', WIDTH),
  'shared, summed, narrow': HALVES | shared('sum', 20),
  'shared, fixed': COPIES
  | shared('fixed', WIDTH, routed_weight=0.3, shared_weight=0.9),
  'shared, fixed, narrow': HALVES | shared('fixed', 12, routed_weight=0.25),
  'shared, coefficients': COPIES | shared('coefficient', WIDTH),
  'shared, coefficients, two parts': QUARTERS
  | shared('coefficient', WIDTH // 2, parts=2),
  'bias': COPIES | {'moe.bias': True},
  'balancing bias': HALVES | {'loss.bias_rate': 0.01},
  'Cartesian': CARTESIAN,
  'Cartesian of copies, shared': {'moe.factors': 2}
  | {'moe.expert_width': 2 * WIDTH}
  | shared('sum', 2 * WIDTH),
  'Cartesian, shared': CARTESIAN | shared('coefficient', WIDTH),
  'Cartesian, recurrent, three factors': {'moe.factors': 3}
  | {'moe.expert_width': 3 * WIDTH, 'router.recurrent': 'rnn'},
}
# RMoE's enwik8 backbone, whose networks have biases.
SPAN = {
  'model.norm': 'layer',
  'model.norm_place': 'post',
  'model.positions': 'span',
  'model.span': 5,
  'model.activation': 'relu',
  'model.head_bias': True,
}
INEXACT = {
  'a lone probability': (
    COPIES | {'moe.top_k': 1},
    r"do not sum to 1 \(router.weights = 'softmax'",
  ),
  'raw probabilities': (
    COPIES | {'moe.renormalize': False},
    r'moe.renormalize = False.* as if they summed to 0\.25',
  ),
  'raw top-p': (
    COPIES | {'router.selection': 'top_p', 'moe.renormalize': False},
    r'summed to 0\.5',
  ),
  'cut copies': (
    {'moe.expert_width': WIDTH // 4, 'moe.top_k': 2},
    'a copy of the dense network is 4 experts, and moe.top_k = 2',
  ),
  'halves by top-p': (HALVES | {'router.selection': 'top_p'}, 'is 2 experts'),
  'a second norm': (SPAN | CARTESIAN, "norm_place = 'post'"),
  'capacity': (COPIES | {'moe.dispatch': 'capacity'}, 'may drop rows'),
}


BIASED = {
  'copies': COPIES | {'router.bias': True, 'router.weights': 'chosen'},
  'halves, shared, fixed': HALVES | shared('fixed', 20, routed_weight=0.8),
  'quarters, shared, parts': QUARTERS
  | shared('coefficient', WIDTH // 2, parts=2),
}


def target(changes: dict) -> ConfigDict:
  return tiny.config(**({'model.vocab_size': tiny.VOCAB} | changes))


def dense(backbone: dict | None = None) -> tuple[ConfigDict, dict[str, Any]]:
  size = {'moe.num_experts': 0, 'model.ffn_width': WIDTH}
  config = target(size | (backbone or {}))
  return config, jax.tree.map(np.asarray, tiny.decoder(config)[1])


def upcycled(
  config: ConfigDict, backbone: dict | None = None
) -> dict[str, Any]:
  _, fresh = tiny.decoder(config, seed=7)
  dense_config, dense_params = dense(backbone)
  params = upcycle_lib.upcycle(
    dense_config,
    traverse_util.flatten_dict(dense_params),
    config,
    traverse_util.flatten_dict(jax.tree.map(np.asarray, fresh)),
  )
  return traverse_util.unflatten_dict(params)


def loss(config: ConfigDict, params: Any) -> jax.Array:
  ids = np.random.default_rng(0).integers(tiny.VOCAB, size=(2, 12))
  ids = jnp.asarray(ids, jnp.int32)
  logits = released.run(config, params, ids)
  return optax.softmax_cross_entropy_with_integer_labels(
    logits[:, :-1], ids[:, 1:]
  ).mean()


@pytest.fixture(scope='module')
def dense_loss() -> float:
  return float(loss(*dense()))


QUICK = ('Cartesian, shared',)


@pytest.mark.slow
@pytest.mark.parametrize('name', fast_only(QUICK, EXACT))
def test_the_loss_is_the_dense_models(name: str, dense_loss: float) -> None:
  config = target(EXACT[name])
  assert not upcycle_lib.inexact(config, WIDTH)
  np.testing.assert_allclose(
    loss(config, upcycled(config)), dense_loss, rtol=1e-5
  )


@pytest.mark.slow
@pytest.mark.parametrize('name', BIASED)
def test_networks_with_biases_in_another_backbone(name: str) -> None:
  config = target(SPAN | BIASED[name])
  assert not upcycle_lib.inexact(config, WIDTH)
  np.testing.assert_allclose(
    loss(config, upcycled(config, SPAN)), loss(*dense(SPAN)), rtol=1e-5
  )


@pytest.mark.parametrize('name', INEXACT)
def test_what_is_not_exact_is_said(name: str) -> None:
  changes, message = INEXACT[name]
  with pytest.raises(AssertionError, match=message):
    reasons = upcycle_lib.inexact(target(changes), WIDTH)
    raise AssertionError('; '.join(reasons))


@pytest.mark.slow
def test_what_is_not_exact_differs(dense_loss: float) -> None:
  config = target(INEXACT['cut copies'][0])
  difference = abs(loss(config, upcycled(config)) - dense_loss)
  assert 1e-4 < difference < 1


@pytest.mark.slow
def test_experts_hold_parts_of_the_network_and_learn() -> None:
  config = target(CARTESIAN)
  params = upcycled(config)
  ids = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]], jnp.int32)

  def total(params: Any) -> jax.Array:
    return jnp.square(released.run(config, params, ids)).mean()

  gradient = jax.jit(jax.grad(total))(params)
  first, second = (
    gradient['periods']['blocks'][0]['chain']['sub_layers'][s] for s in (0, 1)
  )
  for experts in (first['experts'], {'down': second['experts']['down_NFD']}):
    for leaf in experts.values():
      assert np.abs(leaf).max() > 0
  assert np.abs(first['router']['score']['weight_XN']).max() > 0


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'model.hidden_size': 64, 'model.num_heads': 8},
      'model.hidden_size = 64, but .* has 32',
    ),
    ({'model.vocab_size': 62}, 'model.vocab_size = 62, but .* has 61'),
    ({'moe.num_experts': 0}, 'moe.num_experts = 0: .*dense'),
    ({'moe.every': 2, 'model.ffn_width': 44}, 'model.ffn_width = 44'),
    (
      shared('fixed', 12, routed_weight=0.0),
      'moe.shared.routed_weight = 0.0 .* no way for the 48 hidden units',
    ),
  ],
)
def test_other_differences_are_refused(changes: dict, message: str) -> None:
  config = target(changes)
  with pytest.raises(UserError, match=message):
    upcycle_lib.upcycle(*dense(), config, {})


def test_a_model_with_experts_is_no_dense_one() -> None:
  config = target({})
  with pytest.raises(UserError, match='--dense has experts already'):
    upcycle_lib.upcycle(config, {}, config, {})
