"""Causal self-attention with grouped queries and rotary positions."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.model.layers import rotate


class Attention(nnx.Module):
  """Grouped-query attention (arXiv 2305.13245), without biases.

  Every position attends to itself and those before it in its sequence. Padding
  stands at the end of a sequence, so causality alone hides it.

  Attributes:
    query_DHA, key_DGA, value_DGA, out_HAD: projections; H is a multiple of G.
  """

  def __init__(
    self,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    rope_theta: float,
    init_std: float,
    rngs: nnx.Rngs,
  ):
    init = nnx.initializers.normal(init_std)

    def weight(*shape: int) -> nnx.Param:
      return nnx.Param(init(rngs.params(), shape, jnp.float32))

    self.query_DHA = weight(hidden_size, num_heads, head_dim)
    self.key_DGA = weight(hidden_size, num_kv_heads, head_dim)
    self.value_DGA = weight(hidden_size, num_kv_heads, head_dim)
    self.out_HAD = weight(num_heads, head_dim, hidden_size)
    self.rope_theta = rope_theta

  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    def project(equation: str, weight: nnx.Param) -> jax.Array:
      return jnp.einsum(equation, x_BLD, weight[...].astype(x_BLD.dtype))

    query_BLHA = project('BLD,DHA->BLHA', self.query_DHA)
    key_BLGA = project('BLD,DGA->BLGA', self.key_DGA)
    value_BLGA = project('BLD,DGA->BLGA', self.value_DGA)
    attended_BLHA = jax.nn.dot_product_attention(
      rotate(query_BLHA, self.rope_theta),
      rotate(key_BLGA, self.rope_theta),
      value_BLGA,
      is_causal=True,
    )
    out_HAD = self.out_HAD[...].astype(x_BLD.dtype)
    return jnp.einsum('BLHA,HAD->BLD', attended_BLHA, out_HAD)
