"""Gradients of the library against finite differences of an oracle."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# Of a central difference in float64: truncation and rounding both below 1e-9.
STEP = 1e-5


def check(
  ours: Callable[[Any], jax.Array],
  oracle: Callable[[Any, Any], np.ndarray],
  tree: Any,
  *,
  rtol: float,
) -> None:
  """Values, and the gradient of every leaf along a random direction.

  Args:
    ours: a tree of arrays -> an array.
    oracle: the same in numpy, of the tree and of the tree as it was before
      the differences: what the gradient stops at is read from the second.
    tree: where to compare; leaves named `fixed_*` must have no gradient.
    rtol: of values and gradients, relative to the largest of them.
  """
  rng = np.random.default_rng(0)
  values, pull = jax.vjp(jax.jit(ours), tree)
  expected = oracle(tree, tree)
  close(values, expected, rtol, 'values')
  cotangent = rng.standard_normal(expected.shape).astype(values.dtype)
  (found,) = jax.jit(pull)(cotangent)
  compare(found, oracle, tree, cotangent, rtol=rtol)


def compare(
  found: Any,
  oracle: Callable[[Any, Any], np.ndarray],
  tree: Any,
  cotangent: np.ndarray,
  *,
  rtol: float,
) -> None:
  """Every leaf of the gradient `found` of `cotangent . oracle(tree)`."""
  rng = np.random.default_rng(1)
  leaves, shape = jax.tree.flatten(tree)
  scale = np.abs(cotangent * oracle(tree, tree)).sum()
  paths = [jax.tree_util.keystr(p) for p, _ in with_paths(tree)]
  for i, gradient in enumerate(jax.tree.leaves(found)):
    gradient = np.asarray(gradient, np.float64)
    if 'fixed_' in paths[i]:
      assert not gradient.any(), paths[i]
      continue
    direction = rng.standard_normal(np.shape(leaves[i]))
    ends = []
    for sign in (1, -1):
      moved = list(leaves)
      moved[i] = np.asarray(leaves[i], np.float64) + sign * STEP * direction
      ends.append(
        (cotangent * oracle(jax.tree.unflatten(shape, moved), tree)).sum()
      )
    np.testing.assert_allclose(
      (gradient * direction).sum(),
      (ends[0] - ends[1]) / (2 * STEP),
      rtol=0,
      atol=rtol * norms(gradient, direction) + 1e-10 * scale,
      err_msg=paths[i],
    )


def norms(*arrays: np.ndarray) -> float:
  return float(np.prod([np.linalg.norm(array) for array in arrays]))


def close(ours: Any, expected: np.ndarray, rtol: float, name: str) -> None:
  np.testing.assert_allclose(
    ours, expected, rtol=0, atol=rtol * np.abs(expected).max(), err_msg=name
  )


def with_paths(tree: Any) -> list[tuple[Any, Any]]:
  return jax.tree_util.tree_leaves_with_path(tree)


def random_like(tree: Any, scale: float = 0.5) -> Any:
  """A tree of float64 standard normal numbers times `scale`."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda leaf: scale * rng.standard_normal(np.shape(leaf)), tree
  )
