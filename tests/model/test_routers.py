"""Routers inside the decoder against the oracle: logits and gradients.

What passes from layer to layer (states, logits, with and without their
gradient) is only seen here, over several MoE sub-layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.model.decoder import Decoder
from tests.helpers import gradients, oracle, tiny

CASES = {
  's-proj gru': {'router.recurrent': 'gru', 'router.projector': 'shared'},
  'rnn, cartesian': {'router.recurrent': 'rnn', 'moe.factors': 2},
  'lstm, cartesian': {'router.recurrent': 'lstm', 'moe.factors': 2},
  's-proj lstm': {'router.recurrent': 'lstm', 'router.projector': 'shared'},
  'gru np': {'router.recurrent': 'gru', 'router.passing': 'none'},
  'gru detached': {'router.recurrent': 'gru', 'router.passing': 'detached'},
  'lstm detached': {'router.recurrent': 'lstm', 'router.passing': 'detached'},
  'residual': {'router.residual': 0.5, 'moe.factors': 2},
  'residual detached': {
    'router.residual': 1.0,
    'router.residual_detached': True,
    'moe.factors': 2,
  },
  'gru np residual, every second layer': {
    'router.recurrent': 'gru',
    'router.passing': 'none',
    'router.residual': 0.5,
    'moe.every': 2,
    'model.num_layers': 4,
  },
  'xmoe gru, three factors': {
    'router.score': 'xmoe',
    'router.recurrent': 'gru',
    'moe.factors': 3,
  },
  'mlp with bias, raw weights': {
    'router.score': 'mlp',
    'router.bias': True,
    'moe.renormalize': False,
  },
  'hyper gru with bias, chosen': {
    'router.score': 'hyper',
    'router.recurrent': 'gru',
    'router.bias': True,
    'router.weights': 'chosen',
  },
  'hash, top p, two shared parts': {
    'router.score': 'hash',
    'router.selection': 'top_p',
    'moe.renormalize': False,
    'moe.shared.width': 16,
    'moe.shared.parts': 2,
    'moe.shared.mixing': 'coefficient',
  },
  'sigmoid in groups, lstm': {
    'router.recurrent': 'lstm',
    'router.weights': 'sigmoid',
    'router.groups': 4,
    'router.top_groups': 2,
    'loss.bias_rate': 0.01,
  },
  'cosine': {'router.score': 'cosine'},
}

SIZES = {
  'model.hidden_size': 8,
  'model.num_heads': 2,
  'model.num_kv_heads': 2,
  'moe.expert_width': 12,
  'router.state_size': 5,
  'router.mlp_width': 6,
  'router.reduced_size': 3,
}


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_logits_and_gradients(name: str) -> None:
  config = tiny.config(**SIZES | CASES[name])
  ids_L = np.array([3, 17, 3, 60, 8])

  def expected(params: Any, before: Any) -> np.ndarray:
    constants = oracle.Sequence(config, before)
    constants.run(ids_L)
    return oracle.Sequence(config, params, constants.routers).run(ids_L)

  graphdef, params = tiny.decoder(config)

  def ours(params: Any) -> jax.Array:
    real_BL = jnp.ones((1, len(ids_L)), bool)
    ids_BL = jnp.asarray(ids_L)[None]
    return nnx.merge(graphdef, params)(ids_BL, real_BL)[0][0]

  # The library in float32: routers and what passes between them always are.
  gradients.check(ours, expected, params, rtol=5e-6)


@pytest.mark.slow
def test_with_the_best_experts_disabled() -> None:
  config = tiny.config(**SIZES | {'moe.factors': 2})
  _, params = tiny.decoder(config)
  ids_BL = np.array([[3, 17, 3, 60, 8]])
  model = nnx.eval_shape(
    lambda: Decoder(
      config, tiny.VOCAB, None, rngs=nnx.Rngs(params=0), disable_top=2
    )
  )
  graphdef = nnx.graphdef(model)
  real_BL = jnp.ones(ids_BL.shape, bool)
  logits = nnx.merge(graphdef, params)(jnp.asarray(ids_BL), real_BL)[0]
  expected = oracle.logits(config, params, ids_BL, disable_top=2)
  plain = oracle.logits(config, params, ids_BL)
  gradients.close(logits, expected, 1e-5, 'logits')
  assert np.abs(expected - plain).max() > 1e-2
