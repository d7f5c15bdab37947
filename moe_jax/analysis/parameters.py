"""The parameters of a model's routers and experts, router by router."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from moe_jax import parameter
from moe_jax.analysis.routing import similarity
from moe_jax.parameter import EXPERT, FIXED, LOGIT

ROUTER, EXPERTS = 'router', 'experts'  # in an MoE sub-layer


def split(params: Any, part: str) -> tuple[dict, dict]:
  """Returns the leaves below `part` of any sub-layer, and all others, flat."""
  flat = traverse_util.flatten_dict(params)
  inside = {path: leaf for path, leaf in flat.items() if part in path}
  return inside, {path: flat[path] for path in flat.keys() - inside.keys()}


def joined(*flat: dict) -> Any:
  """Returns the tree that `split` took apart, or a part of it."""
  return traverse_util.unflatten_dict(
    {k: v for d in flat for k, v in d.items()}
  )


def norms(tree: Any) -> jax.Array:
  """Returns the norm of all leaves of a tree, float32."""
  squares = [jnp.square(a).sum() for a in jax.tree.leaves(tree)]
  return jnp.sqrt(sum(squares, jnp.zeros(())))


def expert_norms(experts: Any, declared: Any) -> jax.Array:
  """Returns the Frobenius norm of every expert of a sub-layer, [N].

  Args:
    experts: The parameters of its experts.
    declared: What each is, a tree like `experts`.
  """
  squares, of_path = [], parameter.flatten(declared)
  for path, leaf in parameter.flatten(experts).items():
    axes = of_path[path].axes
    rows = jnp.moveaxis(leaf, axes.index(EXPERT), 0)
    squares.append(jnp.square(rows.reshape(len(rows), -1)).sum(-1))
  return jnp.sqrt(sum(squares))


def gate_norms(gate: Any, declared: Any) -> jax.Array | None:
  """Returns the norm of the weights that a gate has for every expert, [N].

  They are its trained matrices with an axis `parameter.LOGIT`; None where there
  is none.

  Args:
    gate: The parameters of the gate.
    declared: What each is, a tree like `gate`.
  """
  squares, of_path = [], parameter.flatten(declared)
  for path, leaf in parameter.flatten(gate).items():
    axes = of_path[path].axes
    if of_path[path].update != FIXED and LOGIT in axes:
      squares.append(jnp.square(leaf).sum(1 - axes.index(LOGIT)))
  return jnp.sqrt(sum(squares)) if squares else None


def expert_similarity(experts: Any, declared: Any) -> jax.Array:
  """Returns the similarity of a sub-layer's experts; see `similarity`.

  Args:
    experts: The parameters of its experts.
    declared: What each is, a tree like `experts`.
  """
  matrices, of_path = [], parameter.flatten(declared)
  for path, leaf in parameter.flatten(experts).items():
    axes = of_path[path].axes
    leaf = jnp.moveaxis(leaf, axes.index(EXPERT), 0)
    if leaf.ndim > 2:  # the rest are biases
      # Between inputs and outputs stand the kinds of matrices, if several.
      kinds = leaf.reshape(*leaf.shape[:2], -1, leaf.shape[-1])
      matrices += list(jnp.moveaxis(kinds, 2, 0))
  return similarity(matrices)
