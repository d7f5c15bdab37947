"""Sizes of mesh axes: what they multiply to, and what is left for one."""

import math
from collections.abc import Iterable

from moe_jax.errors import UserError


def fill(
  sizes: dict[str, int], section: str, total: int, of: str
) -> dict[str, int]:
  """`sizes` of axes, one of -1 having taken what the others leave of `total`.

  Args:
    sizes: by axis, as the config has them.
    section: of the config.
    total: what they have to multiply to ...
    of: ... the name of these things.

  Raises:
    UserError: they do not.
  """
  for axis, size in sizes.items():
    if size < 1 and size != -1:
      raise UserError(f'{section}.{axis} = {size} must be at least 1, or -1')
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1:
    names = ' and '.join(f'{section}.{axis}' for axis in free)
    many = 'both' if len(free) == 2 else 'all'
    raise UserError(
      f'{names} are {many} -1; only one axis can take what is left'
    )
  fixed = {axis: size for axis, size in sizes.items() if size != -1}
  product = math.prod(fixed.values())
  if free and total % product == 0:
    return sizes | {free[0]: total // product}
  if free:
    raise UserError(
      f'{_product(section, fixed)} does not divide the number of'
      f' {of}, {total}; choose axes whose product does'
    )
  if product != total:
    raise UserError(
      f'{_product(section, fixed)}, but the number of {of} is'
      f' {total}; change an axis, or set one to -1: what is left'
    )
  return sizes


def _product(section: str, axes: dict[str, int]) -> str:
  """`mesh.data x mesh.fsdp = 2 x 4 = 8`."""
  names = [f'{section}.{axis}' for axis in axes]
  return f'{written_out(names, axes.values())} = {math.prod(axes.values())}'


def written_out(names: Iterable[str], sizes: Iterable[int]) -> str:
  """`a x b = 2 x 4`."""
  return f'{" x ".join(names)} = {" x ".join(map(str, sizes))}'
