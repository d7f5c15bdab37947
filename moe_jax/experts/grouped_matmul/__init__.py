"""Sorted rows times weights: the matmul at the heart of dropless MoE.

It has one meaning and several implementations, `GROUPED_MATMULS`. Which one is
best on a device is a matter of measurement, `python -m
benchmarks.grouped_matmul`. A user's own is registered as those below are:

  GROUPED_MATMULS.register('mine')(Implementation(forward, backward))
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from moe_jax.experts.grouped_matmul import (
  blocks,
  megablox,
  padded,
  quantization,
  tokamax,
)
from moe_jax.registry import GROUPED_MATMULS

# (rows_MD, weights_NDF, sizes_N) -> [M, F]
GroupedMatmul = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Implementation(NamedTuple):
  """One way to compute it.

  Attributes:
    forward: (rows_MD, weights_NDF, sizes_N) -> out_MF.
    backward: (rows_MD, weights_NDF, sizes_N, grad_MF) -> the gradients of rows
      and weights.
    obstacle: (device) -> str | None: why it cannot run on such a device.
    kernels: Those of tokamax that it calls; `forward` and `backward` then take
      the keyword `target`, a `tokamax.Target`.
    eight_bits: Whether `forward` also multiplies operands of `quantization`,
      and returns products that their scales are still to be multiplied with.
  """

  forward: Callable[..., jax.Array]
  backward: Callable[..., tuple[jax.Array, jax.Array]]
  obstacle: Callable[[jax.Device], str | None] = lambda device: None
  kernels: tuple[str, ...] = ()
  eight_bits: bool = False


class Choice(NamedTuple):
  """What computes a product, and how precisely.

  Attributes:
    implementation: A name in `GROUPED_MATMULS`; None takes one that needs no
      package, picked by the platform that the program is lowered for.
    target: What kernels of tokamax are traced for.
    quantized: The type of both operands, forward and for the rows' gradient, a
      key of `quantization.DTYPES`; '' leaves them as they are.
  """

  implementation: str | None = None
  target: tokamax.Target = tokamax.HERE
  quantized: str = ''


def grouped_matmul(
  rows_MD: jax.Array,
  weights_NDF: jax.Array,
  sizes_N: jax.Array,
  implementation: str | None = None,
  target: tokamax.Target = tokamax.HERE,
  quantized: str = '',
) -> jax.Array:
  """Returns `rows_MD[m] @ weights_NDF[group of m]` for every row m.

  It is differentiable in rows and weights. Inside `shard_map` all three
  operands must vary over the same mesh axes: a custom gradient cannot know of a
  sum over devices.

  Args:
    rows_MD: Rows sorted by group: the first sizes_N[0] are group 0's, and so
      on. Rows past sum(sizes_N) belong to none, and are finite all the same.
    weights_NDF: One matrix per group, of the rows' dtype.
    sizes_N: int32 group sizes, each >= 0, at most M in all.
    implementation: As in `Choice`.
    target: As in `Choice`.
    quantized: As in `Choice`. Rounding counts as the identity for gradients,
      and the weights' is that of operands as they are.

  Returns:
    [M, F]; rows that belong to no group are 0.
  """
  choice = Choice(implementation, target, quantized)
  return _grouped_matmul(choice, rows_MD, weights_NDF, sizes_N)


@dataclasses.dataclass(frozen=True)
class TunedMatmul:
  """Computes `grouped_matmul` by the best implementation for the shapes.

  Attributes:
    name: The implementation where nothing was measured.
    measured: Pairs of a case, see `case`, and the name of its best.
    device: The device that it is for, as in `tokamax.Target`.
    tiles: Pairs of a case and its tiles, as in `tokamax.Target`.
    quantized: As in `Choice`.
  """

  name: str | None = None
  measured: tuple[tuple[str, str], ...] = ()
  device: jax.Device | None = None
  tiles: tuple[tuple[str, str], ...] = ()
  quantized: str = ''

  def __call__(
    self, rows_MD: jax.Array, weights_NDF: jax.Array, sizes_N: jax.Array
  ) -> jax.Array:
    num_groups, d, f = weights_NDF.shape
    shapes = case(len(rows_MD), num_groups, d, f, rows_MD.dtype)
    name = dict(self.measured).get(shapes, self.name)
    target = tokamax.Target(self.device, dict(self.tiles).get(shapes, ''))
    return grouped_matmul(
      rows_MD, weights_NDF, sizes_N, name, target, self.quantized
    )


def case(
  num_rows: int, num_groups: int, d: int, f: int, dtype: DTypeLike
) -> str:
  """Names the case that a measurement holds for.

  Rows are rounded up to a power of two.
  """
  rounded = 1 << (num_rows - 1).bit_length()
  return f'{rounded} rows, {num_groups} x {d} x {f}, {jnp.dtype(dtype).name}'


def _ragged_dot(
  rows_MD: jax.Array, weights_NDF: jax.Array, sizes_N: jax.Array
) -> jax.Array:
  dtype = quantization.accumulator(rows_MD.dtype)
  if len(weights_NDF) == 1:
    # libtpu 0.0.42 fails on a ragged_dot of one group, in a loop.
    return jnp.matmul(rows_MD, weights_NDF[0], preferred_element_type=dtype)
  return lax.ragged_dot(
    rows_MD, weights_NDF, sizes_N, preferred_element_type=dtype
  )


def _derived(multiply: GroupedMatmul) -> Implementation:
  """Returns an implementation with the gradients that JAX derives."""

  def forward(
    rows_MD: jax.Array, weights_NDF: jax.Array, sizes_N: jax.Array
  ) -> jax.Array:
    return _zeroed(multiply(rows_MD, weights_NDF, sizes_N), sizes_N)

  def backward(
    rows_MD: jax.Array,
    weights_NDF: jax.Array,
    sizes_N: jax.Array,
    grad_MF: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    _, vjp = jax.vjp(
      lambda rows, weights: forward(rows, weights, sizes_N),
      rows_MD,
      weights_NDF,
    )
    rows_grad_MD, weights_grad_NDF = vjp(grad_MF)
    return _zeroed(rows_grad_MD, sizes_N), weights_grad_NDF

  return Implementation(forward, backward, eight_bits=True)


def _by_megablox() -> Implementation:
  """Returns `ragged_dot` with the weights' gradient of `megablox`."""

  def forward(
    rows_MD: jax.Array, weights_NDF: jax.Array, sizes_N: jax.Array
  ) -> jax.Array:
    return _zeroed_if_any(_ragged_dot(rows_MD, weights_NDF, sizes_N), sizes_N)

  def backward(
    rows_MD: jax.Array,
    weights_NDF: jax.Array,
    sizes_N: jax.Array,
    grad_MF: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    _, vjp = jax.vjp(
      lambda rows: _ragged_dot(rows, weights_NDF, sizes_N), rows_MD
    )
    rows_grad_MD = _zeroed_if_any(vjp(grad_MF)[0], sizes_N)
    return rows_grad_MD, megablox.weights_gradient(rows_MD, sizes_N, grad_MF)

  return Implementation(forward, backward, megablox.obstacle, eight_bits=True)


def _zeroed(rows: jax.Array, sizes_N: jax.Array) -> jax.Array:
  """Zeroes rows of no group."""
  used_M = jnp.arange(len(rows)) < sizes_N.sum()
  return jnp.where(used_M[:, None], rows, 0)


def _zeroed_if_any(rows: jax.Array, sizes_N: jax.Array) -> jax.Array:
  """Zeroes rows of no group, if there are any: mostly there are none."""
  return lax.cond(
    sizes_N.sum() < len(rows), _zeroed, lambda rows, _: rows, rows, sizes_N
  )


def by_tokamax(rows: str, weights: str | None = None) -> Implementation:
  """Returns the implementation by kernels of tokamax; see `tokamax.Kernels`.

  Args:
    rows: The kernel of products of rows.
    weights: The kernel of the weights' gradient; None for the same.
  """
  kernels = tokamax.Kernels(rows, weights or rows)
  return Implementation(
    functools.partial(tokamax.forward, kernels=kernels),
    functools.partial(tokamax.backward, kernels=kernels),
    functools.partial(tokamax.obstacle, kernels=kernels),
    kernels,
    eight_bits=rows == tokamax.TRITON,
  )


GROUPED_MATMULS.register('blocks')(
  Implementation(blocks.forward, blocks.backward, eight_bits=True)
)
GROUPED_MATMULS.register('ragged_dot')(_derived(_ragged_dot))
GROUPED_MATMULS.register('padded')(
  Implementation(padded.forward, padded.backward, eight_bits=True)
)
GROUPED_MATMULS.register('megablox')(_by_megablox())
GROUPED_MATMULS.register('triton')(by_tokamax(tokamax.TRITON))
GROUPED_MATMULS.register('mosaic')(by_tokamax(tokamax.MOSAIC))
GROUPED_MATMULS.register('mosaic+triton')(
  by_tokamax(tokamax.MOSAIC, tokamax.TRITON)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(
  choice: Choice, rows_MD: jax.Array, weights_NDF: jax.Array, sizes_N: jax.Array
) -> jax.Array:
  if choice.quantized:
    return _quantized_product(choice, rows_MD, weights_NDF, sizes_N)
  return _run('forward', choice, rows_MD, weights_NDF, sizes_N)


def _quantized_product(
  choice: Choice, rows_MD: jax.Array, weights_NDF: jax.Array, sizes_N: jax.Array
) -> jax.Array:
  """Returns the product of both operands in eight bits, in the rows' dtype."""
  rows = quantization.quantize(rows_MD, choice.quantized, axes=(1,))
  weights = quantization.quantize(weights_NDF, choice.quantized, axes=(0, 1))
  out_MF = _run('forward', choice, rows.values, weights.values, sizes_N)
  out_MF = out_MF.astype(jnp.float32) * rows.scale * weights.scale[0]
  return out_MF.astype(rows_MD.dtype)


def _run(direction: str, choice: Choice, *operands: jax.Array) -> Any:
  if choice.implementation is None:
    return _by_platform(direction, *operands)
  chosen = GROUPED_MATMULS[choice.implementation]
  options = {'target': choice.target} if chosen.kernels else {}
  return getattr(chosen, direction)(*operands, **options)


def _by_platform(direction: str, *operands: jax.Array) -> Any:
  # On CPU and CUDA XLA computes `ragged_dot` densely, every row with every
  # matrix.
  return lax.platform_dependent(
    *operands,
    cpu=getattr(GROUPED_MATMULS['blocks'], direction),
    cuda=getattr(GROUPED_MATMULS['padded'], direction),
    default=getattr(GROUPED_MATMULS['ragged_dot'], direction),
  )


def _forward(
  choice: Choice, *operands: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return _grouped_matmul(choice, *operands), operands


def _backward(
  choice: Choice, operands: tuple[jax.Array, ...], grad_MF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  rows_grad_MD, weights_grad_NDF = _run('backward', choice, *operands, grad_MF)
  if choice.quantized:
    # Takes the place of the other, which so is never computed. The weights' is
    # a sum over rows, out of which the scales of rows do not come.
    _, weights_NDF, sizes_N = operands
    rows_grad_MD = _quantized_product(
      choice, grad_MF, weights_NDF.swapaxes(1, 2), sizes_N
    )
  return rows_grad_MD, weights_grad_NDF, None


_grouped_matmul.defvjp(_forward, _backward)
