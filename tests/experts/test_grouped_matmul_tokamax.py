"""tokamax's kernels: Triton's own, interpreted, and inside of `shard_map`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe_jax.experts import grouped_matmul
from moe_jax.experts.grouped_matmul import tokamax
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
  assert tokamax.missing('xla') is None
  assert tokamax.missing('triton') is None
  assert 'none_such' in tokamax.missing('none_such')
