"""On TPUs: `lax.ragged_dot`, and the weights' gradient by a kernel of JAX.

libtpu computes the product of rows with weights by a kernel of its own. The
weights' gradient it computes densely, every group with all rows, and skips what
lies in no group; but not where it lets the fusion bring parameters along for a
later matmul, as it does with parameters that `fsdp` splits. A Pallas kernel is
never dense.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from moe_jax.experts.grouped_matmul.tokamax import unchecked

_PACKAGE = 'jax.experimental.pallas.ops.tpu.megablox'
_LANES = 128
# Of rows, and the bytes of either side of a weight: MaxText's default in 16
# bits, which fits where a kernel may take 16 MiB.
_ROWS, _SIDE_BYTES = 512, 2048


def weights_gradient(
  rows_MD: jax.Array,
  sizes_N: jax.Array,
  grad_MF: jax.Array,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Returns the gradient [N, D, F] of weights, in the dtype of the rows.

  Args:
    rows_MD: Rows sorted by group, as in `grouped_matmul`.
    sizes_N: int32, the rows of each group.
    grad_MF: The gradient of their products.
    interpret: Whether to run the kernel's program on any device, slowly.
  """
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  padding = ((0, -len(rows_MD) % _LANES), (0, 0))
  rows_MD, grad_MF = jnp.pad(rows_MD, padding), jnp.pad(grad_MF, padding)
  side = _SIDE_BYTES // rows_MD.dtype.itemsize
  tiling = (
    _tile(len(rows_MD), _ROWS),
    _tile(rows_MD.shape[1], side),
    _tile(grad_MF.shape[1], side),
  )

  @functools.partial(jax.jit, inline=True)
  def kernel(
    rows_MD: jax.Array, grad_MF: jax.Array, sizes_N: jax.Array
  ) -> jax.Array:
    return tgmm(
      rows_MD.T, grad_MF, sizes_N, rows_MD.dtype, tiling, interpret=interpret
    )

  return unchecked(kernel)(rows_MD, grad_MF, sizes_N)


def obstacle(device: jax.Device) -> str | None:
  """Returns why it cannot run on a device, or None."""
  if device.platform != 'tpu':
    return f'runs on TPUs, not on {device.platform}'
  if importlib.util.find_spec(_PACKAGE) is None:
    return f'needs {_PACKAGE}, which this jax has not'
  return None


def _tile(length: int, most: int) -> int:
  """Returns the largest tile of whole lanes that divides a length, or that."""
  fitting = (
    n for n in range(most, 0, -_LANES) if length % n == 0 or length < n
  )
  return min(next(fitting, most), length)
