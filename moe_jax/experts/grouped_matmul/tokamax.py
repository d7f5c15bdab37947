"""Grouped matmuls of the package tokamax: Pallas kernels for GPU and TPU.

tokamax is optional and slow to import, so this happens where it is used.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.devices import capability


def _product(
  contracting: tuple[int, int], group_dimensions: list[int]
) -> lax.RaggedDotDimensionNumbers:
  """Describes a product of rows, sorted by group, with a second operand."""
  one, other = contracting
  return lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([one], [other]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=group_dimensions,
  )


_TILE = 128  # of rows and columns; Mosaic's kernels want no less

# The three that the kernels have; the letters are those of the operands.
_MD_NDF = _product((1, 1), [0])
_MF_NDF = _product((1, 2), [0])
_MD_MF = _product((0, 0), [])


def installed() -> bool:
  """Returns whether tokamax can be imported."""
  return importlib.util.find_spec('tokamax') is not None


@functools.cache
def missing(kernel: str) -> str | None:
  """Returns what tokamax, if installed, says of a kernel it lacks here.

  Its versions differ in their kernels, and in the packages these need. Mosaic's
  depend on the default device too.
  """
  rows = jax.ShapeDtypeStruct((_TILE, _TILE), jnp.bfloat16)
  weights = jax.ShapeDtypeStruct((1, _TILE, _TILE), jnp.bfloat16)
  sizes = jax.ShapeDtypeStruct((1,), jnp.int32)
  try:
    jax.eval_shape(
      functools.partial(forward, kernel=kernel), rows, weights, sizes
    )
    jax.eval_shape(
      functools.partial(backward, kernel=kernel), rows, weights, sizes, rows
    )
  except (ImportError, NotImplementedError, ValueError) as error:
    return str(error)
  return None


def obstacle(device: jax.Device, *, kernel: str) -> str | None:
  """Returns why a kernel of `forward` cannot run on a device, or None.

  Args:
    device: A device of the kind that the program is for; it need not be here.
    kernel: 'triton' or 'mosaic'.
  """
  on_tpu = device.platform == 'tpu'
  if not (on_tpu and kernel == 'mosaic'):
    least = (8, 0) if kernel == 'triton' else (9, 0)
    if reason := _gpu_obstacle(device, least):
      return reason
  if kernel == 'mosaic' and device not in jax.devices():
    return 'is compiled only where such a device is'
  return _tokamax_obstacle(kernel, 'tpu' if on_tpu else 'cuda')


def _gpu_obstacle(device: jax.Device, least: tuple[int, int]) -> str | None:
  if device.platform != 'gpu':
    return f'does not run on {device.platform}'
  if capability(device) < least:
    needed = '.'.join(map(str, least))
    has = getattr(device, 'compute_capability', 'none')
    return f'needs compute capability {needed}, and this is {has}'
  return None


def _tokamax_obstacle(kernel: str, extra: str) -> str | None:
  if not installed():
    return f"needs the package tokamax: pip install 'moe_jax[{extra}]'"
  if reason := missing(kernel):
    version = importlib.metadata.version('tokamax')
    return f'is not in tokamax {version}, which says {reason!r}'
  return None


def forward(
  rows_MD: jax.Array, weights_NDF: jax.Array, sizes_N: jax.Array, *, kernel: str
) -> jax.Array:
  """Returns [M, F], 0 outside of all groups.

  Args:
    rows_MD: Rows sorted by group, as in `grouped_matmul`.
    weights_NDF: One matrix per group.
    sizes_N: int32, the rows of each group.
    kernel: 'triton', for NVIDIA GPUs from compute capability 8.0; 'mosaic',
      for those of 9.0 and TPUs from generation 5; 'xla', which is
      `lax.ragged_dot`.
  """
  out_MF = _run(kernel, _MD_NDF, rows_MD, weights_NDF, sizes_N)
  return _in_groups(out_MF, sizes_N)


def backward(
  rows_MD: jax.Array,
  weights_NDF: jax.Array,
  sizes_N: jax.Array,
  grad_MF: jax.Array,
  *,
  kernel: str,
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradients of the rows and of the weights; see `forward`."""
  if kernel == 'triton':
    # The kernel transposes the weights, and XLA would turn that into a layout
    # of the parameters they come from: a transposed copy, in float32, of those
    # of all layers together.
    weights_NDF = with_layout_constraint(weights_NDF, Layout((0, 1, 2)))
  rows_grad_MD = _run(kernel, _MF_NDF, grad_MF, weights_NDF, sizes_N)
  weights_grad_NDF = _run(kernel, _MD_MF, rows_MD, grad_MF, sizes_N)
  # tokamax's issue 887: of an empty group Triton's kernel multiplies the rows
  # before it, which may be anything.
  empty_N = (sizes_N == 0)[:, None, None]
  return (
    _in_groups(rows_grad_MD, sizes_N),
    jnp.where(empty_N, 0, weights_grad_NDF),
  )


def _in_groups(rows: jax.Array, sizes_N: jax.Array) -> jax.Array:
  used_M = jnp.arange(len(rows)) < sizes_N.sum()
  return jnp.where(used_M[:, None], rows, 0)


def _run(
  kernel: str,
  dimensions: lax.RaggedDotDimensionNumbers,
  rows: jax.Array,
  other: jax.Array,
  sizes_N: jax.Array,
) -> jax.Array:
  import tokamax

  def dot(rows: jax.Array, other: jax.Array, sizes_N: jax.Array) -> jax.Array:
    return tokamax.ragged_dot_general(
      rows,
      other,
      tokamax.RaggedDotGroupSizes(sizes_N, len(rows)),
      dimensions,
      preferred_element_type=rows.dtype,
      # A list of one: with None tokamax would try others without a word.
      implementation=[kernel],
    )

  with _settings():
    return unchecked(dot)(rows, other, sizes_N)


def unchecked(
  kernel: Callable[..., jax.Array],
) -> Callable[..., jax.Array]:
  """Returns the same where a `shard_map` checks along which axes values vary.

  Kernels written in Pallas do not say it of their results, and so are refused.
  But a `shard_map` within, over the axes that are manual already, adds nothing
  to the program and need not check. What comes out varies as what went in.
  """

  @functools.wraps(kernel)
  def wrapped(*operands: jax.Array) -> jax.Array:
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if not axes:
      return kernel(*operands)
    within = jax.shard_map(
      kernel, in_specs=P(), out_specs=P(), axis_names={*axes}, check_vma=False
    )
    out = jax.jit(within)(*operands)  # not jitted, JAX does not nest them
    varying = jax.typeof(operands[0]).manual_axis_type.varying
    return lax.pcast(out, tuple(sorted(varying)), to='varying')

  return wrapped


@contextlib.contextmanager
def _settings() -> Iterator[None]:
  from absl import flags
  from tokamax import config

  if not flags.FLAGS.is_parsed():
    # Or tokamax parses the arguments of a program whose flags it cannot know.
    flags.FLAGS.mark_as_parsed()
  # At every call of every kernel tokamax warns, at length, of tiles that were
  # never tuned; its heuristic takes over. absl's logger heeds no filters.
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    with config.cross_compile(True):  # the device need not be here
      yield
  finally:
    logger.setLevel(level)
