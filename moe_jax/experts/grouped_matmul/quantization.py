"""Operands of eight bits, for products of rows with their group's matrix.

Rows have a scale each, matrices one for each of their columns, which all groups
of a device share; so scales leave the sum, and a kernel multiplies eight bits
alone. A scale is the largest magnitude over the largest number of the type.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe_jax.parallel.devices import capability

# The values of `moe.quantization`. Gradients have 3 bits of mantissa like all
# else, not the wider range of e5m2: their rows have a scale each.
DTYPES = {'int8': jnp.int8, 'fp8': jnp.float8_e4m3fn}

_ACCUMULATORS = {
  jnp.dtype(jnp.int8): jnp.dtype(jnp.int32),
  jnp.dtype(jnp.float8_e4m3fn): jnp.dtype(jnp.float32),
}

# TPUs that multiply eight bits as they are; others widen them first.
_TPUS = {
  'int8': ('TPU v5 lite', 'TPU v5', 'TPU v6 lite'),
  'fp8': ('TPU7x',),
}
# The least compute capability of GPUs whose tensor cores do.
_CAPABILITIES = {'int8': (8, 0), 'fp8': (8, 9)}


class Quantized(NamedTuple):
  """An array of eight bits, and what it is to be multiplied by.

  Attributes:
    values: int8 or float8.
    scale: float32, with axes of 1 where it is shared.
  """

  values: jax.Array
  scale: jax.Array


def quantize(array: jax.Array, name: str, axes: tuple[int, ...]) -> Quantized:
  """Returns an array in eight bits.

  Args:
    array: Numbers; where one is not finite, its scale is not either.
    name: A key of `DTYPES`.
    axes: Those along which a scale is shared.
  """
  dtype = DTYPES[name]
  array = array.astype(jnp.float32)
  magnitude = jnp.abs(array).max(axes, keepdims=True)
  scale = jnp.where(magnitude == 0, 1, magnitude) / _largest(dtype)
  values = array / scale
  if jnp.issubdtype(dtype, jnp.integer):
    values = jnp.round(values)
  return Quantized(values.astype(dtype), scale)


def _largest(dtype: DTypeLike) -> float:
  if jnp.issubdtype(dtype, jnp.integer):
    return float(jnp.iinfo(dtype).max)
  return float(jnp.finfo(dtype).max)


def accumulator(dtype: DTypeLike) -> jnp.dtype:
  """Returns the type that products of a type leave a matmul in."""
  dtype = jnp.dtype(dtype)
  return _ACCUMULATORS.get(dtype, dtype)


def obstacle(name: str, device: jax.Device) -> str | None:
  """Returns why a device gains nothing by such operands, or None.

  A CPU gains nothing either: it computes what the others do, for tests.

  Args:
    name: A key of `DTYPES`.
    device: A device of the kind that the program is for; it need not be here.
  """
  if device.platform == 'cpu':
    return None
  if device.platform == 'gpu':
    least = _CAPABILITIES[name]
    if capability(device) >= least:
      return None
    needed = '.'.join(map(str, least))
    has = getattr(device, 'compute_capability', 'none')
    return f'needs compute capability {needed}, and this is {has}'
  if device.device_kind in _TPUS.get(name, ()):
    return None
  return f'is multiplied by {", ".join(_TPUS[name])}, not by this TPU'
