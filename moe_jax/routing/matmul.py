"""Matmuls of routers: as good as float32, and made by tensor cores.

A matmul in float32 is slow where others are fast: on an H100 it takes 15 times
as long as one in bfloat16, on a TPU six. Three products of bfloat16 do. Each
operand is cut in two, a number of bfloat16 and what is left in another one; of
the four products that of both rests is left out. So is 2^-16 of an operand at
most, and by rounding to bfloat16 it would be 2^-8.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

_FLOAT32 = lax.Precision.HIGHEST
_THREE_PRODUCTS = lax.DotAlgorithmPreset.BF16_BF16_F32_X3
# What has tensor cores, by the names of JAX's platforms.
_PRECISION = {'cuda': _THREE_PRODUCTS, 'tpu': _THREE_PRODUCTS}


@jax.custom_vjp
def matmul(x_TX: jax.Array, weight_XO: jax.Array) -> jax.Array:
  """Returns `x_TX weight_XO`, [T, O] float32.

  Args:
    x_TX: In float32, or in another type that float32 holds: it is not rounded,
      and backward keeps it as it is.
    weight_XO: In float32.
  """
  return _product(x_TX, weight_XO, (1, 0))


def _forward(
  x_TX: jax.Array, weight_XO: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return matmul(x_TX, weight_XO), (x_TX, weight_XO)


def _backward(
  operands: tuple[jax.Array, jax.Array], grad_TO: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x_TX, weight_XO = operands
  x_grad_TX = _product(grad_TO, weight_XO, (1, 1))
  weight_grad_XO = _product(grad_TO, x_TX, (0, 0)).T
  return x_grad_TX.astype(x_TX.dtype), weight_grad_XO


matmul.defvjp(_forward, _backward)


def _product(
  left: jax.Array, right: jax.Array, contracted: tuple[int, int]
) -> jax.Array:
  """Returns the product of two matrices over one axis of each."""
  dtype = jnp.promote_types(left.dtype, right.dtype)
  multiply = functools.partial(
    lax.dot_general,
    dimension_numbers=(([contracted[0]], [contracted[1]]), ([], [])),
  )
  # The platform is that of the program, which need not be here.
  return lax.platform_dependent(
    left.astype(dtype),
    right.astype(dtype),
    default=functools.partial(multiply, precision=_FLOAT32),
    **{
      platform: functools.partial(multiply, precision=precision)
      for platform, precision in _PRECISION.items()
    },
  )
