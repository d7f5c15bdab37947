"""Released checkpoints give the released code's numbers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.interop import canonical, hf
from moe_jax.routing import balance
from tests.helpers.released import LAYOUTS, RELEASED, both, shape_of_model


def reference(name: str) -> Mapping[str, np.ndarray]:
  return np.load(RELEASED / name / 'reference.npz')


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
  """The largest difference, relative to the largest reference value."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape
  return float(abs(ours - theirs).max() / abs(theirs).max())


def model(config: ConfigDict, params: Any) -> nnx.Module:
  return nnx.merge(nnx.graphdef(shape_of_model(config)), params)


def cross_entropy(config: ConfigDict, ids: jax.Array, params: Any) -> jax.Array:
  """Mean over all next tokens."""
  logits = model(config, params)(ids, jnp.ones(ids.shape, bool)).logits_BLV
  return optax.softmax_cross_entropy_with_integer_labels(
    logits[:, :-1], ids[:, 1:]
  ).mean()


@both
def test_logits(name: str) -> None:
  expected = reference(name)
  logits = hf.logits(RELEASED / name, expected['input_ids'])
  assert logits.dtype == jnp.float32
  assert error(logits, expected['logits']) < 1e-4


@both
def test_cross_entropy(name: str) -> None:
  expected = reference(name)
  config, params = hf.load(RELEASED / name)
  loss = cross_entropy(config, jnp.asarray(expected['input_ids']), params)
  np.testing.assert_allclose(loss, expected['cross_entropy'], rtol=1e-5)


def test_router_logits_and_auxiliary_loss() -> None:
  expected = reference('rmoe_gru')
  config, params = hf.load(RELEASED / 'rmoe_gru')
  ids = jnp.asarray(expected['input_ids'])
  output = model(config, params)(
    ids, jnp.ones(ids.shape, bool), keep=lambda aux: aux
  )
  aux = output.aux
  for layer in range(config.model.num_layers):
    [logits_TN] = aux.routing.logits_TN[layer]
    assert error(logits_TN, expected[f'router_logits_{layer}']) < 1e-3
  assert config.loss.balance_layers == 'joined'
  loss = balance.balance_loss(balance.joined(aux.load))
  np.testing.assert_allclose(loss, expected['aux_loss'], rtol=1e-3)


@pytest.mark.slow
def test_gradients() -> None:
  expected = reference('rmoe_gru')
  config, params = hf.load(RELEASED / 'rmoe_gru')
  ids = jnp.asarray(expected['input_ids'])
  gradient = jax.jit(jax.grad(lambda p: cross_entropy(config, ids, p)))(params)
  ours = hf.to_released(gradient, config, 'rmoe')
  names = [key for key in expected if key.startswith('grad/')]
  assert len(names) == 33
  for name in names:
    assert error(ours[name.removeprefix('grad/')], expected[name]) < 1e-3, name


@both
def test_what_was_loaded_is_released_again_unchanged(name: str) -> None:
  config, params = hf.load(RELEASED / name)
  ours = hf.to_released(params, config, LAYOUTS[name])
  theirs = load_file(RELEASED / name / 'model.safetensors')
  assert ours.keys() == theirs.keys()
  for tensor in theirs:
    np.testing.assert_array_equal(ours[tensor], theirs[tensor])


@pytest.mark.parametrize('section', ['model', 'moe', 'router', 'loss'])
def test_the_canonical_values_are_of_the_keys_that_there_are(
  section: str,
) -> None:
  schema = config_lib.flatten(config_lib.get_config()[section].to_dict())
  ours = config_lib.flatten(canonical.CANONICAL[section])
  assert {key: type(value) for key, value in ours.items()} == {
    key: type(value) for key, value in schema.items()
  }


def test_a_parameter_without_a_released_name_is_refused() -> None:
  config, params = hf.load(RELEASED / 'rmoe_gru')
  with pytest.raises(UserError, match="'cartesian' has no tensor for cell/"):
    hf.to_released(params, config, 'cartesian')


@pytest.mark.parametrize(
  ('ids', 'message'),
  [
    ([1, 2], r'shape \(2,\)'),
    ([[[1]]], r'shape \(1, 1, 1\)'),
    (np.zeros((1, 0), int), r'shape \(1, 0\)'),
    ([[1.0]], 'dtype float64'),
    ([[1], [1, 2]], 'not an array'),
    ([[1, 97]], 'from 1 to 97, .* 0 to 96'),
    ([[-1, 3]], 'from -1 to 3, .* 0 to 96'),
  ],
)
def test_bad_ids_are_refused(ids: Any, message: str) -> None:
  with pytest.raises(UserError, match=message):
    hf.logits(RELEASED / 'cartesian', ids)
