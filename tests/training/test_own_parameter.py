"""A user's own gate, whose parameters say nothing, trains on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax import parameter
from moe_jax.model import sizes
from moe_jax.registry import GATES
from moe_jax.routing.gates import Gate, GateContext, GateOptions
from moe_jax.training.step import make_train_step
from tests.helpers import registries, tiny
from tests.helpers.steps import EVERY_AXIS, batch, init, setup


class GainGate(Gate):
  """A linear gate with a learned gain for every expert."""

  def __init__(self, options: GateOptions, *, rngs: nnx.Rngs):
    shape = options.num_features, options.num_experts
    self.weight_XN = nnx.Param(0.1 * jax.random.normal(rngs.params(), shape))
    self.gain_N = nnx.Param(jnp.ones(options.num_experts))

  def __call__(self, features_TX: jax.Array, context: GateContext) -> jax.Array:
    return features_TX @ self.weight_XN[...] * self.gain_N[...]


@pytest.mark.slow
def test_an_undeclared_parameter_is_whole_undecayed_and_trained(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  registries.forget(monkeypatch, GATES)
  GATES.register('gain')(GainGate)
  config = tiny.config(
    **{
      'router.score': 'gain',
      'optimizer.weight_decay': 100.0,
      'optimizer.warmup_steps': 0,
      'optimizer.learning_rate': 1e-3,
    }
  )
  losses = []
  for axes in ({}, EVERY_AXIS):
    made = setup(config, **axes)
    state, step = init(made), make_train_step(made)
    gains = [
      (leaf, declared)
      for (keys, leaf), declared in zip(
        parameter.flatten(state['params']).items(),
        jax.tree.leaves(made.declarations),
        strict=True,
      )
      if keys[-1] == 'gain_N'
    ]
    for leaf, declared in gains:
      assert leaf.sharding.spec == P(None, None)  # [layers, N]
      assert not declared.decay and declared.matmuls == 0
      assert declared.part == parameter.ROUTER
    state, _ = step(state, batch(config))
    state, metrics = step(state, batch(config))
    losses.append(float(metrics['loss']))
    moved = parameter.flatten(state['params'])
    gain = next(leaf for keys, leaf in moved.items() if keys[-1] == 'gain_N')
    # Decay would have taken a tenth of it in each of the two steps.
    assert 0 < np.abs(np.asarray(gain) - 1).max() < 0.01
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
  counted = sizes.count_parameters(
    config, made.abstract['params'], made.declarations
  )
  num_layers, hidden_size = config.model.num_layers, config.model.hidden_size
  assert counted.router == num_layers * (hidden_size + 1) * 8
