"""The training step on several devices with experts by tokamax's kernels."""

from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.experts import grouped_matmul
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.planning.compiled import abstract_batch
from moe_jax.registry import GROUPED_MATMULS
from moe_jax.training.step import make_train_step
from tests.helpers import registries, tiny
from tests.helpers.steps import EVERY_AXIS, batch, init, setup

pytestmark = pytest.mark.slow

WAYS = [('all_to_all', 'none'), ('gather', 'none'), ('gather', 'dots')]


def config(exchange: str, remat: str, matmul: str) -> Any:
  keys = {
    'model.num_layers': 1,
    'model.remat': remat,
    'moe.factors': 2,
    'moe.exchange': exchange,
    'moe.grouped_matmul': matmul,
  }
  return tiny.config(**keys)


@pytest.mark.parametrize(('exchange', 'remat'), WAYS)
def test_triton_is_traced_for_many_devices(
  exchange: str, remat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Per sub-layer two grouped matmuls with two gradients each, at least."""
  triton = GROUPED_MATMULS['triton']._replace(obstacle=lambda device: None)
  registries.replace(monkeypatch, GROUPED_MATMULS, 'triton', triton)
  made = setup(config(exchange, remat, 'triton'), **EVERY_AXIS)
  traced = make_train_step(made).trace(made.abstract, abstract_batch(made))
  text = str(traced.jaxpr)
  assert text.count('pallas_call[') >= 12
  assert 'ragged_dot_general[' not in text


@pytest.mark.parametrize(('exchange', 'remat'), WAYS)
def test_a_step_is_that_of_one_device(
  exchange: str, remat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  """By what runs on CPU of tokamax, to `blocks` without a mesh."""
  by_xla = grouped_matmul.by_tokamax('xla')
  implementation = by_xla._replace(obstacle=lambda device: None)
  # Under the name of one that a config may ask for on CPU.
  registries.replace(monkeypatch, GROUPED_MATMULS, 'padded', implementation)
  loss, moments = step(config(exchange, remat, 'padded'), EVERY_AXIS)
  expected_loss, expected = step(config(exchange, remat, 'blocks'), {})
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
  for ours, theirs in zip(moments, expected, strict=True):
    atol = 1e-5 * np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, atol=atol)


def step(made_of: Any, axes: dict[str, int]) -> tuple[Any, list[np.ndarray]]:
  """The loss of one step, and Adam's moments after it."""
  made = setup(made_of, **axes)
  data = jax.device_put(batch(made_of), mesh_lib.batch_sharding(made.mesh))
  state, metrics = make_train_step(made)(init(made), data)
  moments = jax.tree.map(np.asarray, jax.tree.leaves(state['opt_state']))
  return metrics['loss'], moments
