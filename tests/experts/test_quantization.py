"""Products of operands in eight bits: their rounding, and their gradients."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.experts.grouped_matmul import grouped_matmul, quantization
from moe_jax.model.implementations import chosen_matmul
from moe_jax.planning import topologies
from tests.helpers.dense_matmul import ROWS, dense_gradients, dense_loop

# Groups that are uneven and empty, and rows in none.
SIZES = [7, 250, 0, 120]
D, F = 24, 40


def rounded(array: np.ndarray, name: str, axes: Any) -> np.ndarray:
  """What is left of numbers in eight bits, in float64.

  They are scaled in float32, or a few would be rounded to the other side.
  """
  largest = np.float32({'int8': 127, 'fp8': 448}[name])
  array = array.astype(np.float32)
  scale = np.abs(array).max(axes, keepdims=True) / largest
  values = array / scale
  if name == 'fp8':
    values = values.astype(ml_dtypes.float8_e4m3fn)
  else:
    values = np.round(values)
  return values.astype(np.float64) * scale


def operands() -> list[np.ndarray]:
  """Rows, weights and a gradient, whose rows and columns differ in size.

  None of these numbers lies in the middle between two of eight bits.
  """
  rng = np.random.default_rng(1)
  shapes = (ROWS, D), (len(SIZES), D, F), (ROWS, F)
  made = [rng.standard_normal(shape) for shape in shapes]
  made[0] *= rng.uniform(0.01, 10, (ROWS, 1))
  made[1] *= rng.uniform(0.01, 10, F)
  made[2] *= rng.uniform(0.01, 10, (ROWS, 1))
  return [a.astype(np.float32).astype(np.float64) for a in made]


@pytest.mark.parametrize('name', ['int8', 'fp8'])
@pytest.mark.parametrize('implementation', ['blocks', 'ragged_dot', 'padded'])
def test_products_are_those_of_rounded_operands(
  implementation: str, name: str
) -> None:
  """And so is the rows' gradient; the weights' is of what was not rounded."""
  rows, weights, grad = operands()

  @jax.jit
  def run(rows: Any, weights: Any, sizes: Any, grad: Any) -> Any:
    def product(rows: Any, weights: Any) -> jax.Array:
      return grouped_matmul(
        rows, weights, sizes, implementation, quantized=name
      )

    out, vjp = jax.vjp(product, rows, weights)
    return out, *vjp(grad)

  given = [jnp.asarray(a, jnp.float32) for a in (rows, weights, grad)]
  out, rows_grad, weights_grad = run(
    *given[:2], jnp.asarray(SIZES, jnp.int32), given[2]
  )
  forward = rounded(rows, name, 1), rounded(weights, name, (0, 1))
  backward = rounded(weights, name, (0, 2)), rounded(grad, name, 1)
  expected_rows_grad, _ = dense_gradients(rows, backward[0], SIZES, backward[1])
  _, expected_weights_grad = dense_gradients(rows, weights, SIZES, grad)
  assert_close(out, dense_loop(*forward, SIZES))
  assert_close(rows_grad, expected_rows_grad)
  assert_close(weights_grad, expected_weights_grad)
  # As far off as eight bits are, and no further: half a step of 1 / 127, or of
  # 1 / 8 of each number, both small against sums of 24 products.
  off = np.abs(out - dense_loop(rows, weights, SIZES)).mean()
  size = np.abs(dense_loop(rows, weights, SIZES)).mean()
  assert 1e-3 < off / size < 0.05


def assert_close(ours: jax.Array, theirs: np.ndarray) -> None:
  """Equal to float32, row by row: a number rounded otherwise is off by 1e-3."""
  scale = np.abs(theirs).max(-1, keepdims=True) + 1e-30
  np.testing.assert_allclose(ours / scale, theirs / scale, atol=3e-5)


@pytest.mark.parametrize('name', ['int8', 'fp8'])
def test_what_is_not_finite_stays_so(name: str) -> None:
  """Eight bits may hold neither, and a step has to notice."""
  rows = jnp.ones((4, 3)).at[1, 2].set(jnp.inf).at[2, 0].set(jnp.nan)
  sizes = jnp.array([4], jnp.int32)
  out = grouped_matmul(
    rows.at[3].set(0), jnp.ones((1, 3, 5)), sizes, 'blocks', quantized=name
  )
  assert np.isfinite(out).all(1).tolist() == [True, False, False, True]
  np.testing.assert_array_equal(out[3], 0)


def test_the_largest_number_is_kept() -> None:
  """It is the end of the range, which rounding may not pass."""
  array = jnp.array([[3.0, -3.0, 1.0]])
  for name, largest in (('int8', 127), ('fp8', 448)):
    values = quantization.quantize(array, name, (1,)).values
    assert values.astype(jnp.float32)[0, :2].tolist() == [largest, -largest]


@pytest.mark.parametrize(
  'topology, name, allowed',
  [
    ('v4:2x2x1', 'int8', False),
    ('v5e:2x2', 'int8', True),
    ('v5e:2x2', 'fp8', False),
    ('v6e:2x2', 'int8', True),
    ('tpu7x:2x2x1', 'fp8', True),
    ('tpu7x:2x2x1', 'int8', False),
  ],
)
def test_devices_that_multiply_eight_bits(
  topology: str, name: str, allowed: bool
) -> None:
  device = topologies.target(topology).devices[0]
  if allowed:
    matmul = chosen_matmul('auto', device, name)
    assert (matmul.name, matmul.quantized) == ('megablox', name)
    return
  with pytest.raises(UserError, match=f"moe.quantization = '{name}' is mult"):
    chosen_matmul('auto', device, name)


class Gpu:
  """What is asked of a GPU."""

  platform, device_kind = 'gpu', 'a GPU'

  def __init__(self, compute_capability: str) -> None:
    self.compute_capability = compute_capability


def test_gpus_that_multiply_eight_bits() -> None:
  assert quantization.obstacle('int8', Gpu('8.0')) is None
  assert quantization.obstacle('fp8', Gpu('9.0')) is None
  told = quantization.obstacle('fp8', Gpu('8.0'))
  assert told == 'needs compute capability 8.9, and this is 8.0'


def test_kernels_that_do_not() -> None:
  with pytest.raises(UserError) as error:
    chosen_matmul('mosaic', jax.devices()[0], 'int8')
  assert "moe.grouped_matmul = 'mosaic'" in str(error.value)
  assert "moe.quantization = 'int8'" in str(error.value)


def compiled_products(topology: str, name: str) -> str:
  """The program of a product and its gradients, as a compiler left it."""
  try:
    device = topologies.target(topology).devices[0]
  except UserError as error:
    pytest.skip(str(error))
  multiply = chosen_matmul('auto', device, name)
  sharding = jax.sharding.SingleDeviceSharding(device)

  def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def run(rows: Any, weights: Any, sizes: Any, grad: Any) -> Any:
    out, vjp = jax.vjp(lambda *a: multiply(*a, sizes), rows, weights)
    return out, *vjp(grad)

  shapes = (1024, 256), (4, 256, 512), (1024, 512)
  rows, weights, grad = (array(shape, jnp.bfloat16) for shape in shapes)
  lowered = jax.jit(run).lower(rows, weights, array((4,), jnp.int32), grad)
  text = lowered.compile().as_text()
  assert text is not None
  return text


@pytest.mark.slow
@pytest.mark.parametrize(
  'topology, name, dtype, accumulated',
  [
    ('v5e:1x1', 'int8', 's8', 's32'),
    ('v6e:1x1', 'int8', 's8', 's32'),
    ('tpu7x:2x2x1', 'fp8', 'f8e4m3fn', 'f32'),
  ],
)
def test_tpus_multiply_eight_bits(
  topology: str, name: str, dtype: str, accumulated: str
) -> None:
  """The kernel takes them as they are; elsewhere they are widened before it."""
  text = compiled_products(topology, name)
  shapes = instruction_types(text)
  kernels = re.findall(
    r'= (\w+)\[[\d,]+\]\S* custom-call\(([^)]*)\)[^\n]*tpu_custom_call', text
  )
  products = [
    [accumulated_in, *(shapes[each] for each in operands[-2:])]
    for accumulated_in, names in kernels
    if len(operands := re.findall(r'%([\w.-]+)', names)) > 5
  ]
  assert products.count([accumulated, dtype, dtype]) == 2


@pytest.mark.slow
def test_hoppers_multiply_eight_bits() -> None:
  """Triton's kernel takes both operands of two products of three in fp8."""
  text = compiled_products('h100:1x1', 'fp8')
  layouts = re.findall(
    r'__gpu\$xla.gpu.triton".*?operand_layout_constraints=\{(\w+)\[[\d,]+\]'
    r'\{[\d,]+\}, (\w+)\[',
    text,
  )
  assert sorted(layouts) == [('bf16', 'bf16'), *[('f8e4m3fn',) * 2] * 2]


def instruction_types(text: str) -> dict[str, str]:
  """The element type of every array of a program, by its name."""
  return dict(re.findall(r'%([\w.-]+) = (\w+)\[', text))
