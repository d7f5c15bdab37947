"""Every implementation against a loop over groups in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moe_jax.errors import UserError
from moe_jax.experts.grouped_matmul import (
  GROUPED_MATMULS,
  TunedMatmul,
  blocks,
  case,
  grouped_matmul,
)

ROWS = 400
SIZES = {
  'even': [100, 100, 100, 100],
  'uneven': [7, 250, 1, 142],
  'empty groups': [0, 400, 0, 0],
  'whole blocks': [128, 0, 128, 144],
  'rows in no group': [3, 130, 0, 90],
  'no rows at all': [0, 0, 0, 0],
}


def dense_loop(
  rows_MD: np.ndarray, weights_NDF: np.ndarray, sizes: list[int]
) -> np.ndarray:
  out_MF = np.zeros((len(rows_MD), weights_NDF.shape[-1]))
  start = 0
  for weight_DF, size in zip(weights_NDF, sizes, strict=True):
    out_MF[start : start + size] = rows_MD[start : start + size] @ weight_DF
    start += size
  return out_MF


def dense_gradients(
  rows_MD: np.ndarray,
  weights_NDF: np.ndarray,
  sizes: list[int],
  grad: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  rows_grad, bank_grad = np.zeros_like(rows_MD), np.zeros_like(weights_NDF)
  start = 0
  for n, size in enumerate(sizes):
    part = slice(start, start + size)
    rows_grad[part] = grad[part] @ weights_NDF[n].T
    bank_grad[n] = rows_MD[part].T @ grad[part]
    start += size
  return rows_grad, bank_grad


# The kernels of tokamax run on their devices alone.
HERE = ['blocks', 'ragged_dot', 'padded']


def both_ways(name: str, dtype: Any) -> Any:
  @jax.jit
  def run(rows: Any, bank: Any, sizes: Any, grad: Any) -> Any:
    out, vjp = jax.vjp(
      lambda rows, bank: grouped_matmul(rows, bank, sizes, name), rows, bank
    )
    return out, *vjp(grad)

  def checked(sizes: list[int], shape: tuple[int, int, int], atol: float):
    num_rows, d, f = shape
    rng = np.random.default_rng(0)
    rows, bank, grad = (
      rng.standard_normal(s)
      for s in ((num_rows, d), (len(sizes), d, f), (num_rows, f))
    )
    # Both sides start from what the dtype can hold.
    operands = [jnp.asarray(a, dtype) for a in (rows, bank, grad)]
    rows, bank, grad = (np.asarray(a, np.float64) for a in operands)
    expected = (
      dense_loop(rows, bank, sizes),
      *dense_gradients(rows, bank, sizes, grad),
    )
    results = run(*operands[:2], jnp.asarray(sizes, jnp.int32), operands[2])
    for ours, theirs in zip(results, expected, strict=True):
      assert ours.dtype == dtype
      scale = max(1.0, np.abs(theirs).max())
      np.testing.assert_allclose(
        np.asarray(ours, np.float64) / scale, theirs / scale, atol=atol
      )

  return checked


@pytest.fixture(scope='module', params=HERE)
def name(request: pytest.FixtureRequest) -> str:
  return request.param


@pytest.fixture(scope='module')
def checked(name: str) -> Any:
  return both_ways(name, jnp.float32)


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES.keys())
def test_values_and_gradients(checked: Any, sizes: list[int]) -> None:
  checked(sizes, (ROWS, 24, 40), 1e-5)


@pytest.mark.parametrize('sizes', [[1], [0]])
def test_one_row_and_one_group(name: str, sizes: list[int]) -> None:
  both_ways(name, jnp.float32)(sizes, (1, 3, 5), 1e-5)


def test_bfloat16(name: str) -> None:
  """Sums over 100 rows would be off by 0.3 if they were kept in bfloat16."""
  both_ways(name, jnp.bfloat16)([7, 250, 1, 142], (ROWS, 24, 40), 0.01)


@pytest.fixture(scope='module')
def of_many_sizes() -> Any:
  """Weights that are worth a ladder of blocks: several sizes of them."""
  block_sizes = blocks.choose_sizes(ROWS, 4, 128 * 136)
  assert len(block_sizes.whole) == 2 and len(block_sizes.last) >= 5
  return both_ways('blocks', jnp.float32)


LADDER_SIZES = {
  'one of each': [10, 60, 97, 150],
  'all in the last': [0, 0, 0, 400],
  'above the largest': [380, 3, 0, 17],
  'rows in no group': [100, 0, 64, 200],
  'no rows at all': [0, 0, 0, 0],
}


@pytest.mark.parametrize(
  'sizes', LADDER_SIZES.values(), ids=LADDER_SIZES.keys()
)
def test_blocks_of_many_sizes(of_many_sizes: Any, sizes: list[int]) -> None:
  of_many_sizes(sizes, (ROWS, 128, 136), 1e-5)


@pytest.mark.parametrize('num_groups', [1, 4, 64])
def test_a_ladder_holds_every_group(num_groups: int) -> None:
  """The last sizes end where the whole ones begin, and waste is bounded."""
  block_sizes = blocks.choose_sizes(4096, num_groups, 1 << 20)
  assert block_sizes.whole[-1] == block_sizes.last[-1] <= 4096
  assert block_sizes.last[0] <= 32
  mean = 4096 / num_groups
  for size in (0.6 * mean, mean, min(1.2 * mean, 4096)):
    block = min(block for block in block_sizes.last if block >= size)
    assert block <= 1.25 * size + 16


def test_measurements_decide_for_their_shapes_alone() -> None:
  rows, bank = jnp.ones((6, 3)), jnp.ones((2, 3, 5))
  sizes = jnp.array([2, 4], jnp.int32)
  # A name that does not exist shows which way a call went.
  tuned = TunedMatmul('padded', ((case(7, 2, 3, 5, 'float32'), 'none'),))
  with pytest.raises(UserError, match='none'):
    tuned(rows, bank, sizes)
  np.testing.assert_array_equal(tuned(rows[:4], bank, sizes // 2)[:3], 3.0)


def of_gpus(**sizes: int) -> AbstractMesh:
  """A mesh of GPUs that need not be here."""
  return AbstractMesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
    abstract_device=AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'cuda'),
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_triton_lowers_for_cuda(dtype: Any) -> None:
  """Forward and both gradients are kernels, not what XLA makes of them."""

  def gradients(rows: jax.Array, bank: jax.Array, sizes: jax.Array) -> Any:
    def total(rows: jax.Array, bank: jax.Array) -> jax.Array:
      out = grouped_matmul(rows, bank, sizes, 'triton').astype(jnp.float32)
      return (out**2).sum()

    return jax.grad(total, (0, 1))(rows, bank)

  shapes = (
    jax.ShapeDtypeStruct((256, 128), dtype),
    jax.ShapeDtypeStruct((4, 128, 64), dtype),
    jax.ShapeDtypeStruct((4,), jnp.int32),
  )
  with jax.sharding.use_abstract_mesh(of_gpus()):
    traced = jax.jit(gradients).trace(*shapes)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('custom_call @__gpu$xla.gpu.triton') >= 3, text
  assert 'chlo.ragged_dot' not in text


def test_the_contract_is_run_by_all_that_can() -> None:
  assert set(GROUPED_MATMULS) == {*HERE, 'triton', 'mosaic'}


def test_none_needs_no_package_on_any_platform() -> None:
  bank, sizes = jnp.ones((2, 3, 5)), jnp.array([1, 3], jnp.int32)
  traced = jax.jit(lambda rows: grouped_matmul(rows, bank, sizes)).trace(
    jnp.ones((4, 3))
  )
  text = {
    platform: traced.lower(lowering_platforms=(platform,)).as_text()
    for platform in ('cpu', 'cuda', 'tpu')
  }
  assert 'ragged_dot' not in text['cpu'] and 'while' in text['cpu']
  assert 'ragged_dot' in text['cuda'] and 'ragged_dot' in text['tpu']
