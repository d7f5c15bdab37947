"""Grouped matmuls of the package tokamax: Pallas kernels for GPU and TPU.

tokamax is optional and slow to import, so this happens where it is used.

Its version 0.0.12 has kernels that read outside of their operands or leave some
of them out. They are given operands with which they cannot:

- Triton's take tiles of rows and columns as they come, whole, though a group or
  the matrix may end within. So behind the rows there is room for a tile, and
  columns are a multiple of it.
- Of an empty group Triton's weight gradient reads and sums the rows before it,
  of the first group those before the operand. So it is given no empty group:
  each has a row that nobody asks for, behind those of all others.
- Mosaic's cut the contracted dimension to a multiple of their tile.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from moe_jax import strict_json
from moe_jax.parallel.devices import capability

TRITON, MOSAIC = 'triton', 'mosaic'


class Kernels(NamedTuple):
  """The kernels of an implementation, each 'triton' or 'mosaic'.

  'xla', which is `lax.ragged_dot`, can take the place of both.

  Attributes:
    rows: The one of products of rows: forward and the rows' gradient.
    weights: The one of the weights' gradient.
  """

  rows: str
  weights: str


class Target(NamedTuple):
  """What kernels are traced for.

  Attributes:
    device: The device that the program is for, which need not be here; None
      for the default one.
    tiles: What `tune` returned for such operands, of all kernels that were
      tuned, as a text of JSON; '' leaves the tiles to tokamax.
  """

  device: jax.Device | None = None
  tiles: str = ''


HERE = Target()


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


# Of rows and columns: tokamax's usual tile, and the largest that it tries.
_TILE, _LARGEST_TILE = 128, 256

# The three that the kernels have; the letters are those of the operands.
_MD_NDF = _product((1, 1), [0])
_MF_NDF = _product((1, 2), [0])
_MD_MF = _product((0, 0), [])


def installed() -> bool:
  """Returns whether tokamax can be imported."""
  return importlib.util.find_spec('tokamax') is not None


@functools.cache
def missing(kernels: Kernels, device: jax.Device) -> str | None:
  """Returns what tokamax, if installed, says of kernels it lacks for a device.

  Its versions differ in their kernels, and in the packages these need; with a
  JAX that it does not know they fail in any way.
  """
  rows = jax.ShapeDtypeStruct((_TILE, _TILE), jnp.bfloat16)
  weights = jax.ShapeDtypeStruct((1, _TILE, _TILE), jnp.bfloat16)
  sizes = jax.ShapeDtypeStruct((1,), jnp.int32)
  products = _all_products(kernels, Target(device))
  try:
    jax.eval_shape(products, rows, weights, sizes, rows)
  except (
    ImportError,
    NotImplementedError,
    ValueError,
    TypeError,
    AttributeError,
  ) as error:
    return str(error)
  return None


def obstacle(device: jax.Device, *, kernels: Kernels) -> str | None:
  """Returns why kernels cannot run on a device, or None.

  Args:
    device: A device of the kind that the program is for; it need not be here.
    kernels: The kernels.
  """
  on_tpu = device.platform == 'tpu'
  if not (on_tpu and set(kernels) == {MOSAIC}):
    least = (9, 0) if MOSAIC in kernels else (8, 0)
    if reason := _gpu_obstacle(device, least):
      return reason
  if on_tpu and device not in jax.devices():
    return 'is compiled only where such a device is'
  return _tokamax_obstacle(kernels, device)


def _gpu_obstacle(device: jax.Device, least: tuple[int, int]) -> str | None:
  if device.platform != 'gpu':
    return f'does not run on {device.platform}'
  if capability(device) < least:
    needed = '.'.join(map(str, least))
    has = getattr(device, 'compute_capability', 'none')
    return f'needs compute capability {needed}, and this is {has}'
  return None


def _tokamax_obstacle(kernels: Kernels, device: jax.Device) -> str | None:
  if not installed():
    extra = 'tpu' if device.platform == 'tpu' else 'cuda'
    return f"needs the package tokamax: pip install 'moe_jax[{extra}]'"
  if reason := missing(kernels, device):
    version = importlib.metadata.version('tokamax')
    return f'is not in tokamax {version}, which says {reason!r}'
  return None


def forward(
  rows_MD: jax.Array,
  weights_NDF: jax.Array,
  sizes_N: jax.Array,
  *,
  kernels: Kernels,
  target: Target,
) -> jax.Array:
  """Returns [M, F], 0 outside of all groups.

  Args:
    rows_MD: Rows sorted by group, as in `grouped_matmul`.
    weights_NDF: One matrix per group.
    sizes_N: int32, the rows of each group.
    kernels: The kernels; Triton's are for NVIDIA GPUs from compute capability
      8.0, Mosaic's for those of 9.0 and TPUs from generation 5.
    target: What they are traced for.
  """
  return _rows_product(_MD_NDF, kernels, target, rows_MD, weights_NDF, sizes_N)


def backward(
  rows_MD: jax.Array,
  weights_NDF: jax.Array,
  sizes_N: jax.Array,
  grad_MF: jax.Array,
  *,
  kernels: Kernels,
  target: Target,
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradients of the rows and of the weights; see `forward`."""
  if kernels.rows in (TRITON, MOSAIC):
    # The kernel transposes the weights, and XLA would turn that into a layout
    # of the parameters they come from: a transposed copy, in float32, of those
    # of all layers together.
    weights_NDF = with_layout_constraint(weights_NDF, Layout((0, 1, 2)))
  rows_grad_MD = _rows_product(
    _MF_NDF, kernels, target, grad_MF, weights_NDF, sizes_N
  )
  return rows_grad_MD, _weights_gradient(
    kernels, target, rows_MD, grad_MF, sizes_N
  )


def _all_products(
  kernels: Kernels, target: Target
) -> Callable[..., tuple[jax.Array, tuple[jax.Array, jax.Array]]]:
  """Returns a function of what `backward` takes: forward and backward."""

  def products(
    rows_MD: jax.Array,
    weights_NDF: jax.Array,
    sizes_N: jax.Array,
    grad_MF: jax.Array,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    operands = rows_MD, weights_NDF, sizes_N
    out_MF = forward(*operands, kernels=kernels, target=target)
    return out_MF, backward(*operands, grad_MF, kernels=kernels, target=target)

  return products


def _rows_product(
  dimensions: lax.RaggedDotDimensionNumbers,
  kernels: Kernels,
  target: Target,
  rows: jax.Array,
  weights: jax.Array,
  sizes_N: jax.Array,
) -> jax.Array:
  """Returns a row for each, times its group's matrix or that transposed."""
  num_rows, kernel = len(rows), kernels.rows
  contracted = dimensions.dot_dimension_numbers[0][1][0]
  width = weights.shape[3 - contracted]
  if TRITON in kernels:  # one copy for all products, whoever computes them
    rows = _with_room(rows, *weights.shape)
  if kernel == TRITON:
    weights = _padded(weights, 3 - contracted)
  if kernel == MOSAIC:
    rows, weights = _padded(rows, 1), _padded(weights, contracted)
  out = _run(kernel, target, dimensions, rows, weights, sizes_N)
  # Rows of no group are left as memory was.
  used = jnp.arange(num_rows) < sizes_N.sum()
  return jnp.where(used[:, None], out[:num_rows, :width], 0)


def _weights_gradient(
  kernels: Kernels,
  target: Target,
  rows_MD: jax.Array,
  grad_MF: jax.Array,
  sizes_N: jax.Array,
) -> jax.Array:
  """Returns [N, D, F], 0 for empty groups."""
  kernel, empty_N = kernels.weights, sizes_N == 0
  if kernel == TRITON:
    shape = len(sizes_N), rows_MD.shape[1], grad_MF.shape[1]
    rows_MD, grad_MF = (_with_room(a, *shape) for a in (rows_MD, grad_MF))
    # Those with rows first, which so keep theirs.
    order_N = jnp.argsort(empty_N, stable=True)
    sizes_N = jnp.maximum(sizes_N, 1)[order_N]
  out_NDF = _run(kernel, target, _MD_MF, rows_MD, grad_MF, sizes_N)
  if kernel == TRITON:
    out_NDF = out_NDF[jnp.argsort(order_N)]
  return jnp.where(empty_N[:, None, None], 0, out_NDF)


def _with_room(rows: jax.Array, num_groups: int, d: int, f: int) -> jax.Array:
  """Returns rows with as many more behind them as Triton's kernels may read.

  The last tile of a group may begin with its last row. Behind them each group
  may need a row, and a tile of columns is read past the end of its row.
  """
  beyond = -(-_LARGEST_TILE // min(d, f))
  room = max(_LARGEST_TILE, num_groups + beyond)
  return jnp.pad(rows, ((0, room), (0, 0)))


def _padded(operand: jax.Array, axis: int) -> jax.Array:
  """Returns the same with zeros up to a multiple of a tile along an axis."""
  missing = -operand.shape[axis] % _TILE
  if not missing:
    return operand
  widths = [(0, missing if i == axis else 0) for i in range(operand.ndim)]
  return jnp.pad(operand, widths)


def _run(
  kernel: str,
  target: Target,
  dimensions: lax.RaggedDotDimensionNumbers,
  rows: jax.Array,
  other: jax.Array,
  sizes_N: jax.Array,
) -> jax.Array:
  import tokamax

  tiled = _tiled(target.tiles).get((kernel, _name(dimensions)))
  # Products of eight bits are rounded to what is stored of them in the end.
  out_dtype = jnp.bfloat16 if rows.dtype.itemsize == 1 else rows.dtype

  def dot(rows: jax.Array, other: jax.Array, sizes_N: jax.Array) -> jax.Array:
    return tokamax.ragged_dot_general(
      rows,
      other,
      tokamax.RaggedDotGroupSizes(sizes_N, len(rows)),
      dimensions,
      preferred_element_type=out_dtype,
      # A list of one: with None tokamax would try others without a word.
      implementation=[tiled or kernel],
    )

  with _settings(), _default_device(kernel, target.device):
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
def _settings(level: int = logging.ERROR) -> Iterator[None]:
  from absl import flags
  from tokamax import config

  if not flags.FLAGS.is_parsed():
    # Or tokamax parses the arguments of a program whose flags it cannot know.
    flags.FLAGS.mark_as_parsed()
  # At every call of every kernel tokamax warns, at length, of tiles that were
  # never tuned; its heuristic takes over. absl's logger heeds no filters.
  logger = logging.getLogger('absl')
  before = logger.level
  logger.setLevel(level)
  try:
    with config.cross_compile(True):  # the device need not be here
      yield
  finally:
    logger.setLevel(before)


def _default_device(
  kernel: str, device: jax.Device | None
) -> contextlib.AbstractContextManager[Any]:
  """Returns a context in which Mosaic's kernels find what they ask of a device.

  They ask the default one, even to be traced.
  """
  if kernel != MOSAIC or device is None or device in jax.devices():
    return contextlib.nullcontext()
  return jax.default_device(device)


def tune(
  kernel: str,
  rows_MD: jax.Array,
  weights_NDF: jax.Array,
  sizes_N: jax.Array,
  grad_MF: jax.Array,
) -> dict[str, Any]:
  """Times tiles of a kernel, in all three products.

  It takes minutes, on the device: tokamax compiles each and runs it.

  Returns:
    tokamax's `AutotuningResult` as JSON, of each product only the fastest tile;
    a product without one is left out.
  """
  import tokamax

  products = jax.jit(_all_products(Kernels(kernel, kernel), HERE))
  lowered = products.lower(rows_MD, weights_NDF, sizes_N, grad_MF)
  kept = []
  with _settings(logging.CRITICAL):
    for call in _calls(lowered.as_text(dialect='hlo', debug_info=True)):
      tried = call.autotune(_candidates(kernel, call))
      times = {
        tile: time
        for tile, time in tried.items()
        if isinstance(time, tokamax.BenchmarkData)
      }
      if times:
        kept.append((call, type(tried)(times).prune()))
  kind = jax.devices()[0].device_kind
  return json.loads(tokamax.AutotuningResult(kind, tuple(kept)).dumps())


def _candidates(kernel: str, call: Any) -> set[Any]:
  """Returns the tiles to time, of the hundreds that tokamax would.

  They fit the operands as they are padded here, and are tokamax's usual one or
  like those that it ships as the fastest of other shapes, on H100 and B200.
  """

  def is_like(tile: Any) -> bool:
    if kernel == TRITON:
      usual = tile.block_n >= _TILE and tile.block_k <= 64
      return usual and tile.block_m >= 64 and 3 <= tile.num_stages <= 5
    return (
      tile.block_m >= 64 and tile.block_k <= 256 and tile.grid_tile_width >= 4
    )

  usual = call.heuristics_config
  return {
    tile
    for tile in call.autotuning_configs
    if _fits(kernel, call, tile) and (tile == usual or is_like(tile))
  }


def _calls(text: str) -> list[Any]:
  """Returns tokamax's `BoundArguments` of all its kernels in a program.

  Its own `get_bound_args` fails with jax 0.10. It reads what is read here: the
  names of operations, in which tokamax leaves the arguments as JSON.
  """
  import tokamax

  calls: dict[str, Any] = {}
  for name in re.findall(r'op_name="((?:[^"\\]|\\.)*)"', text):
    _, _, said = json.loads(f'"{name}"').partition('tokamax:')
    if said:
      call, _ = json.JSONDecoder().raw_decode(said)
      call['op']['config'] = None  # to be found
      calls[strict_json.dumps(call)] = [call, {}]
  untimed = strict_json.dumps({'device_kind': '', 'data': [*calls.values()]})
  return [call for call, _ in tokamax.AutotuningResult.loads(untimed).data]


def _fits(kernel: str, call: Any, tile: Any) -> bool:
  """Returns whether a tile suits the operands as they are padded here."""
  of_rows, of_weights = call.arguments['lhs'], call.arguments['rhs']
  dimensions = call.arguments['ragged_dot_dimension_numbers']
  if dimensions == _MD_MF:
    return max(tile.block_m, tile.block_n) <= _LARGEST_TILE
  contracted = dimensions.dot_dimension_numbers[0][1][0]
  if kernel == TRITON:
    whole = of_weights.shape[3 - contracted] % tile.block_n == 0
    return tile.split_k == 1 and tile.block_m <= _LARGEST_TILE and whole
  depth = of_rows.shape[1]
  return depth % min(depth, tile.block_k) == 0


def unreadable(tiles: str) -> str | None:
  """Returns why `Target.tiles` cannot be used, None if they can."""
  try:
    _tiled(tiles)
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    return ' '.join(str(error).split())[:200]
  return None


@functools.cache
def _tiled(tiles: str) -> dict[tuple[str, str], Any]:
  """Returns tokamax's kernels with their tiles, by kernel and product."""
  if not tiles:
    return {}
  import tokamax

  found = {}
  with _settings():
    for kernel, result in json.loads(tiles).items():
      text = strict_json.dumps(result)
      for call, times in tokamax.AutotuningResult.loads(text).data:
        product = _name(call.arguments['ragged_dot_dimension_numbers'])
        tile = times.fastest_config
        if _fits(kernel, call, tile):
          found[kernel, product] = call.op.replace(config=tile)
  return found


def _name(dimensions: lax.RaggedDotDimensionNumbers) -> str:
  """Returns a name for a product, which can be looked up."""
  return str(
    (dimensions.dot_dimension_numbers, dimensions.rhs_group_dimensions)
  )
