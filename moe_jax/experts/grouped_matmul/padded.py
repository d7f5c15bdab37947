"""The grouped matmul as batched matmuls of padded groups.

Every round takes the next C rows of every group, C a little over the mean, and
there are as many rounds as the largest group needs: exact for any sizes, and
one round where groups are nearly even.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.experts.grouped_matmul.quantization import accumulator

_ROOM = 1.25  # rows of a group in a round, over the mean group
_GRAIN = 8  # that they are a multiple of


def forward(
  rows_MD: jax.Array, weights_NDF: jax.Array, sizes_N: jax.Array
) -> jax.Array:
  """Returns [M, F], 0 outside of all groups."""
  return _multiply(rows_MD, weights_NDF, sizes_N)


def backward(
  rows_MD: jax.Array,
  weights_NDF: jax.Array,
  sizes_N: jax.Array,
  grad_MF: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradients of rows and weights, these summed in float32."""
  rows_grad_MD = _multiply(grad_MF, weights_NDF, sizes_N, transposed=True)
  capacity = _capacity(len(rows_MD), len(weights_NDF))

  def one(i: jax.Array, out_NDF: jax.Array) -> jax.Array:
    rows_NCD = _round(rows_MD, sizes_N, i, capacity)
    grad_NCF = _round(grad_MF, sizes_N, i, capacity)
    return out_NDF + jnp.einsum(
      'NCD,NCF->NDF', rows_NCD, grad_NCF, preferred_element_type=jnp.float32
    )

  out_NDF = jnp.zeros_like(rows_MD, shape=weights_NDF.shape, dtype=jnp.float32)
  out_NDF = lax.fori_loop(0, _rounds(sizes_N, capacity), one, out_NDF)
  return rows_grad_MD, out_NDF.astype(weights_NDF.dtype)


def _multiply(
  rows_MD: jax.Array,
  weights_NDF: jax.Array,
  sizes_N: jax.Array,
  *,
  transposed: bool = False,
) -> jax.Array:
  """Returns [M, F], or of rows [M, F] and `transposed` [M, D]."""
  num_rows, num_groups = len(rows_MD), len(weights_NDF)
  capacity = _capacity(num_rows, num_groups)
  ends_N = jnp.cumsum(sizes_N)
  row_M = jnp.arange(num_rows)
  group_M = jnp.searchsorted(ends_N, row_M, side='right')
  used_M = group_M < num_groups
  group_M = jnp.minimum(group_M, num_groups - 1)
  nth_M = row_M - (ends_N - sizes_N)[group_M]

  equation = 'NCF,NDF->NCD' if transposed else 'NCD,NDF->NCF'

  def one(i: jax.Array, out_MF: jax.Array) -> jax.Array:
    rows_NCD = _round(rows_MD, sizes_N, i, capacity)
    out_NCF = jnp.einsum(
      equation, rows_NCD, weights_NDF, preferred_element_type=out_MF.dtype
    )
    now_M = used_M & (nth_M // capacity == i)
    mine_MF = out_NCF[group_M, nth_M % capacity]
    return jnp.where(now_M[:, None], mine_MF, out_MF)

  width = weights_NDF.shape[1 if transposed else 2]
  dtype = accumulator(rows_MD.dtype)
  out_MF = jnp.zeros_like(rows_MD, shape=(num_rows, width), dtype=dtype)
  return lax.fori_loop(0, _rounds(sizes_N, capacity), one, out_MF)


def _capacity(num_rows: int, num_groups: int) -> int:
  mean = -(-num_rows // num_groups)
  return -(-int(_ROOM * mean) // _GRAIN) * _GRAIN


def _rounds(sizes_N: jax.Array, capacity: int) -> jax.Array:
  return -(-sizes_N.max() // capacity)


def _round(
  rows: jax.Array, sizes_N: jax.Array, i: jax.Array, capacity: int
) -> jax.Array:
  """Returns [N, C, ...]: rows i C to i C + C - 1 of every group, or zeros."""
  nth_NC = i * capacity + jnp.arange(capacity)[None]
  source_NC = (jnp.cumsum(sizes_N) - sizes_N)[:, None] + nth_NC
  source_NC = jnp.where(nth_NC < sizes_N[:, None], source_NC, len(rows))
  return rows.at[source_NC].get(mode='fill', fill_value=0)
