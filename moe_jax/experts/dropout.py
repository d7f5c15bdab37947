"""Dropout that depends on keys alone: not on mesh, dispatch or row order."""

import jax
import jax.numpy as jnp
from jax import lax


def dropout(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
  """Zeroes a share `rate` of the elements and scales the others up.

  Args:
    x: An array of any shape.
    rate: The share, below 1; 0 costs nothing.
    rng: The PRNG key; None, as in evaluation, leaves `x` as it is.
  """
  if not rate or rng is None:
    return x
  return _scale(x, jax.random.bernoulli(rng, 1 - rate, x.shape), rate)


def dropout_rows(
  hidden: jax.Array,
  rate: float,
  seeds: jax.Array | None,
  *,
  num_units: int,
  first_unit: jax.Array | int,
) -> jax.Array:
  """Applies dropout to rows, each of which brings the seed of its own mask.

  Wherever a row goes, to whichever device and in whatever order, its mask is
  the same. Devices that hold a part of the units take their part of the mask.

  Args:
    hidden: [..., units on this device].
    rate: The share of units, as in `dropout`.
    seeds: uint32 [...]; None leaves `hidden` as it is.
    num_units: The number of units of a whole row.
    first_unit: The number of the first unit on this device.
  """
  if not rate or seeds is None:
    return hidden

  def row(seed: jax.Array) -> jax.Array:
    # The other generators give other bits when many rows are drawn at once.
    rng = jax.random.key(seed, impl='threefry2x32')
    return jax.random.bernoulli(rng, 1 - rate, (num_units,))

  kept = jax.vmap(row)(seeds.reshape(-1))
  if hidden.shape[-1] != num_units:
    kept = lax.dynamic_slice_in_dim(kept, first_unit, hidden.shape[-1], axis=1)
  return _scale(hidden, kept.reshape(hidden.shape), rate)


def _scale(x: jax.Array, kept: jax.Array, rate: float) -> jax.Array:
  return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
