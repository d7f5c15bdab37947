"""Parameters say what they are: defaults, stacked layers, whole models."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moe_jax import parameter
from moe_jax.parameter import EMBED, EXPERT, MLP, Declaration, param


class Layer(nnx.Module):
  """A matrix that says what it is, and two parameters that say nothing."""

  def __init__(self, rngs: nnx.Rngs):
    value = jax.random.normal(rngs.params(), (4, 8))
    self.up_DF = param(value, (EMBED, MLP), decay=True)
    self.gain_N = nnx.Param(jnp.ones((3,)))
    self.weight_XN = nnx.Param(jnp.ones((4, 3)))


class Model(nnx.Module):
  """Two layers, stacked as the decoder stacks its own."""

  def __init__(self, rngs: nnx.Rngs):
    def make(rngs: nnx.Rngs) -> Layer:
      layer = Layer(rngs)
      parameter.declare(layer)
      return layer

    self.layers = nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(2))
    self.bias_N = nnx.Param(jnp.zeros(3))


def test_one_that_says_nothing_has_safe_defaults() -> None:
  gain = parameter.declaration(nnx.Param(jnp.ones(3)))
  assert gain == Declaration(matmuls=0)
  assert not gain.decay and not gain.axes and gain.update == parameter.TRAINED
  assert parameter.declaration(nnx.Param(jnp.ones((4, 3)))).matmuls == 1


def test_biases_of_experts_are_no_matmul() -> None:
  bias_NF = param(jnp.zeros((3, 8)), (EXPERT, MLP))
  assert parameter.declaration(bias_NF).matmuls == 0
  up_NDF = param(jnp.zeros((3, 4, 8)), (EXPERT, EMBED, MLP))
  assert parameter.declaration(up_NDF).matmuls == 1


def test_axes_are_all_named_or_none() -> None:
  with pytest.raises(ValueError, match='of a parameter of shape'):
    param(jnp.zeros((3, 8)), (EMBED,))


def test_stacking_keeps_what_layers_said() -> None:
  model = nnx.eval_shape(lambda: Model(nnx.Rngs(params=0)))
  declared = parameter.declarations(model)
  assert declared == {
    'layers': {
      'up_DF': Declaration((EMBED, MLP), decay=True, matmuls=1),
      # [2, 3] by now, but it was a vector when it was made.
      'gain_N': Declaration(matmuls=0),
      'weight_XN': Declaration(matmuls=1),
    },
    'bias_N': Declaration(matmuls=0),
  }
  shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  assert jax.tree.structure(shapes) == jax.tree.structure(declared)


def test_a_module_gives_its_parameters_a_part() -> None:
  layer = Layer(nnx.Rngs(params=0))
  parameter.declare(layer, part=parameter.ROUTER)
  parts = {
    each.part
    for each in parameter.flatten(parameter.declarations(layer)).values()
  }
  assert parts == {parameter.ROUTER}
