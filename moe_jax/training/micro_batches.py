"""Micro-batches: cutting a batch, adding up what its parts give, joining them.

`train.accumulation` gradient accumulation steps make up one step of training.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.parallel import mesh as mesh_lib


def split(tree: Any, count: int, mesh: jax.sharding.Mesh, axis: int = 0) -> Any:
  """Cuts B at `axis` into [count, ..., B / count, ...].

  Every device keeps its own rows, so part p has the rows p, p + count, ...
  """

  def cut(array: jax.Array) -> jax.Array:
    shape = array.shape
    parts = array.reshape(*shape[:axis], -1, count, *shape[axis + 1 :])
    parts = jnp.moveaxis(parts, axis + 1, 0)
    return mesh_lib.shard_tokens(
      parts, mesh, axis=axis + 1, axes=mesh_lib.BATCH_AXES
    )

  return jax.tree.map(cut, tree)


def join(tree: Any, mesh: jax.sharding.Mesh, axis: int = 0) -> Any:
  """Joins what `split` took apart."""

  def joined(parts: jax.Array) -> jax.Array:
    array = jnp.moveaxis(parts, 0, axis + 1)
    shape = array.shape
    array = array.reshape(*shape[:axis], -1, *shape[axis + 2 :])
    return mesh_lib.shard_tokens(
      array, mesh, axis=axis, axes=mesh_lib.BATCH_AXES
    )

  return jax.tree.map(joined, tree)


def total(function: Callable[[Any], tuple[Any, Any]], parts: Any) -> Any:
  """Calls `function` for one part after the other, the leading axis of `parts`.

  Returns:
    The sum of its first results, and its second results stacked.
  """

  def add(sums: Any, part: Any) -> tuple[Any, Any]:
    more, kept = function(part)
    return jax.tree.map(jnp.add, sums, more), kept

  first = jax.tree.map(lambda a: a[0], parts)
  shapes, _ = jax.eval_shape(function, first)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
  return jax.lax.scan(add, zeros, parts)
