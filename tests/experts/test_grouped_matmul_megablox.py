"""The weights' gradient on TPUs: JAX's kernel, interpreted."""

import functools

import jax.numpy as jnp
import pytest

from moe_jax.experts import grouped_matmul
from moe_jax.experts.grouped_matmul import megablox
from tests.helpers.dense_matmul import ROWS, SIZES, both_ways


# All 400 rows in three tiles and some; sides that no tile divides, and two do.
@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES.keys())
def test_gradients_of_the_kernel_interpreted(
  sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
  run = functools.partial(megablox.weights_gradient, interpret=True)
  monkeypatch.setattr(megablox, 'weights_gradient', run)
  monkeypatch.setattr(megablox, '_SIDE_BYTES', 4 * 128)
  both_ways('megablox', jnp.float32)(sizes, (ROWS, 24, 256), 1e-5)


@pytest.mark.parametrize(
  'length, tile',
  [(16384, 512), (400, 400), (384, 384), (1280, 256), (448, 448)],
)
def test_tiles_divide(length: int, tile: int) -> None:
  assert megablox._tile(length, 512) == tile


@pytest.mark.parametrize('sizes', [[3, 0, 2], [4, 4, 0]])
def test_what_a_kernel_leaves_in_rows_of_no_group_is_zeroed(
  sizes: list[int],
) -> None:
  used = jnp.arange(8)[:, None] < sum(sizes)
  left = jnp.where(used, jnp.ones((8, 3)), jnp.nan)
  emptied = grouped_matmul._zeroed_if_any(left, jnp.array(sizes))
  assert (emptied == used.astype(float)).all()
