"""Rows moved by gathers alone, backward too.

The transposes that XLA would derive are scatters, serial on CPU and slow on
TPU. So whoever moves rows says both where each comes from and where it goes.
An index past the end stands for nothing: a row of zeros, or no place.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def permute(
  x_TD: jax.Array, assignment_M: jax.Array, row_TK: jax.Array
) -> jax.Array:
  """Row m is the token of slot `assignment_M[m]`, token t having slots t K + k.

  Args:
    x_TD: tokens.
    assignment_M: int32; T K or more for a row of zeros.
    row_TK: int32, the row of every slot; M or more where it has none.
  """
  return _take(x_TD, assignment_M // row_TK.shape[1])


def _rows_of_slots_backward(
  row_TK: jax.Array, grad_MD: jax.Array
) -> tuple[jax.Array, None, None]:
  return _take(grad_MD, row_TK).sum(1), None, None


permute.defvjp(
  lambda x_TD, assignment_M, row_TK: (
    permute(x_TD, assignment_M, row_TK),
    row_TK,
  ),
  _rows_of_slots_backward,
)


@jax.custom_vjp
def gather_rows(
  rows_MD: jax.Array, source: jax.Array, target_M: jax.Array
) -> jax.Array:
  """`rows_MD[source]`, where no row is asked for twice.

  Args:
    rows_MD: any rows.
    source: int32, of any shape; M or more for a row of zeros.
    target_M: int32, for every row its place in the flattened `source`; past
      its end for rows that nobody asks for.
  """
  return _take(rows_MD, source)


def _move_rows_backward(
  target_M: jax.Array, grad: jax.Array
) -> tuple[jax.Array, None, None]:
  return _take(grad.reshape(-1, grad.shape[-1]), target_M), None, None


gather_rows.defvjp(
  lambda rows_MD, source, target_M: (
    gather_rows(rows_MD, source, target_M),
    target_M,
  ),
  _move_rows_backward,
)


@jax.custom_vjp
def combine(
  rows_MD: jax.Array,
  weights_TK: jax.Array,
  row_TK: jax.Array,
  assignment_M: jax.Array,
) -> jax.Array:
  """`sum_k weights_TK[t, k] rows_MD[row_TK[t, k]]`, summed in float32.

  Nothing as large as the slots' rows is kept in between, in either direction.

  Args:
    rows_MD: any rows.
    weights_TK: float32.
    row_TK, assignment_M: as in `permute`.

  Returns:
    [T, D] in the dtype of the rows.
  """
  terms = (
    weights_K[:, None] * _take(rows_MD, place_K).astype(jnp.float32)
    for weights_K, place_K in zip(weights_TK.T, row_TK.T, strict=True)
  )
  return sum(terms).astype(rows_MD.dtype)


def _combine_rows_backward(
  saved: tuple[jax.Array, ...], grad_TD: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
  rows_MD, weights_TK, row_TK, assignment_M = saved
  weight_M = (
    weights_TK.reshape(-1).at[assignment_M].get(mode='fill', fill_value=0)
  )
  grad_MD = _take(grad_TD, assignment_M // row_TK.shape[1]).astype(jnp.float32)
  rows_grad_MD = (weight_M[:, None] * grad_MD).astype(rows_MD.dtype)
  # Of every row on its own, in the order of rows: no second gather of them.
  dot_M = (rows_MD.astype(jnp.float32) * grad_MD).sum(1)
  weights_grad_TK = dot_M.at[row_TK].get(mode='fill', fill_value=0)
  return rows_grad_MD, weights_grad_TK.astype(weights_TK.dtype), None, None


combine.defvjp(
  lambda *operands: (combine(*operands), operands),
  _combine_rows_backward,
)


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
  return rows.at[index].get(mode='fill', fill_value=0)


def segment_offsets(
  sizes_J: jax.Array, to_J: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
  """Where rows go that lie segment after segment and move segment by segment.

  Args:
    sizes_J: int32 rows of each segment, num_rows or fewer in all.
    to_J: int32, where the first row of each segment goes.
    num_rows: of the results; those past the segments follow the last one.

  Returns:
    int32 [num_rows], and the segment of every row, int32 [num_rows].
  """
  ends_J = jnp.cumsum(sizes_J)
  row_M = jnp.arange(num_rows, dtype=jnp.int32)
  # A comparison with each of few segments: a binary search is a loop.
  segment_M = jnp.searchsorted(
    ends_J, row_M, side='right', method='compare_all'
  )
  segment_M = jnp.minimum(segment_M, len(sizes_J) - 1)
  return row_M + (to_J - (ends_J - sizes_J))[segment_M], segment_M


def offsets(sizes: jax.Array) -> jax.Array:
  """Where segments of these sizes begin, along the last axis."""
  return jnp.cumsum(sizes, axis=-1) - sizes
