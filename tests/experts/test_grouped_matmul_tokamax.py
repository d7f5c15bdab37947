"""tokamax's kernels: Triton's own, interpreted, and inside of `shard_map`.

What they read is checked against `reads_of_rows` and `reads_of_weights`, which
say it after their source: of no operand anything outside.
"""

import functools
import itertools
import json
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe_jax.errors import UserError
from moe_jax.experts import grouped_matmul
from moe_jax.experts.grouped_matmul import tokamax
from moe_jax.planning import topologies
from moe_jax.registry import GROUPED_MATMULS
from tests.helpers import registries
from tests.helpers.dense_matmul import (
  ROWS,
  SIZES,
  both_ways,
  dense_gradients,
  dense_loop,
  of_gpus,
)

# Pallas interprets on CPU only what fills its blocks.
D, F = 128, 256


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
  """Pallas' kernels run on CPU, one block after the other."""
  monkeypatch.setattr(
    pallas,
    'pallas_call',
    functools.partial(pallas.pallas_call, interpret=True),
  )


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES.keys())
@pytest.mark.usefixtures('interpreted')
def test_triton_interpreted(sizes: list[int]) -> None:
  both_ways('triton', jnp.float32)(sizes, (ROWS, D, F), 1e-5)


def eight_devices() -> jax.sharding.Mesh:
  return jax.make_mesh((2, 4), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)


def on_mesh(mesh: Any, kernel: str, check: bool = True) -> Any:
  """Each has its rows and their sizes; of every four, each its two groups."""
  tokens = P(('a', 'b'))

  def local(rows: Any, weights: Any, sizes: Any, grad: Any) -> Any:
    weights = lax.pcast(weights, 'a', to='varying') if check else weights
    out, vjp = jax.vjp(
      lambda rows, weights: multiply(rows, weights, sizes[0]), rows, weights
    )
    rows_grad, weights_grad = vjp(grad)
    return out, rows_grad, lax.psum(weights_grad, 'a')

  def multiply(*operands: jax.Array) -> jax.Array:
    return grouped_matmul.grouped_matmul(*operands, kernel)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(tokens, P('b'), tokens, tokens),
    out_specs=(tokens, tokens, P('b')),
    check_vma=check,
  )


def operands(num_rows: int) -> tuple[np.ndarray, ...]:
  rng = np.random.default_rng(0)
  sizes = rng.multinomial(num_rows, [0.2, 0.7, 0.1], 8)[:, :2]
  sizes[5, 0] = 0
  shapes = (8 * num_rows, D), (8, D, F), (8 * num_rows, F)
  rows, weights, grad = (
    rng.standard_normal(shape).astype(np.float32) for shape in shapes
  )
  return rows, weights, sizes.astype(np.int32), grad


def check_on_eight_devices(run: Any, num_rows: int) -> None:
  rows, weights, sizes, grad = operands(num_rows)
  out, rows_grad, weights_grad = map(
    np.asarray, run(rows, weights, sizes, grad)
  )
  expected = np.zeros(weights.shape)
  for device in range(8):
    own = slice(device * num_rows, (device + 1) * num_rows)
    groups = slice(device % 4 * 2, device % 4 * 2 + 2)
    here = rows[own].astype(float), weights[groups].astype(float), sizes[device]
    gradients = dense_gradients(*here, grad[own])
    np.testing.assert_allclose(out[own], dense_loop(*here), atol=1e-4)
    np.testing.assert_allclose(rows_grad[own], gradients[0], atol=1e-4)
    expected[groups] += gradients[1]
  np.testing.assert_allclose(weights_grad, expected, atol=1e-4)


@pytest.mark.parametrize('jit', [True, False])
@pytest.mark.parametrize('check', [True, False])
def test_inside_of_shard_map(
  check: bool, jit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
  """By what runs on CPU, `lax.ragged_dot`, through the same code."""
  implementation = grouped_matmul.by_tokamax('xla')
  registries.replace(monkeypatch, GROUPED_MATMULS, 'xla', implementation)
  run = on_mesh(eight_devices(), 'xla', check)
  check_on_eight_devices(jax.jit(run) if jit else run, 64)


def test_triton_lowers_inside_of_shard_map() -> None:
  """Three kernels, and no computation that is manual but the outer one."""
  mesh = of_gpus(a=2, b=4)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(on_mesh(mesh, 'triton')).trace(*operands(128))
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('custom_call @__gpu$xla.gpu.triton') == 3, text
  assert text.count('sdy.manual_computation') == 1


def test_what_is_missing_is_said() -> None:
  def missing(kernel: str) -> str | None:
    kernels = tokamax.Kernels(kernel, kernel)
    return tokamax.missing(kernels, jax.devices()[0])

  assert missing('xla') is None
  assert missing('triton') is None
  assert 'none_such' in missing('none_such')


class Call(NamedTuple):
  """What tokamax was given, and by which kernel."""

  kernel: str
  dimensions: lax.RaggedDotDimensionNumbers
  rows: np.ndarray
  other: np.ndarray
  sizes: np.ndarray


ROWS_PRODUCT, TRANSPOSED, WEIGHTS_GRADIENT = (
  tokamax._MD_NDF,
  tokamax._MF_NDF,
  tokamax._MD_MF,
)
# Rows of a tile, columns, and of what is summed over.
TILES = list(itertools.product((16, 128, 256), (64, 128), (32, 128)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
  """All that tokamax is given, which XLA computes in its place."""
  import tokamax as package

  made: list[Call] = []
  general = package.ragged_dot_general

  def recorded(
    rows: Any, other: Any, sizes: Any, dimensions: Any, **options: Any
  ) -> Any:
    (kernel,) = options.pop('implementation')
    made.append(Call(kernel, dimensions, rows, other, sizes.value))
    by_xla = {'implementation': ['xla'], **options}
    return general(rows, other, sizes, dimensions, **by_xla)

  monkeypatch.setattr(package, 'ragged_dot_general', recorded)
  return made


def call_all(name: str, sizes: list[int], d: int, f: int) -> None:
  rows, weights, grad = (
    jnp.ones(shape) for shape in ((ROWS, d), (len(sizes), d, f), (ROWS, f))
  )
  sizes_N = jnp.array(sizes, jnp.int32)
  implementation = GROUPED_MATMULS[name]
  implementation.forward(rows, weights, sizes_N, target=tokamax.HERE)
  implementation.backward(rows, weights, sizes_N, grad, target=tokamax.HERE)


def reads_of_rows(
  rows: np.ndarray, weights: np.ndarray, sizes: np.ndarray, tile: Any
) -> dict[str, tuple[int, int]]:
  """The first and last elements that Triton's product of rows reads.

  A tile begins every `block_m` rows of a group, and is loaded whole; of the
  weights all columns of a tile are. Depth is masked. (`_ragged_dot_kernel`)
  """
  block_m, block_n, _ = tile
  _, depth, width = weights.shape
  ends = np.cumsum(sizes)
  starts = [
    row
    for end, size in zip(ends, sizes, strict=True)
    for row in range(end - size, end, block_m)
  ]
  columns = -(-width // block_n) * block_n
  whole = weights.size - width
  last_row = max(starts, default=-block_m) + block_m - 1
  return {
    'rows': (0, (last_row + 1) * depth - 1),
    'other': (0, whole + columns - 1),
  }


def reads_of_weights(
  rows: np.ndarray, grad: np.ndarray, sizes: np.ndarray, tile: Any
) -> dict[str, tuple[int, int]]:
  """The same of Triton's weights' gradient.

  Of the last tile of a group the rows past the group are masked. It is the one
  before the group, and not masked, if the group is empty; columns never are.
  (`_ragged_contracting_dim_dot_kernel`)
  """
  _, block_n, block_k = tile
  firsts, lasts = [0], [0]
  for end, size in zip(np.cumsum(sizes), sizes, strict=True):
    start = end - size
    firsts.append(start if size else start - block_k)
    lasts.append(end - 1)

  def elements(width: int) -> tuple[int, int]:
    columns = -(-width // block_n) * block_n
    return min(firsts) * width, max(lasts) * width + columns - 1

  return {'rows': elements(rows.shape[1]), 'other': elements(grad.shape[1])}


def outside(call: Call, tile: Any) -> list[str]:
  """The operands of which a call of Triton reads outside."""
  weights = call.other
  if call.dimensions == WEIGHTS_GRADIENT:
    found = reads_of_weights(call.rows, call.other, call.sizes, tile)
  else:
    if call.dimensions == TRANSPOSED:
      weights = weights.transpose(0, 2, 1)  # as the kernel does
    found = reads_of_rows(call.rows, weights, call.sizes, tile)
  return [
    f'{name}: {first} to {last} of {getattr(call, name).size}'
    for name, (first, last) in found.items()
    if first < 0 or last >= getattr(call, name).size
  ]


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize(('d', 'f'), [(128, 256), (96, 40), (8, 384)])
def test_triton_reads_nothing_outside(
  sizes: list[int], d: int, f: int, calls: list[Call]
) -> None:
  call_all('triton', sizes, d, f)
  assert [call.kernel for call in calls] == ['triton'] * 3
  for call, tile in itertools.product(calls, TILES):
    assert not outside(call, tile), (call.dimensions, tile)


def test_triton_would_read_outside() -> None:
  """So the test above can fail: without room, and with an empty group."""
  rows, grad = np.zeros((ROWS, 96)), np.zeros((ROWS, 40))
  weights, sizes = np.zeros((4, 96, 40)), np.array([0, 30, 0, 370])
  forward = Call('triton', ROWS_PRODUCT, rows, weights, sizes)
  back = Call('triton', WEIGHTS_GRADIENT, rows, grad, sizes)
  said = outside(forward, (128, 128, 32))
  assert [each.split(':')[0] for each in said] == ['rows', 'other']
  assert any('rows: -' in each for each in outside(back, (128, 128, 32)))


@pytest.mark.usefixtures('interpreted')
def test_triton_sums_the_rows_before_an_empty_group() -> None:
  """What `reads_of_weights` says of it, and why it is given none."""
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((ROWS, D)).astype(np.float32)
  grad = rng.standard_normal((ROWS, F)).astype(np.float32)
  sizes = jnp.array([100, 0, 300], jnp.int32)
  dimensions = WEIGHTS_GRADIENT
  out = tokamax._run('triton', tokamax.HERE, dimensions, rows, grad, sizes)
  np.testing.assert_allclose(out[1], rows[68:100].T @ grad[68:100], atol=1e-4)


def test_what_mosaic_leaves_out_is_nothing(calls: list[Call]) -> None:
  """It computes whole tiles of depth alone, of which the rest here is zeros."""
  call_all('mosaic', [7, 250, 1, 142], 96, 200)
  by_rows = [call for call in calls if call.dimensions != WEIGHTS_GRADIENT]
  assert [call.rows.shape[1] for call in by_rows] == [128, 256]


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES.keys())
def test_kernels_by_product(sizes: list[int], calls: list[Call]) -> None:
  """Mosaic's for rows and Triton's for weights, and the result is right."""
  for shape in ((ROWS, D, F), (ROWS, 96, 40)):
    both_ways('mosaic+triton', jnp.float32)(sizes, shape, 1e-5)
  assert [call.kernel for call in calls] == ['mosaic', 'mosaic', 'triton'] * 2
  assert {call.dimensions for call in calls if call.kernel == 'triton'} == {
    WEIGHTS_GRADIENT
  }


@pytest.mark.slow
def test_kernels_of_an_h100_that_is_not_here() -> None:
  """By its own compiler, which Mosaic's do not have to wait for the device."""
  try:
    device = topologies.target('h100:1x1').devices[0]
  except UserError as error:
    pytest.skip(str(error))
  assert GROUPED_MATMULS['mosaic+triton'].obstacle(device) is None
  shapes = ((512, D), (4, D, F), (4,), (512, F))
  types = (jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.bfloat16)
  operands = map(jax.ShapeDtypeStruct, shapes, types)
  target = tokamax.Target(device)

  def run(rows: Any, weights: Any, sizes: Any, grad: Any) -> Any:
    def multiply(rows: Any, weights: Any) -> Any:
      name = 'mosaic+triton'
      return grouped_matmul.grouped_matmul(rows, weights, sizes, name, target)

    out, vjp = jax.vjp(multiply, rows, weights)
    return out, vjp(grad)

  where = jax.sharding.SingleDeviceSharding(device)
  jitted = jax.jit(run, in_shardings=where, out_shardings=where)
  text = jitted.lower(*operands).compile().as_text()
  assert text.count('custom_call_target="mosaic_gpu') == 2
  assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 1


def timed(seconds: dict[Any, float]) -> Any:
  """What tokamax says of tiles that it has timed, and of one that failed."""
  import tokamax as package
  from tokamax._src.autotuning.autotuner import AutotuningData

  def data(s: float) -> Any:
    return package.BenchmarkData(1.0, 1.0, (1e3 * s,), {})

  times = {tile: data(s) for tile, s in seconds.items()}
  return AutotuningData(times | {'a tile that failed': ValueError()})


def tile(block_n: int, warps: int, split_k: int = 1) -> Any:
  from tokamax._src.ops.ragged_dot.pallas_triton import Config

  sizes = {'block_m': 128, 'block_n': block_n, 'block_k': 64}
  return Config(**sizes, num_warps=warps, num_stages=3, split_k=split_k)


def lowered(f: int, tiles: str) -> str:
  """Forward and both gradients, lowered for CUDA."""
  shapes = ((512, D), (4, D, f), (4,), (512, f))
  types = (jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.bfloat16)
  kernels = tokamax.Kernels('triton', 'triton')
  products = tokamax._all_products(kernels, tokamax.Target(None, tiles))
  with jax.sharding.use_abstract_mesh(of_gpus()):
    traced = jax.jit(products).trace(*map(jax.ShapeDtypeStruct, shapes, types))
    return traced.lower(lowering_platforms=('cuda',)).as_text(
      dialect='hlo', debug_info=True
    )


def test_the_fastest_tiles_that_fit_are_used(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """As tokamax writes them down, from what it would time on a GPU."""
  import tokamax as package
  from tokamax._src.ops.ragged_dot.pallas_triton import PallasTritonRaggedDot

  f = 384  # no multiple of the tile of 256, nor split as the third wants it
  best = tile(128, 8)
  seconds = {
    tile(256, 4): 1.0,
    tile(128, 4, split_k=2): 2.0,
    best: 3.0,
    tile(64, 4): 0.5,  # not tried
    tile(128, 4): 4.0,
  }
  text = lowered(f, '')

  def autotune(call: Any, tiles: set[Any]) -> Any:
    return timed({each: seconds.get(each, 5.0) for each in tiles})

  monkeypatch.setattr(package.BoundArguments, 'autotune', autotune)
  monkeypatch.setattr(
    PallasTritonRaggedDot, '_get_autotuning_configs', lambda *_: {*seconds}
  )
  monkeypatch.setattr(jax.stages.Lowered, 'as_text', lambda *_, **options: text)
  arrays = [jnp.zeros(s) for s in ((512, D), (4, D, f), (512, f))]
  sizes = jnp.array([512, 0, 0, 0], jnp.int32)
  monkeypatch.setattr(
    tokamax, '_all_products', lambda *_: lambda *operands: operands
  )
  result = tokamax.tune('triton', arrays[0], arrays[1], sizes, arrays[2])
  monkeypatch.undo()

  kept = json.dumps({'triton': result})
  assert tokamax.unreadable(kept) is None
  used = {name: op.config for (_, name), op in tokamax._tiled(kept).items()}
  names = map(tokamax._name, (ROWS_PRODUCT, TRANSPOSED, WEIGHTS_GRADIENT))
  # Of the weights' gradient a tile may be as wide as there is room.
  assert [used[name] for name in names] == [best, best, tile(256, 4)]
  said = lowered(f, kept)
  assert {*re.findall(r'block_n\\":(\d+)', said)} == {'128', '256'}
  assert {*re.findall(r'split_k\\":(\d+)', said)} == {'1'}


@pytest.mark.slow
@pytest.mark.usefixtures('interpreted')
def test_tokamax_times_tiles_itself(monkeypatch: pytest.MonkeyPatch) -> None:
  """On CPU, and of Triton's tiles its usual one and one that is too wide."""
  from tokamax._src import gpu_utils
  from tokamax._src.ops.ragged_dot.pallas_triton import PallasTritonRaggedDot

  # Not for another device here: it asks in threads, which know of no such.
  monkeypatch.setattr(gpu_utils, 'has_triton_support', lambda device: True)
  monkeypatch.setattr(
    PallasTritonRaggedDot,
    '_get_autotuning_configs',
    lambda *_: {tile(256, 4)},
  )
  rows, weights, grad = (
    jnp.ones(shape) for shape in ((256, D), (2, D, 384), (256, 384))
  )
  sizes = jnp.array([100, 156], jnp.int32)
  result = tokamax.tune('triton', rows, weights, sizes, grad)
  found = tokamax._tiled(json.dumps({'triton': result}))
  assert len(found) == 3
  by_rows = map(tokamax._name, (ROWS_PRODUCT, TRANSPOSED))
  assert {found['triton', name].config.block_n for name in by_rows} == {128}


UNREADABLE = ['{', '[]', '{"triton": 1}', '{"triton": {}}']


@pytest.mark.parametrize('tiles', UNREADABLE)
def test_tiles_that_cannot_be_read_are_said(tiles: str) -> None:
  assert tokamax.unreadable(tiles)
