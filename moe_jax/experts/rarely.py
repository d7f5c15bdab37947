"""A rare addition that costs next to nothing in all other steps."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_Function = Callable[[Any, Any], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def plus_rarely(
  usual: _Function, rare: _Function, needed: jax.Array, moving: Any, fixed: Any
) -> jax.Array:
  """`usual(moving, fixed)`, plus `rare(moving, fixed)` where it is needed.

  The usual part lies outside of the condition, so that the compiler may overlap
  its collectives with other work. What backward needs of the rare part it
  computes again: as branches of one `lax.cond`, differentiated by JAX, both
  would write what both keep, in every step. Where the rare part is not needed,
  result and gradients go through the condition as they are.

  Args:
    usual: returns an array.
    rare: returns another one like it.
    needed: bool, the same on all devices if `rare` has collectives.
    moving: a tree of floating-point arrays, which get gradients.
    fixed: a tree of arrays, which get none.
  """
  return _plus(rare, usual(moving, fixed), needed, moving, fixed)


def _plus(
  rare: _Function, y: jax.Array, needed: jax.Array, moving: Any, fixed: Any
) -> jax.Array:
  return lax.cond(needed, lambda y: y + rare(moving, fixed), lambda y: y, y)


def _forward(
  usual: _Function, rare: _Function, needed: jax.Array, moving: Any, fixed: Any
) -> tuple[jax.Array, Any]:
  y, backward = jax.vjp(lambda moving: usual(moving, fixed), moving)
  y = _plus(rare, y, needed, moving, fixed)
  return y, (backward, needed, moving, fixed)


def _backward(
  usual: _Function, rare: _Function, residuals: Any, grad: jax.Array
) -> tuple[None, Any, None]:
  del usual
  backward, needed, moving, fixed = residuals
  [grads] = backward(grad)

  def plus(grads: Any) -> Any:
    _, backward = jax.vjp(lambda moving: rare(moving, fixed), moving)
    return jax.tree.map(jnp.add, grads, backward(grad)[0])

  return None, lax.cond(needed, plus, lambda grads: grads, grads), None


plus_rarely.defvjp(_forward, _backward)
