"""The grouped matmul on CPU: blocks of rows, each inside one group.

XLA's CPU backend multiplies matrices of known shapes only, and every product
pays once for bringing in its weight. So a group should be one block, and the
block hardly larger than the group: every size of block has its own loop, and a
group goes to the smallest that holds it. Groups far above the mean are cut into
large blocks first, so that cost follows the rows in use, not the most of them.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.experts.grouped_matmul.quantization import accumulator

_STEPS = (8, 10, 12, 14, 16, 18, 20, 24, 32)  # sixteenths of the mean group
_GRAIN = 16  # rows that sizes are multiples of
_SMALLEST = 32  # rows: below, a block costs what its weight costs
_LARGE = 8  # the largest blocks, in the largest of the steps
_LIGHT = 1 << 14  # elements of a weight with which waste is cheap ...
_ONLY = 128  # ... and compiling is not: rows of all blocks


class BlockSizes(NamedTuple):
  """Sizes of blocks, in rows.

  Attributes:
    whole: Falling sizes; a group is cut into these while it is larger.
    last: Rising sizes for what is then left of every group. If there is none,
      the last of `whole` takes that too.
  """

  whole: tuple[int, ...]
  last: tuple[int, ...]


def choose_sizes(
  num_rows: int, num_groups: int, weight_elements: int
) -> BlockSizes:
  """Returns sizes for groups of about `num_rows / num_groups` rows, or fewer.

  Args:
    num_rows: M.
    num_groups: N.
    weight_elements: The number of elements of one group's matrix.
  """
  if weight_elements <= _LIGHT:
    return BlockSizes((min(_ONLY, num_rows),), ())
  mean = -(-num_rows // num_groups)
  sizes = {-(-mean * step // (16 * _GRAIN)) * _GRAIN for step in _STEPS}
  smaller = min(sizes) // 2
  while smaller >= _SMALLEST:
    sizes.add(-(-smaller // _GRAIN) * _GRAIN)
    smaller //= 2
  last = sorted({min(size, num_rows) for size in sizes})
  large = min(_LARGE * last[-1], num_rows)
  return BlockSizes(tuple(sorted({large, last[-1]}, reverse=True)), tuple(last))


def forward(
  rows_MD: jax.Array, weights_NDF: jax.Array, sizes_N: jax.Array
) -> jax.Array:
  """Returns [M, F], 0 outside of all groups; see `grouped_matmul`."""
  block_sizes = _block_sizes(rows_MD, weights_NDF)
  return multiply(rows_MD, weights_NDF, sizes_N, block_sizes=block_sizes)


def backward(
  rows_MD: jax.Array,
  weights_NDF: jax.Array,
  sizes_N: jax.Array,
  grad_MF: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradients of rows and weights."""
  block_sizes = _block_sizes(rows_MD, weights_NDF)
  rows_grad_MD = multiply(
    grad_MF, weights_NDF, sizes_N, block_sizes=block_sizes, transposed=True
  )
  # Summed over blocks in float32, whatever the operands are in.
  weights_grad_NDF = weights_gradient(
    rows_MD, grad_MF, sizes_N, block_sizes=block_sizes
  )
  return rows_grad_MD, weights_grad_NDF.astype(weights_NDF.dtype)


def _block_sizes(rows_MD: jax.Array, weights_NDF: jax.Array) -> BlockSizes:
  num_groups, *weight = weights_NDF.shape
  return choose_sizes(len(rows_MD), num_groups, math.prod(weight))


class _Loop(NamedTuple):
  """Blocks of one size: entries from `begin` to `end` of the tables.

  The tables have one unused entry more: XLA would hoist the work of a one-entry
  loop, and do it even if the loop never runs.

  Attributes:
    size: The rows of each block.
    is_first: Whether every block is the first of its group that is computed.
    group_J: int32, the group of every block.
    first_J: int32, the row that it begins at.
    stop_J: int32, the row that its group ends at.
  """

  size: int
  is_first: bool
  begin: jax.Array | int
  end: jax.Array
  group_J: jax.Array
  first_J: jax.Array
  stop_J: jax.Array


def _loops(
  num_rows: int, sizes_N: jax.Array, block_sizes: BlockSizes
) -> list[_Loop]:
  """Returns all blocks; loops over first blocks come before the others."""
  num_groups = len(sizes_N)
  stop_N = jnp.cumsum(sizes_N)
  first_N, left_N = stop_N - sizes_N, sizes_N
  whole = []
  for size in block_sizes.whole:
    keep = 1 if block_sizes.last or size != block_sizes.whole[-1] else 1 - size
    blocks_N = jnp.maximum(left_N - keep, 0) // size
    ends_N = jnp.cumsum(blocks_N)
    most = -(-num_rows // size) + (0 if block_sizes.last else num_groups)
    nth_J = jnp.arange(most + 1)
    group_J = jnp.searchsorted(
      ends_N, nth_J, side='right', method='scan_unrolled'
    )
    group_J = jnp.minimum(group_J, num_groups - 1)
    nth_J -= (ends_N - blocks_N)[group_J]
    first_J = first_N[group_J] + nth_J * size
    whole.append(
      _Loop(size, False, 0, ends_N[-1], group_J, first_J, stop_N[group_J])
    )
    first_N = first_N + blocks_N * size
    left_N = left_N - blocks_N * size
  return _last_blocks(left_N, first_N, stop_N, block_sizes.last) + whole


def _last_blocks(
  left_N: jax.Array, first_N: jax.Array, stop_N: jax.Array, sizes: tuple
) -> list[_Loop]:
  """Takes for every group that has rows the smallest block that holds them."""
  if not sizes:
    return []
  size_N = (left_N[:, None] > jnp.array(sizes)).sum(1)
  size_N = jnp.where(left_N > 0, size_N, len(sizes))
  group_J = jnp.append(jnp.argsort(size_N), 0)
  tables = group_J, first_N[group_J], stop_N[group_J]
  count = (size_N[:, None] == jnp.arange(len(sizes))).sum(0, dtype=jnp.int32)
  end = jnp.cumsum(count)
  return [
    _Loop(size, True, end[i] - count[i], end[i], *tables)
    for i, size in enumerate(sizes)
  ]


def _window(
  loop: _Loop, i: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the first row of block i, and which rows are its own [size, 1]."""
  # A block that would end behind the last row begins earlier instead.
  first = jnp.minimum(loop.first_J[i], num_rows - loop.size)
  row = first + jnp.arange(loop.size)
  inside = (row >= loop.first_J[i]) & (row < loop.stop_J[i])
  return first, inside[:, None]


def multiply(
  rows_MD: jax.Array,
  weights_NDF: jax.Array,
  sizes_N: jax.Array,
  *,
  block_sizes: BlockSizes,
  transposed: bool = False,
) -> jax.Array:
  """Multiplies every row by its group's matrix, or that matrix transposed.

  Returns:
    [M, F], or of rows [M, F] and `transposed` [M, D]; 0 outside of all groups.
  """
  num_rows = len(rows_MD)
  contracted = 1 if transposed else 0

  def block(loop: _Loop, i: jax.Array, out_MF: jax.Array) -> jax.Array:
    first, inside = _window(loop, i, num_rows)
    rows = lax.dynamic_slice_in_dim(rows_MD, first, loop.size)
    weight = lax.dynamic_index_in_dim(
      weights_NDF, loop.group_J[i], keepdims=False
    )
    product = lax.dot_general(
      rows,
      weight,
      (((1,), (contracted,)), ((), ())),
      preferred_element_type=out_MF.dtype,
    )
    others = lax.dynamic_slice_in_dim(out_MF, first, loop.size)
    mine = jnp.where(inside, product, others)
    return lax.dynamic_update_slice_in_dim(out_MF, mine, first, 0)

  width = weights_NDF.shape[2 - contracted]
  dtype = accumulator(rows_MD.dtype)
  out_MF = jnp.zeros_like(rows_MD, shape=(num_rows, width), dtype=dtype)
  for loop in _loops(num_rows, sizes_N, block_sizes):
    step = functools.partial(block, loop)
    out_MF = lax.fori_loop(loop.begin, loop.end, step, out_MF)
  return out_MF


def weights_gradient(
  rows_MD: jax.Array,
  grad_MF: jax.Array,
  sizes_N: jax.Array,
  *,
  block_sizes: BlockSizes,
) -> jax.Array:
  """Returns `rows^T grad` of every group, [N, D, F], float32; 0 if empty."""
  num_rows = len(rows_MD)
  # XLA's faster matmul takes no transposed left side, so it is transposed here,
  # once; the barrier keeps XLA from doing it in the matmuls again.
  rows_DM = lax.optimization_barrier(rows_MD.T)

  def block(loop: _Loop, i: jax.Array, out_NDF: jax.Array) -> jax.Array:
    first, inside = _window(loop, i, num_rows)
    rows = lax.dynamic_slice_in_dim(rows_DM, first, loop.size, axis=1)
    grad = lax.dynamic_slice_in_dim(grad_MF, first, loop.size)
    if rows.shape[0] < grad.shape[1]:  # the narrower one is enough
      rows = jnp.where(inside.T, rows, 0)
    else:
      grad = jnp.where(inside, grad, 0)
    product = jnp.matmul(rows, grad, preferred_element_type=jnp.float32)
    group = loop.group_J[i]
    if not loop.is_first:  # reading the sum so far costs as much as writing it
      product += lax.dynamic_index_in_dim(out_NDF, group, keepdims=False)
    return lax.dynamic_update_index_in_dim(out_NDF, product, group, 0)

  shape = len(sizes_N), rows_MD.shape[1], grad_MF.shape[1]
  out_NDF = jnp.zeros_like(rows_MD, shape=shape, dtype=jnp.float32)
  for loop in _loops(num_rows, sizes_N, block_sizes):
    step = functools.partial(block, loop)
    out_NDF = lax.fori_loop(loop.begin, loop.end, step, out_NDF)
  return out_NDF
