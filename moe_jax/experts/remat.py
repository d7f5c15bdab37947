"""Rematerialisation: what the backward pass computes again, not keeps."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


def remat(function: Callable, *kept: str) -> Callable:
  """Returns `function` such that backward keeps its operands and `kept` alone.

  It is for what costs little to make again, and would be as large as what is
  kept anyway.

  Args:
    function: A function of trees of arrays.
    *kept: The names given by `jax.ad_checkpoint.checkpoint_name` within.
  """
  # A compiler that sees forward and backward in one piece may merge what is
  # made twice. In a scan it does not; and where `model.remat` makes all this
  # again, merging is what saves gathering parameters a third time.
  return jax.checkpoint(
    function,
    policy=jax.checkpoint_policies.save_only_these_names(*kept),
    prevent_cse=False,
  )


def remat_method(*kept: str) -> Callable[[Callable], Callable]:
  """Returns a decorator that does to a module's method what `remat` does.

  Parameters are kept as they are stored, not as what they are cast to or
  joined to for their use.
  """

  def decorate(method: Callable) -> Callable:
    @functools.wraps(method)
    def wrapped(self: nnx.Module, *operands: Any) -> Any:
      graphdef, params = nnx.split(self)

      def compute(params: nnx.State, *operands: Any) -> Any:
        return method(nnx.merge(graphdef, params), *operands)

      return remat(compute, *kept)(params, *operands)

    return wrapped

  return decorate


_Function = Callable[[Any, Any], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def add_if_needed(
  usual: _Function, rare: _Function, needed: jax.Array, moving: Any, fixed: Any
) -> jax.Array:
  """Returns `usual(moving, fixed)`, plus `rare(moving, fixed)` where needed.

  The usual part lies outside of the condition, so that the compiler may overlap
  its collectives with other work. What backward needs of the rare part it
  computes again: as branches of one `lax.cond`, differentiated by JAX, both
  would write what both keep, in every step. Where the rare part is not needed,
  result and gradients go through the condition as they are.

  Args:
    usual: Returns an array.
    rare: Returns another one like it.
    needed: bool, the same on all devices if `rare` has collectives.
    moving: A tree of floating-point arrays, which get gradients.
    fixed: A tree of arrays, which get none.
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


add_if_needed.defvjp(_forward, _backward)
