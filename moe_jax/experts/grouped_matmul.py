"""Sorted rows times a bank of weights: the matmul at the heart of dropless MoE.

`grouped_matmul` has one meaning and one implementation per backend, picked
when the program is lowered. On CPU `lax.ragged_dot` computes every group
densely, so there the rows are cut into blocks that lie inside one group each;
elsewhere it is `lax.ragged_dot`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.experts import row_blocks


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


def _rungs(rows: jax.Array, bank_NDF: jax.Array) -> row_blocks.Ladder:
  num_groups, *weight = bank_NDF.shape
  return row_blocks.ladder(len(rows), num_groups, math.prod(weight))


def _blocks(
  rows_MD: jax.Array, bank_NDF: jax.Array, sizes_N: jax.Array
) -> jax.Array:
  rungs = _rungs(rows_MD, bank_NDF)
  return row_blocks.multiply(rows_MD, bank_NDF, sizes_N, rungs=rungs)


def _blocks_backward(
  rows_MD: jax.Array,
  bank_NDF: jax.Array,
  sizes_N: jax.Array,
  grad_MF: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  rungs = _rungs(rows_MD, bank_NDF)
  rows_grad_MD = row_blocks.multiply(
    grad_MF, bank_NDF, sizes_N, rungs=rungs, transposed=True
  )
  # Summed over blocks in float32, whatever the operands are in.
  bank_grad_NDF = row_blocks.bank_gradient(
    rows_MD, grad_MF, sizes_N, rungs=rungs
  )
  return rows_grad_MD, bank_grad_NDF.astype(bank_NDF.dtype)


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
