"""Every implementation against a loop over groups in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.experts import grouped_matmul

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
  rows_MD: np.ndarray, bank_NDF: np.ndarray, sizes: list[int]
) -> np.ndarray:
  out_MF = np.zeros((len(rows_MD), bank_NDF.shape[-1]))
  start = 0
  for weight_DF, size in zip(bank_NDF, sizes, strict=True):
    out_MF[start : start + size] = rows_MD[start : start + size] @ weight_DF
    start += size
  return out_MF


def dense_gradients(
  rows_MD: np.ndarray, bank_NDF: np.ndarray, sizes: list[int], grad: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  rows_grad, bank_grad = np.zeros_like(rows_MD), np.zeros_like(bank_NDF)
  start = 0
  for n, size in enumerate(sizes):
    part = slice(start, start + size)
    rows_grad[part] = grad[part] @ bank_NDF[n].T
    bank_grad[n] = rows_MD[part].T @ grad[part]
    start += size
  return rows_grad, bank_grad


@pytest.fixture(scope='module', params=['BLOCKS', 'RAGGED'])
def implementation(
  request: pytest.FixtureRequest,
) -> grouped_matmul.Implementation:
  forward, backward = getattr(grouped_matmul, request.param)
  return grouped_matmul.Implementation(jax.jit(forward), jax.jit(backward))


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES.keys())
def test_values_and_gradients(
  implementation: grouped_matmul.Implementation, sizes: list[int]
) -> None:
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((ROWS, 24))
  bank = rng.standard_normal((4, 24, 40))
  grad = rng.standard_normal((ROWS, 40))
  operands = [jnp.asarray(a, jnp.float32) for a in (rows, bank)]
  operands.append(jnp.asarray(sizes, jnp.int32))
  np.testing.assert_allclose(
    implementation.forward(*operands),
    dense_loop(rows, bank, sizes),
    atol=2e-5,
  )
  gradients = implementation.backward(*operands, jnp.asarray(grad, jnp.float32))
  expected = dense_gradients(rows, bank, sizes, grad)
  for ours, theirs in zip(gradients, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_one_row() -> None:
  out = grouped_matmul.grouped_matmul(
    jnp.ones((1, 3)), jnp.ones((2, 3, 5)), jnp.array([0, 1], jnp.int32)
  )
  np.testing.assert_array_equal(out, np.full((1, 5), 3.0))


def test_bfloat16_rows_stay_bfloat16() -> None:
  bank = jnp.ones((2, 3, 5), jnp.bfloat16)
  rows, sizes = jnp.ones((4, 3), jnp.bfloat16), jnp.array([1, 3], jnp.int32)
  out, vjp = jax.vjp(
    lambda rows, bank: grouped_matmul.grouped_matmul(rows, bank, sizes),
    rows,
    bank,
  )
  assert {a.dtype for a in (out, *vjp(out))} == {jnp.dtype(jnp.bfloat16)}
