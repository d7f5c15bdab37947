"""RMSNorm, LayerNorm and rotary position embedding."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.experts.remat import remat_method
from moe_jax.parameter import param


class RMSNorm(nnx.Module):
  """`x / rms(x) * scale`, computed in float32 (arXiv 1910.07467).

  Attributes:
    scale_D: The learned scale, float32; it starts at 1.
  """

  def __init__(self, size: int, epsilon: float):
    self.scale_D = param(jnp.ones((size,), jnp.float32))
    self.epsilon = epsilon

  @remat_method()
  def __call__(self, x: jax.Array) -> jax.Array:
    exact = x.astype(jnp.float32)
    mean_square = jnp.square(exact).mean(-1, keepdims=True)
    normal = exact * jax.lax.rsqrt(mean_square + self.epsilon)
    return (normal * self.scale_D[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
  """`(x - mean) / std * scale + shift`, in float32 (arXiv 1607.06450).

  Attributes:
    scale_D, shift_D: The learned scale and shift, float32; they start at 1 and
      0.
  """

  def __init__(self, size: int, epsilon: float):
    self.scale_D = param(jnp.ones((size,), jnp.float32))
    self.shift_D = param(jnp.zeros((size,), jnp.float32))
    self.epsilon = epsilon

  @remat_method()
  def __call__(self, x: jax.Array) -> jax.Array:
    exact = x.astype(jnp.float32)
    centred = exact - exact.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + self.epsilon)
    return (normal * self.scale_D[...] + self.shift_D[...]).astype(x.dtype)


def rotate(
  x_BLHA: jax.Array, theta: float, positions_BL: jax.Array | None = None
) -> jax.Array:
  """Applies rotary position embedding (arXiv 2104.09864).

  Pairs are (a, a + A/2), the half-split layout of Llama checkpoints.

  Args:
    x_BLHA: The queries or keys; A is even.
    theta: The base of the wavelengths.
    positions_BL: The positions, int32; None for 0 .. L-1 in every row.

  Returns:
    The rotated array, in the dtype of `x_BLHA`.
  """
  length, head_dim = x_BLHA.shape[1], x_BLHA.shape[-1]
  frequency = theta ** (-jnp.arange(0, head_dim, 2) / head_dim)
  positions = jnp.arange(length) if positions_BL is None else positions_BL
  # [L, 1, 1, A/2], and with positions of every row [B, L, 1, 1, A/2].
  angle = positions[..., None, None, None] * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  # Made once: fused into what follows they would be for every head and batch.
  cos, sin = jax.lax.optimization_barrier(
    (cos, jnp.concatenate([-sin, sin], -2))
  )
  pairs = x_BLHA.astype(jnp.float32).reshape(*x_BLHA.shape[:-1], 2, -1)
  # (a cos - b sin, b cos + a sin); reversing keeps inner loops free of a
  # concatenation's branch, backward too.
  rotated = pairs * cos + pairs[..., ::-1, :] * sin
  return rotated.reshape(x_BLHA.shape).astype(x_BLHA.dtype)
