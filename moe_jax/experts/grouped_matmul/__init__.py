"""Sorted rows times a bank of weights: the matmul at the heart of dropless MoE.

One meaning, several implementations: `IMPLEMENTATIONS`. Which one is best on a
device is a matter of measurement, `python -m benchmarks.grouped_matmul`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.experts.grouped_matmul import blocks, padded, tokamax

# (rows_MD, weights_NDF, sizes_N) -> [M, F]
GroupedMatmul = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Implementation(NamedTuple):
  """One way to compute it.

  Attributes:
    forward: (rows_MD, weights_NDF, sizes_N) -> out_MF.
    backward: (rows_MD, weights_NDF, sizes_N, grad_MF) -> the gradients of rows
      and bank.
  """

  forward: GroupedMatmul
  backward: Callable[..., tuple[jax.Array, jax.Array]]


def grouped_matmul(
  rows_MD: jax.Array,
  weights_NDF: jax.Array,
  sizes_N: jax.Array,
  implementation: str | None = None,
) -> jax.Array:
  """`rows_MD[m] @ weights_NDF[group of m]`, differentiable in rows and bank.

  Inside `shard_map` all three must vary over the same mesh axes: a custom
  gradient cannot know of a sum over devices.

  Args:
    rows_MD: rows sorted by group: the first sizes_N[0] are group 0's, and so
      on. Rows past sum(sizes_N) belong to none, and are finite all the same.
    weights_NDF: one matrix per group, of the rows' dtype.
    sizes_N: int32 group sizes, each >= 0, at most M in all.
    implementation: a name in `IMPLEMENTATIONS`; None for one that needs no
      package, picked by the platform that the program is lowered for.

  Returns:
    [M, F]; rows that belong to no group are 0.
  """
  return _grouped_matmul(implementation, rows_MD, weights_NDF, sizes_N)


@dataclasses.dataclass(frozen=True)
class TunedMatmul:
  """`grouped_matmul` by the implementation that is best for the shapes.

  Attributes:
    name: of the implementation where nothing was measured.
    measured: pairs of a case, see `case`, and the name of its best.
  """

  name: str | None = None
  measured: tuple[tuple[str, str], ...] = ()

  def __call__(
    self, rows_MD: jax.Array, weights_NDF: jax.Array, sizes_N: jax.Array
  ) -> jax.Array:
    measured = dict(self.measured)
    of_shapes = case(len(rows_MD), *weights_NDF.shape, rows_MD.dtype)
    name = measured.get(of_shapes, self.name)
    return grouped_matmul(rows_MD, weights_NDF, sizes_N, name)


def case(num_rows: int, num_groups: int, d: int, f: int, dtype: object) -> str:
  """What a measurement holds for; rows are rounded up to a power of two."""
  rounded = 1 << (num_rows - 1).bit_length()
  return f'{rounded} rows, {num_groups} x {d} x {f}, {jnp.dtype(dtype).name}'


def _ragged(
  rows_MD: jax.Array, weights_NDF: jax.Array, sizes_N: jax.Array
) -> jax.Array:
  if len(weights_NDF) == 1:
    # libtpu 0.0.42 fails on a ragged_dot of one group, in a loop.
    return rows_MD @ weights_NDF[0]
  return lax.ragged_dot(rows_MD, weights_NDF, sizes_N)


def _derived(multiply: GroupedMatmul) -> Implementation:
  """With the gradients that `multiply` has of itself."""

  def forward(
    rows_MD: jax.Array, weights_NDF: jax.Array, sizes_N: jax.Array
  ) -> jax.Array:
    out_MF = multiply(rows_MD, weights_NDF, sizes_N)
    used_M = jnp.arange(len(rows_MD)) < sizes_N.sum()
    return jnp.where(used_M[:, None], out_MF, 0)

  def backward(
    rows_MD: jax.Array,
    weights_NDF: jax.Array,
    sizes_N: jax.Array,
    grad_MF: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    _, vjp = jax.vjp(
      lambda rows, bank: forward(rows, bank, sizes_N), rows_MD, weights_NDF
    )
    rows_grad_MD, weights_grad_NDF = vjp(grad_MF)
    used_M = jnp.arange(len(rows_MD)) < sizes_N.sum()
    return jnp.where(used_M[:, None], rows_grad_MD, 0), weights_grad_NDF

  return Implementation(forward, backward)


def _block_sizes(rows: jax.Array, weights_NDF: jax.Array) -> blocks.BlockSizes:
  num_groups, *weight = weights_NDF.shape
  return blocks.choose_sizes(len(rows), num_groups, math.prod(weight))


def _blocks(
  rows_MD: jax.Array, weights_NDF: jax.Array, sizes_N: jax.Array
) -> jax.Array:
  block_sizes = _block_sizes(rows_MD, weights_NDF)
  return blocks.multiply(rows_MD, weights_NDF, sizes_N, block_sizes=block_sizes)


def _blocks_backward(
  rows_MD: jax.Array,
  weights_NDF: jax.Array,
  sizes_N: jax.Array,
  grad_MF: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  block_sizes = _block_sizes(rows_MD, weights_NDF)
  rows_grad_MD = blocks.multiply(
    grad_MF, weights_NDF, sizes_N, block_sizes=block_sizes, transposed=True
  )
  # Summed over blocks in float32, whatever the operands are in.
  weights_grad_NDF = blocks.weights_gradient(
    rows_MD, grad_MF, sizes_N, block_sizes=block_sizes
  )
  return rows_grad_MD, weights_grad_NDF.astype(weights_NDF.dtype)


def by_tokamax(kernel: str) -> Implementation:
  """That of a kernel of `tokamax.multiply`."""
  return Implementation(
    functools.partial(tokamax.multiply, kernel=kernel),
    functools.partial(tokamax.gradients, kernel=kernel),
  )


IMPLEMENTATIONS = {
  'blocks': Implementation(_blocks, _blocks_backward),
  'ragged_dot': _derived(_ragged),
  'padded': Implementation(padded.multiply, padded.gradients),
  'triton': by_tokamax('triton'),
  'mosaic': by_tokamax('mosaic'),
}


def _run(implementation: str | None, part: str, *operands: jax.Array) -> object:
  if implementation is not None:
    return getattr(IMPLEMENTATIONS[implementation], part)(*operands)
  # XLA computes `ragged_dot` densely on CPU, every row with every matrix.
  return lax.platform_dependent(
    *operands,
    cpu=getattr(IMPLEMENTATIONS['blocks'], part),
    default=getattr(IMPLEMENTATIONS['ragged_dot'], part),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(
  implementation: str | None,
  rows_MD: jax.Array,
  weights_NDF: jax.Array,
  sizes_N: jax.Array,
) -> jax.Array:
  return _run(implementation, 'forward', rows_MD, weights_NDF, sizes_N)


def _forward(
  implementation: str | None, *operands: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return _grouped_matmul(implementation, *operands), operands


def _backward(
  implementation: str | None,
  operands: tuple[jax.Array, ...],
  grad_MF: jax.Array,
) -> tuple[jax.Array, jax.Array, None]:
  return *_run(implementation, 'backward', *operands, grad_MF), None


_grouped_matmul.defvjp(_forward, _backward)
