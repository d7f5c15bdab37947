"""Rows moved by gathers alone, backward too.

The transposes that XLA would derive are scatters, serial on CPU and slow on
TPU. So whoever moves rows says both where each comes from and where it goes.
An index past the end stands for nothing: a row of zeros, or no place. Where all
rows are moved, `complete` says that there is none: TPUs fill in such zeros by
one more pass over what was gathered.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def permute(
  x_TD: jax.Array,
  assignment_M: jax.Array,
  row_TK: jax.Array,
  complete: bool = False,
) -> jax.Array:
  """Returns rows_MD: row m is the token of assignment `assignment_M[m]`.

  Token t has the assignments t K + k.

  Args:
    x_TD: The tokens.
    assignment_M: int32; T K or more stands for a row of zeros.
    row_TK: int32, the row of every assignment; M or more where it has none.
    complete: Whether every row has an assignment, and the other way round.
  """
  return _take(x_TD, assignment_M // row_TK.shape[1], complete)


def _permute_backward(
  complete: bool, row_TK: jax.Array, grad_MD: jax.Array
) -> tuple[jax.Array, None, None]:
  return _sum_of_rows(grad_MD, row_TK, complete), None, None


permute.defvjp(
  lambda x_TD, assignment_M, row_TK, complete: (
    permute(x_TD, assignment_M, row_TK, complete),
    row_TK,
  ),
  _permute_backward,
)


@jax.custom_vjp
def gather_rows(
  rows_MD: jax.Array, source: jax.Array, target_M: jax.Array
) -> jax.Array:
  """Returns `rows_MD[source]`, where no row is asked for twice.

  Args:
    rows_MD: Any rows.
    source: int32, of any shape; M or more stands for a row of zeros.
    target_M: int32, for every row its place in the flattened `source`; past
      its end for rows that nobody asks for.
  """
  return _take(rows_MD, source)


def _gather_rows_backward(
  target_M: jax.Array, grad: jax.Array
) -> tuple[jax.Array, None, None]:
  return _take(grad.reshape(-1, grad.shape[-1]), target_M), None, None


gather_rows.defvjp(
  lambda rows_MD, source, target_M: (
    gather_rows(rows_MD, source, target_M),
    target_M,
  ),
  _gather_rows_backward,
)


@jax.custom_vjp
def add_up(
  rows_MD: jax.Array, row_TK: jax.Array, assignment_M: jax.Array
) -> jax.Array:
  """Returns `y_t = sum_k rows_MD[row_TK[t, k]]`, summed in float32.

  It is the transpose of a complete `permute`.

  Args:
    rows_MD: Any rows.
    row_TK: int32, as in `permute`.
    assignment_M: int32, as in `permute`.
  """
  return _sum_of_rows(rows_MD, row_TK, complete=True)


def _add_up_backward(
  saved: tuple[jax.Array, jax.Array], grad_TD: jax.Array
) -> tuple[jax.Array, None, None]:
  row_TK, assignment_M = saved
  grad_MD = _take(grad_TD, assignment_M // row_TK.shape[1], complete=True)
  return grad_MD, None, None


add_up.defvjp(
  lambda rows_MD, row_TK, assignment_M: (
    add_up(rows_MD, row_TK, assignment_M),
    (row_TK, assignment_M),
  ),
  _add_up_backward,
)


@jax.custom_vjp
def combine(
  rows_MD: jax.Array,
  weights_TK: jax.Array,
  row_TK: jax.Array,
  assignment_M: jax.Array,
) -> jax.Array:
  """Returns `y_t = sum_k weights_TK[t, k] rows_MD[row_TK[t, k]]`.

  The sum is taken in float32. Nothing as large as the rows is kept in between,
  in either direction.

  Args:
    rows_MD: Any rows.
    weights_TK: float32.
    row_TK: int32, as in `permute`.
    assignment_M: int32, as in `permute`.

  Returns:
    [T, D] in the dtype of the rows.
  """
  terms = (
    weights_K[:, None] * _take(rows_MD, row_K).astype(jnp.float32)
    for weights_K, row_K in zip(weights_TK.T, row_TK.T, strict=True)
  )
  return sum(terms, start=jnp.float32(0)).astype(rows_MD.dtype)


def _combine_backward(
  saved: tuple[jax.Array, ...], grad_TD: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
  rows_MD, weights_TK, row_TK, assignment_M = saved
  weight_M = weights_TK.reshape(-1)
  weight_M = weight_M.at[assignment_M].get(mode='fill', fill_value=0)
  grad_MD = _take(grad_TD, assignment_M // row_TK.shape[1]).astype(jnp.float32)
  rows_grad_MD = (weight_M[:, None] * grad_MD).astype(rows_MD.dtype)
  # Of every row on its own, in the order of rows: no second gather of them.
  dot_M = (rows_MD.astype(jnp.float32) * grad_MD).sum(1)
  weights_grad_TK = dot_M.at[row_TK].get(mode='fill', fill_value=0)
  return rows_grad_MD, weights_grad_TK.astype(weights_TK.dtype), None, None


combine.defvjp(
  lambda *operands: (combine(*operands), operands),
  _combine_backward,
)


def weighed(rows_MD: jax.Array, weights_M: jax.Array | None) -> jax.Array:
  """Returns rows times their weights, in the dtype of the rows.

  Args:
    rows_MD: Any rows.
    weights_M: float32; None for 1.
  """
  if weights_M is None:
    return rows_MD
  exact_MD = rows_MD.astype(jnp.float32) * weights_M[:, None]
  return exact_MD.astype(rows_MD.dtype)


def _sum_of_rows(
  rows_MD: jax.Array, row_TK: jax.Array, complete: bool
) -> jax.Array:
  # Row by row: TPUs keep [T, K, D] with K filled up to 8, and sum it slowly.
  terms = (
    _take(rows_MD, row_T, complete).astype(jnp.float32) for row_T in row_TK.T
  )
  return sum(terms, start=jnp.float32(0)).astype(rows_MD.dtype)


def _take(
  rows: jax.Array, index: jax.Array, complete: bool = False
) -> jax.Array:
  if complete:
    return rows.at[index].get(mode='clip')
  return rows.at[index].get(mode='fill', fill_value=0)


def offsets(sizes: jax.Array) -> jax.Array:
  """Returns where segments of these sizes begin, along the last axis."""
  return jnp.cumsum(sizes, axis=-1) - sizes


def fitting(sizes: jax.Array, room: int) -> jax.Array:
  """Returns how much of each segment has room, the first segments first.

  Args:
    sizes: int32, segment after segment along the last axis.
    room: The room for all of them, in rows.
  """
  return jnp.clip(room - offsets(sizes), 0, sizes)


def fitting_on_arrival(sizes_UUN: jax.Array, room: int) -> jax.Array:
  """Returns how many rows from each device have room where they arrive.

  Rooms are filled device by device, expert by expert.

  Args:
    sizes_UUN: int32, the rows from each device to each expert of each device.
    room: The room of a device, in rows.
  """
  by_receiver = sizes_UUN.swapaxes(0, 1)
  queue = by_receiver.reshape(len(by_receiver), -1)
  return fitting(queue, room).reshape(by_receiver.shape).swapaxes(0, 1)


def segment_offsets(
  sizes_J: jax.Array, to_J: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
  """Says where rows go that lie segment after segment and move by segments.

  Args:
    sizes_J: int32, the rows of each segment, num_rows or fewer in all.
    to_J: int32, where the first row of each segment goes.
    num_rows: The length M of the results; rows past the segments follow the
      last one.

  Returns:
    The place of every row and the segment of every row, both int32 [M].
  """
  ends_J = jnp.cumsum(sizes_J)
  row_M = jnp.arange(num_rows, dtype=jnp.int32)
  # A comparison with each of few segments: a binary search is a loop.
  segment_M = jnp.searchsorted(
    ends_J, row_M, side='right', method='compare_all'
  )
  segment_M = jnp.minimum(segment_M, len(sizes_J) - 1)
  return row_M + (to_J - (ends_J - sizes_J))[segment_M], segment_M


def regroup(
  receive_counts_UX: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
  """Says how rows sorted by device, then expert, become sorted by expert.

  Args:
    receive_counts_UX: int32, the rows of each expert from each device.
    num_rows: M, their sum.

  Returns:
    The row that comes to each place and the place of each row, both int32 [M].
  """
  by_device = receive_counts_UX.reshape(-1)
  by_expert = receive_counts_UX.T.reshape(-1)
  row_UX = offsets(by_device).reshape(receive_counts_UX.shape)
  place_UX = offsets(by_expert).reshape(receive_counts_UX.T.shape).T
  source_M, _ = segment_offsets(by_expert, row_UX.T.reshape(-1), num_rows)
  target_M, _ = segment_offsets(by_device, place_UX.reshape(-1), num_rows)
  return source_M, target_M
