"""What the backward pass makes again instead of keeping it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def remat(function: Callable, *kept: str) -> Callable:
  """`function`, of which backward keeps its operands and `kept` alone.

  For what costs little to make again, and would be as large as what is kept
  anyway.

  Args:
    function: of trees of arrays.
    *kept: names given by `jax.ad_checkpoint.checkpoint_name` within.
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
  """Decorates the method of a module as `remat` does a function.

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
