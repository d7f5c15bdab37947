"""Every cell against float64 numpy, over several layers, and its contract."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.routing.cells import CELLS
from tests.helpers import gradients
from tests.helpers import routing_oracles as oracles

RECURRENT = [name for name in CELLS if name != 'none']


def make(name: str) -> tuple[nnx.GraphDef, Any]:
  """A cell of 4 inputs and 3 states; random parameters."""
  cell = CELLS[name](4, 3, rngs=nnx.Rngs(params=0))
  params = nnx.to_pure_dict(nnx.state(cell, nnx.Param))
  return nnx.graphdef(cell), gradients.random_like(params)


def inputs() -> np.ndarray:
  """[layers, T, X]"""
  return np.random.default_rng(2).standard_normal((3, 5, 4))


@pytest.mark.parametrize('name', CELLS)
def test_three_layers_and_their_gradients(name: str) -> None:
  def expected(tree: Any, _: Any) -> np.ndarray:
    weights = oracles.f64(tree['params'])
    states = [oracles.start(name, 3)] * 5
    outputs = []
    for u_TX in tree['u']:
      states = [
        oracles.CELLS[name](u_X, state, weights)
        for u_X, state in zip(u_TX, states, strict=True)
      ]
      outputs.append(np.stack([state[0] for state in states]))
    return np.stack(outputs)

  with jax.enable_x64(True):
    graphdef, params = make(name)

    def ours(tree: Any) -> jax.Array:
      cell = nnx.merge(graphdef, tree['params'])
      state, outputs = cell.start(5), []
      for u_TX in tree['u']:
        h_TR, state = cell(u_TX, state)
        outputs.append(h_TR)
      return jnp.stack(outputs)

    tree = {'params': params, 'u': inputs()}
    gradients.check(ours, expected, tree, rtol=1e-6)


@pytest.mark.parametrize('name', CELLS)
def test_tokens_do_not_meet(name: str) -> None:
  """The recurrence runs over layers: along the sequence nothing passes."""
  graphdef, params = make(name)
  cell = nnx.merge(graphdef, jax.tree.map(jnp.float32, params))
  u_TX = jnp.float32(inputs()[0])
  together, _ = cell(u_TX, cell.start(5))
  for t in range(5):
    alone, _ = cell(u_TX[t : t + 1], cell.start(1))
    np.testing.assert_allclose(alone[0], together[t], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', RECURRENT)
@pytest.mark.parametrize('size', [1e4, -1e4])
def test_huge_inputs_saturate(name: str, size: float) -> None:
  graphdef, params = make(name)
  params = jax.tree.map(jnp.float32, params)

  def total(u_TX: jax.Array) -> jax.Array:
    cell = nnx.merge(graphdef, params)
    h_TR, state = cell(u_TX, cell.start(5))
    return cell(u_TX, state)[0].sum() + h_TR.sum()

  value, found = jax.value_and_grad(total)(size * jnp.float32(inputs()[0]))
  assert np.isfinite(value)
  assert abs(float(value)) <= 2 * 5 * 3
  assert np.isfinite(found).all()


@pytest.mark.parametrize('name', CELLS)
def test_a_layer_hands_on_what_it_was_given(name: str) -> None:
  """Shapes, dtypes and structure stay, as the scan over layers needs them."""
  graphdef, params = make(name)
  params = jax.tree.map(jnp.float32, params)
  u_TX = jnp.float32(inputs()[0])

  def step(params: Any, u_TX: jax.Array, state: Any) -> tuple[Any, Any]:
    return nnx.merge(graphdef, params)(u_TX, state)

  start = nnx.merge(graphdef, params).start(5)
  h_TR, state = step(params, u_TX, start)
  assert h_TR.dtype == jnp.float32
  assert h_TR.shape == (5, 4 if name == 'none' else 3)
  assert jax.tree.structure(state) == jax.tree.structure(start)
  assert len(jax.tree.leaves(start)) == {'none': 0, 'lstm': 2}.get(name, 1)
  for before, after in zip(
    jax.tree.leaves(start), jax.tree.leaves(state), strict=True
  ):
    assert before.dtype == after.dtype == jnp.float32
    assert before.shape == after.shape == (5, 3)
    assert not before.any()  # h_0 = c_0 = 0

  # In everything that the cell reads, from a state that is not zero.
  found = jax.grad(
    lambda *tree: (step(*tree)[0] ** 2).sum(), argnums=(0, 1, 2)
  )(params, u_TX, state)
  for leaf in jax.tree.leaves(found):
    assert np.isfinite(leaf).all() and leaf.any()
