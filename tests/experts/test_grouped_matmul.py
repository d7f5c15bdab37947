"""Every implementation against a loop over groups in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.experts.grouped_matmul import (
  GROUPED_MATMULS,
  Implementation,
  TunedMatmul,
  blocks,
  case,
  grouped_matmul,
)
from moe_jax.model.implementations import available_matmuls, chosen_matmul
from tests.helpers import registries
from tests.helpers.dense_matmul import ROWS, SIZES, both_ways, of_gpus

# The kernels of tokamax and JAX run on their devices alone.
HERE = ['blocks', 'ragged_dot', 'padded']


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


def every_group(rows: Any, weights: Any, sizes: Any) -> jax.Array:
  """Multiplies every row with every matrix, and keeps its group's product."""
  return jnp.einsum('MN,MD,NDF->MF', members(rows, sizes), rows, weights)


def every_group_backward(rows: Any, weights: Any, sizes: Any, grad: Any) -> Any:
  member = members(rows, sizes)
  return (
    jnp.einsum('MN,MF,NDF->MD', member, grad, weights),
    jnp.einsum('MN,MD,MF->NDF', member, rows, grad),
  )


def members(rows: jax.Array, sizes: jax.Array) -> jax.Array:
  ends, row = jnp.cumsum(sizes), jnp.arange(len(rows))[:, None]
  return ((row >= ends - sizes) & (row < ends)).astype(rows.dtype)


def test_an_own_implementation_keeps_the_contract(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  registries.forget(monkeypatch, GROUPED_MATMULS)
  GROUPED_MATMULS.register('own')(
    Implementation(every_group, every_group_backward)
  )
  own = both_ways('own', jnp.float32)
  for sizes in SIZES.values():
    own(sizes, (ROWS, 24, 40), 1e-5)
  device = jax.devices()[0]
  assert 'own' in available_matmuls(device)
  assert chosen_matmul('own', device) == TunedMatmul('own')


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
  rows, weights = jnp.ones((6, 3)), jnp.ones((2, 3, 5))
  sizes = jnp.array([2, 4], jnp.int32)
  # A name that does not exist shows which way a call went.
  tuned = TunedMatmul('padded', ((case(7, 2, 3, 5, 'float32'), 'none'),))
  with pytest.raises(UserError, match='none'):
    tuned(rows, weights, sizes)
  np.testing.assert_array_equal(tuned(rows[:4], weights, sizes // 2)[:3], 3.0)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_triton_lowers_for_cuda(
  dtype: Any, caplog: pytest.LogCaptureFixture
) -> None:
  """Forward and both gradients are kernels, not what XLA makes of them."""

  def gradients(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> Any:
    def total(rows: jax.Array, weights: jax.Array) -> jax.Array:
      out = grouped_matmul(rows, weights, sizes, 'triton').astype(jnp.float32)
      return (out**2).sum()

    return jax.grad(total, (0, 1))(rows, weights)

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
  # Or XLA transposes the parameters of all layers for the rows' gradient.
  assert text.count('custom_call @LayoutConstraint') == 1
  assert not caplog.records  # tokamax warns of tiles that were never tuned


def test_the_contract_is_run_by_all_that_can() -> None:
  assert available_matmuls(jax.devices()[0]) == HERE
  assert set(GROUPED_MATMULS) == {
    *HERE,
    'megablox',
    'triton',
    'mosaic',
    'mosaic+triton',
  }


def test_none_needs_no_package_on_any_platform() -> None:
  weights, sizes = jnp.ones((2, 3, 5)), jnp.array([1, 3], jnp.int32)
  traced = jax.jit(lambda rows: grouped_matmul(rows, weights, sizes)).trace(
    jnp.ones((4, 3))
  )
  text = {
    platform: traced.lower(lowering_platforms=(platform,)).as_text()
    for platform in ('cpu', 'cuda', 'tpu')
  }
  # Not where XLA computes it densely.
  for platform in ('cpu', 'cuda'):
    assert 'ragged_dot' not in text[platform] and 'while' in text[platform]
  assert 'ragged_dot' in text['tpu']
