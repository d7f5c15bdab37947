"""The grouped matmul as a loop over groups in float64: the oracle."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moe_jax.experts.grouped_matmul import grouped_matmul

ROWS = 400
SIZES = {
  'even': [100, 100, 100, 100],
  'uneven': [7, 250, 1, 142],
  'empty groups': [0, 400, 0, 0],
  'whole blocks': [128, 0, 128, 144],
  'rows in no group': [3, 130, 0, 90],
  'no rows at all': [0, 0, 0, 0],
}


def dense_loop(
  rows_MD: np.ndarray, weights_NDF: np.ndarray, sizes: list[int]
) -> np.ndarray:
  out_MF = np.zeros((len(rows_MD), weights_NDF.shape[-1]))
  start = 0
  for weight_DF, size in zip(weights_NDF, sizes, strict=True):
    out_MF[start : start + size] = rows_MD[start : start + size] @ weight_DF
    start += size
  return out_MF


def dense_gradients(
  rows_MD: np.ndarray,
  weights_NDF: np.ndarray,
  sizes: list[int],
  grad: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  rows_grad, weights_grad = np.zeros_like(rows_MD), np.zeros_like(weights_NDF)
  start = 0
  for n, size in enumerate(sizes):
    part = slice(start, start + size)
    rows_grad[part] = grad[part] @ weights_NDF[n].T
    weights_grad[n] = rows_MD[part].T @ grad[part]
    start += size
  return rows_grad, weights_grad


def both_ways(name: str, dtype: Any) -> Any:
  @jax.jit
  def run(rows: Any, weights: Any, sizes: Any, grad: Any) -> Any:
    out, vjp = jax.vjp(
      lambda rows, weights: grouped_matmul(rows, weights, sizes, name),
      rows,
      weights,
    )
    return out, *vjp(grad)

  def checked(sizes: list[int], shape: tuple[int, int, int], atol: float):
    num_rows, d, f = shape
    rng = np.random.default_rng(0)
    rows, weights, grad = (
      rng.standard_normal(s)
      for s in ((num_rows, d), (len(sizes), d, f), (num_rows, f))
    )
    # Both sides start from what the dtype can hold.
    operands = [jnp.asarray(a, dtype) for a in (rows, weights, grad)]
    rows, weights, grad = (np.asarray(a, np.float64) for a in operands)
    expected = (
      dense_loop(rows, weights, sizes),
      *dense_gradients(rows, weights, sizes, grad),
    )
    results = run(*operands[:2], jnp.asarray(sizes, jnp.int32), operands[2])
    for ours, theirs in zip(results, expected, strict=True):
      assert ours.dtype == dtype
      scale = max(1.0, np.abs(theirs).max())
      np.testing.assert_allclose(
        np.asarray(ours, np.float64) / scale, theirs / scale, atol=atol
      )

  return checked


def of_gpus(**sizes: int) -> AbstractMesh:
  """A mesh of GPUs that need not be here."""
  return AbstractMesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
    abstract_device=AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'cuda'),
  )
