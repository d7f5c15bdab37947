"""A router's matmuls: on CPUs float32's own, elsewhere nearly as good."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing.matmul import matmul

Array = np.ndarray
LAYERS, TOKENS, HIDDEN, STATE, EXPERTS, CHOSEN = 12, 512, 256, 64, 16, 4


def operands(dtype: Any) -> tuple[jax.Array, ...]:
  """x_TX, weight_XO and a gradient of their product."""
  keys = jax.random.split(jax.random.key(0), 3)
  x_TX, weight_XO, grad_TO = (
    jax.random.normal(key, shape)
    for key, shape in zip(keys, [(96, 80), (80, 24), (96, 24)], strict=True)
  )
  return x_TX.astype(dtype), weight_XO, grad_TO


def with_gradients(multiply: Any, *given: jax.Array) -> list[jax.Array]:
  @jax.jit
  def computed(x: jax.Array, weight: jax.Array, grad: jax.Array) -> Any:
    y, backward = jax.vjp(multiply, x, weight)
    return y, *backward(grad)

  return list(computed(*given))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_on_cpus_it_is_the_matmul_of_jax(dtype: str) -> None:
  """To the last bit, gradients too."""

  def plain(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.matmul(x.astype(jnp.float32), weight, precision='highest')

  given = operands(dtype)
  ours, expected = (with_gradients(f, *given) for f in (matmul, plain))
  for a, b in zip(ours, expected, strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_backward_keeps_x_as_it_is() -> None:
  x_TX, weight_XO, _ = operands('bfloat16')
  _, backward = jax.vjp(matmul, x_TX, weight_XO)
  kept = {(leaf.dtype, leaf.shape) for leaf in jax.tree.leaves(backward)}
  assert kept == {(x_TX.dtype, x_TX.shape), (weight_XO.dtype, weight_XO.shape)}


@pytest.mark.parametrize('platform', ['cuda', 'tpu', 'cpu'])
def test_which_algorithm_a_platform_takes(platform: str) -> None:
  """Forward and backward; the platform need not be here."""
  traced = jax.jit(functools.partial(with_gradients, matmul)).trace(
    *operands('float32')
  )
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert text.count('dot_general') == 3
  three = text.count('num_primitive_operations = 3')
  assert three == (0 if platform == 'cpu' else 3)
  assert text.count('HIGHEST') == (6 if platform == 'cpu' else 0)


def test_three_products_hardly_move_a_token() -> None:
  """Through a projector, the recurrence and a gate, layer after layer.

  By hand, because XLA's CPU compiler has float32 whatever it is asked for.
  """
  exact = np.stack(routed(np.matmul, np.float64))

  def told(multiply: Any) -> tuple[float, int]:
    """The error of the logits beside float64, and the tokens that it moves."""
    logits = np.stack(routed(multiply, np.float32))
    error = np.sqrt(np.mean((logits - exact) ** 2)) / exact.std()
    return error, int((chosen(logits) != chosen(exact)).any(-1).sum())

  def rounded(a: Array, b: Array) -> Array:
    return as_bfloat16(a) @ as_bfloat16(b)

  true, by_true = told(lambda a, b: np.asarray(matmul(a, b)))
  three, by_three = told(three_products)
  bfloat16, by_bfloat16 = told(rounded)
  assert 2 * true < three < 40 * true < bfloat16 / 10
  tokens = LAYERS * TOKENS
  assert by_true <= by_three <= tokens / 2000 and by_bfloat16 > tokens / 200


def three_products(a: Array, b: Array) -> Array:
  """As `BF16_BF16_F32_X3`: a product of two bfloat16 is exact in float32."""
  large_a, large_b = as_bfloat16(a), as_bfloat16(b)
  small_a, small_b = as_bfloat16(a - large_a), as_bfloat16(b - large_b)
  return small_a @ large_b + large_a @ small_b + large_a @ large_b


def as_bfloat16(a: Array) -> Array:
  return np.asarray(jnp.asarray(a).astype(jnp.bfloat16).astype(jnp.float32))


def routed(multiply: Any, dtype: Any) -> list[Array]:
  """Returns every layer's logits by RMoE eq. 2-6, of rounded hidden states."""
  draw = np.random.default_rng(0)

  def normal(*shape: int) -> Array:
    return draw.standard_normal(shape).astype(np.float32)

  def gates(x: Array, weight: Array) -> list[Array]:
    return np.split(multiply(x, weight), 3, axis=-1)

  def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))

  cell = [(normal(STATE, 3 * STATE) / STATE**0.5).astype(dtype) for _ in '12']
  h_TR, logits = np.zeros((TOKENS, STATE), dtype), []
  for _ in range(LAYERS):
    x_TD = as_bfloat16(normal(TOKENS, HIDDEN)).astype(dtype)
    projector_DR = (normal(HIDDEN, STATE) / HIDDEN**0.5).astype(dtype)
    weight_RN = normal(STATE, EXPERTS).astype(dtype)
    reset, update, new = gates(multiply(x_TD, projector_DR), cell[0])
    reset_h, update_h, new_h = gates(h_TR, cell[1])
    z_TR = sigmoid(update + update_h)
    n_TR = np.tanh(new + sigmoid(reset + reset_h) * new_h)
    h_TR = (1 - z_TR) * n_TR + z_TR * h_TR
    logits.append(multiply(h_TR, weight_RN))
  return logits


def chosen(logits: Array) -> Array:
  return np.sort(np.argsort(-logits, axis=-1)[..., :CHOSEN], axis=-1)
