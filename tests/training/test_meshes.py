"""One device and eight train the same: every axis, every router family."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel import multihost
from moe_jax.training.state import Setup
from moe_jax.training.step import make_train_step
from tests.helpers import marks, tiny
from tests.helpers.steps import BOUNDED, EVERY_AXIS, batch, init, setup

MESHES = {
  'data 8': {'data': 8},
  'fsdp 4 x data 2': {'fsdp': 4, 'data': 2},
  'expert 4 x data 2': {'expert': 4, 'data': 2},
  'tensor 2 x fsdp 4': {'tensor': 2, 'fsdp': 4},
}


def losses(made: Setup, steps: int) -> np.ndarray:
  """The losses of the first steps, after each of which all copies agree."""
  train_step, state = make_train_step(made), init(made)
  found = []
  for step in range(steps):
    data = jax.device_put(
      batch(made.config, seed=step), mesh_lib.batch_sharding(made.mesh)
    )
    state, metrics = train_step(state, data)
    multihost.check_replicas({'state': state, 'metrics': metrics})
    found.append(float(metrics['loss']))
  return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize('model', marks.at_first(2, reversed(tiny.MODELS)))
def test_eight_devices_train_like_one(model: str) -> None:
  """20 losses: 1e-5 over the first five, 1e-3 over all (near-ties may flip)."""
  alone = compare(tiny.MODELS[model], MESHES, steps=20)
  assert alone[-1] < alone[0]


@pytest.mark.slow
@pytest.mark.parametrize('factors', [1, 2])
def test_every_axis_at_once_trains_like_one_device(factors: int) -> None:
  model = BOUNDED | {'moe.factors': factors}
  compare(model, {'every axis': EVERY_AXIS}, steps=5)


@pytest.mark.slow
def test_copies_agree_where_tokens_are_dropped_and_biases_balance() -> None:
  """What is summed over devices by hand: loads, drops and the biases."""
  values = {'moe.dispatch': 'capacity', 'loss.bias_rate': 0.01}
  config = tiny.config(**tiny.MODELS['cartesian rmoe'], **values)
  losses(setup(config, data=2, expert=2, tensor=2), steps=3)


def compare(
  overrides: dict[str, Any], meshes: dict[str, dict[str, int]], steps: int
) -> np.ndarray:
  config = tiny.config(**overrides)
  alone = losses(setup(config), steps)
  for name, axes in meshes.items():
    together = losses(setup(config, **axes), steps)
    np.testing.assert_allclose(together[:5], alone[:5], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(together, alone, rtol=1e-3, err_msg=name)
  return alone


def test_parameters_and_moments_are_split() -> None:
  made = setup(
    tiny.config(**tiny.MODELS['cartesian rmoe']), fsdp=2, expert=2, tensor=2
  )
  state = init(made)

  def specs(tree: dict) -> dict[str, P]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {str(path[-1].key): leaf.sharding.spec for path, leaf in leaves}

  expected = {
    'gate_up_ND2F': P(None, 'expert', 'fsdp', None, 'tensor'),
    'down_NFD': P(None, 'expert', 'tensor', 'fsdp'),
    'query_DHA': P(None, 'fsdp', 'tensor', None),
    'input_X3R': P(None, None, None),
    'weight_XN': P(None, None, None),
  }
  assert expected.items() <= specs(state['params']).items()
  assert (
    expected.items() <= specs(optax.tree.get(state['opt_state'], 'mu')).items()
  )
  layer = state['params']['periods']['blocks'][0]['chain']['sub_layers'][0]
  shard = layer['experts']['gate_up_ND2F'].addressable_shards[0].data
  assert shard.shape == (2, 8 // 2, 32 // 2, 2, 12 // 2)


@pytest.mark.parametrize(
  'platform', ['tpu', pytest.param('cuda', marks=pytest.mark.slow)]
)
def test_train_step_lowers_for_accelerators(platform: str) -> None:
  """What lowers on CPU alone cannot land."""
  config = tiny.config(
    **tiny.MODELS['cartesian rmoe'],
    **{
      'model.dtype': 'bfloat16',
      'model.remat': 'full',
      'moe.exchange': 'ragged',
      'moe.grouped_matmul': 'ragged_dot',
    },
  )
  made = setup(config, expert=2, data=2, tensor=2)
  data = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch(config)
  )
  # A custom call of JAX's own that it does not promise to know for ever.
  ragged = jax.export.DisabledSafetyCheck.custom_call('ragged_all_to_all')
  exported = jax.export.export(
    make_train_step(made), platforms=[platform], disabled_checks=[ragged]
  )(made.abstract, data)
  text = exported.mlir_module()
  assert exported.platforms == (platform,)
  assert 'ragged_dot' in text
  # Of two sub-layers there, back, computed again, and both gradients.
  assert text.count('@ragged_all_to_all(') == 2 * 6
