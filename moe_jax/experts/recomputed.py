"""Methods of modules whose results the backward pass makes again."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def recomputed(*kept: str) -> Callable[[Callable], Callable]:
  """Decorates a method: of what it computes, backward keeps `kept` alone.

  That is for what costs little to make again, and would be as large as what is
  kept anyway. Parameters are kept as they are stored; that they are cast,
  gathered or joined for their use is made again too.

  Args:
    *kept: names given by `jax.ad_checkpoint.checkpoint_name`.
  """
  policy = jax.checkpoint_policies.save_only_these_names(*kept)

  def decorate(method: Callable) -> Callable:
    @functools.wraps(method)
    def wrapped(self: nnx.Module, *operands: Any) -> Any:
      graphdef, params = nnx.split(self)

      # Where a compiler sees forward and backward in one piece it may merge
      # them again. It does not in a scan; and where `model.remat` makes all
      # this again, merging is what saves gathering parameters a third time.
      @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
      def compute(params: nnx.State, *operands: Any) -> Any:
        return method(nnx.merge(graphdef, params), *operands)

      return compute(params, *operands)

    return wrapped

  return decorate
