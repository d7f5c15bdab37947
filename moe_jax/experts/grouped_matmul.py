"""Sorted rows times a bank of weights: the matmul at the heart of dropless MoE.

`grouped_matmul` has one meaning and one implementation per backend, picked
when the program is lowered. On CPU `lax.ragged_dot` computes every group
densely, so there the rows are cut into blocks that lie inside one group each;
elsewhere it is `lax.ragged_dot`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_BLOCK = 128  # rows: large enough for the matmul, small enough to waste little


def grouped_matmul(
  rows_MD: jax.Array, bank_NDF: jax.Array, sizes_N: jax.Array
) -> jax.Array:
  """`rows_MD[m] @ bank_NDF[group of m]`, differentiable in rows and bank.

  Inside `shard_map` all three must vary over the same mesh axes: a custom
  gradient cannot know of a sum over devices.

  Args:
    rows_MD: rows sorted by group: the first sizes_N[0] are group 0's, and so
      on. Rows past sum(sizes_N) belong to none.
    bank_NDF: one matrix per group, of the rows' dtype.
    sizes_N: int32 group sizes, each >= 0, at most M in all.

  Returns:
    [M, F]; rows that belong to no group are 0.
  """
  return _grouped_matmul(rows_MD, bank_NDF, sizes_N)


class Implementation(NamedTuple):
  """One way to compute it.

  Attributes:
    forward: (rows_MD, bank_NDF, sizes_N) -> out_MF.
    backward: (rows_MD, bank_NDF, sizes_N, grad_MF) -> the gradients of rows
      and bank.
  """

  forward: Callable[..., jax.Array]
  backward: Callable[..., tuple[jax.Array, jax.Array]]


def _ragged(
  rows_MD: jax.Array, bank_NDF: jax.Array, sizes_N: jax.Array
) -> jax.Array:
  if len(bank_NDF) == 1:
    # libtpu 0.0.42 fails on a ragged_dot of one group, in a loop.
    out_MF = rows_MD @ bank_NDF[0]
  else:
    out_MF = lax.ragged_dot(rows_MD, bank_NDF, sizes_N)
  used_M = jnp.arange(len(rows_MD)) < sizes_N.sum()
  return jnp.where(used_M[:, None], out_MF, 0)


def _ragged_backward(
  rows_MD: jax.Array,
  bank_NDF: jax.Array,
  sizes_N: jax.Array,
  grad_MF: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  _, vjp = jax.vjp(
    lambda rows, bank: _ragged(rows, bank, sizes_N), rows_MD, bank_NDF
  )
  return vjp(grad_MF)


def _block_table(
  num_rows: int, sizes_N: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Cuts groups into blocks, none of which spans two groups.

  Returns:
    The number of blocks in use; and for each of the most there can be, its
    group, its first row and the row where its group ends.
  """
  num_groups = len(sizes_N)
  blocks_N = -(-sizes_N // _BLOCK)
  last_N = jnp.cumsum(blocks_N)
  ids = jnp.arange(-(-num_rows // _BLOCK) + num_groups)
  group = jnp.searchsorted(last_N, ids, side='right')
  group = jnp.minimum(group, num_groups - 1)
  end_N = jnp.cumsum(sizes_N)
  nth_in_group = ids - (last_N - blocks_N)[group]
  first = (end_N - sizes_N)[group] + nth_in_group * _BLOCK
  return last_N[-1], group, first, end_N[group]


def _pad_rows(rows_MD: jax.Array) -> jax.Array:
  return jnp.pad(rows_MD, ((0, _BLOCK), (0, 0)))


def _blocks(
  rows_MD: jax.Array,
  bank_NDF: jax.Array,
  sizes_N: jax.Array,
  contract: int = 1,
) -> jax.Array:
  """Block by block; `contract` is the bank's axis that meets the rows'."""
  num_rows = len(rows_MD)
  num_blocks, group, first, _ = _block_table(num_rows, sizes_N)
  padded_MD = _pad_rows(rows_MD)

  def block(i: jax.Array, out_MF: jax.Array) -> jax.Array:
    weight = lax.dynamic_index_in_dim(bank_NDF, group[i], keepdims=False)
    rows = lax.dynamic_slice_in_dim(padded_MD, first[i], _BLOCK)
    product = lax.dot_general(rows, weight, (((1,), (contract - 1,)), ((), ())))
    # A group's last block spills over into the next group's rows; that group's
    # own blocks come later and overwrite them.
    return lax.dynamic_update_slice_in_dim(out_MF, product, first[i], 0)

  width = bank_NDF.shape[3 - contract]
  out_MF = jnp.zeros_like(padded_MD, shape=(num_rows + _BLOCK, width))
  out_MF = lax.fori_loop(0, num_blocks, block, out_MF)[:num_rows]
  return jnp.where((jnp.arange(num_rows) < sizes_N.sum())[:, None], out_MF, 0)


def _blocks_backward(
  rows_MD: jax.Array,
  bank_NDF: jax.Array,
  sizes_N: jax.Array,
  grad_MF: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  grad_rows_MD = _blocks(grad_MF, bank_NDF, sizes_N, contract=2)
  num_blocks, group, first, end = _block_table(len(rows_MD), sizes_N)
  padded_MD, padded_MF = _pad_rows(rows_MD), _pad_rows(grad_MF)

  def block(i: jax.Array, out_NDF: jax.Array) -> jax.Array:
    rows = lax.dynamic_slice_in_dim(padded_MD, first[i], _BLOCK)
    grad = lax.dynamic_slice_in_dim(padded_MF, first[i], _BLOCK)
    inside = first[i] + jnp.arange(_BLOCK) < end[i]
    product = lax.dot_general(
      rows,
      jnp.where(inside[:, None], grad, 0),
      (((0,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    total = lax.dynamic_index_in_dim(out_NDF, group[i], keepdims=False)
    return lax.dynamic_update_index_in_dim(
      out_NDF, total + product, group[i], 0
    )

  # Summed over blocks in float32, whatever the operands are in.
  grad_NDF = jnp.zeros_like(bank_NDF, dtype=jnp.float32)
  grad_NDF = lax.fori_loop(0, num_blocks, block, grad_NDF)
  return grad_rows_MD, grad_NDF.astype(bank_NDF.dtype)


BLOCKS = Implementation(_blocks, _blocks_backward)
RAGGED = Implementation(_ragged, _ragged_backward)


@jax.custom_vjp
def _grouped_matmul(
  rows_MD: jax.Array, bank_NDF: jax.Array, sizes_N: jax.Array
) -> jax.Array:
  return lax.platform_dependent(
    rows_MD, bank_NDF, sizes_N, cpu=BLOCKS.forward, default=RAGGED.forward
  )


def _forward(
  *operands: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return _grouped_matmul(*operands), operands


def _backward(
  operands: tuple[jax.Array, ...], grad_MF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  grads = lax.platform_dependent(
    *operands, grad_MF, cpu=BLOCKS.backward, default=RAGGED.backward
  )
  return *grads, None


_grouped_matmul.defvjp(_forward, _backward)
