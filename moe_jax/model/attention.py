"""Causal self-attention with grouped queries."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.experts.dropout import dropout
from moe_jax.model import attention_blocks
from moe_jax.model.layers import rotate
from moe_jax.parameter import EMBED, HEADS, KV_HEADS, param

# query_BLHA, key_BLGA, value_BLGA -> attended_BLHA: every position sees itself
# and all before it.
Causal = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Attend(Protocol):
  """Which positions a query sees, and how much of each."""

  def __call__(
    self,
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    key_pe_AW: jax.Array | None,
    key: jax.Array | None,
  ) -> jax.Array:
    """The weighted values, [B, L, H, A].

    Keys and values may have positions in front of those of the queries: what
    came before the sequence.
    """


class Attention(nnx.Module):
  """Grouped-query attention (arXiv 2305.13245), without biases.

  Padding stands at the end of a sequence, so causality alone hides it.

  Attributes:
    query_DHA, key_DGA, value_DGA, out_HAD: projections; H is a multiple of G.
    attend: from queries, keys and values to what is seen.
  """

  def __init__(
    self,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    attend: Attend,
    init_std: float,
    rngs: nnx.Rngs,
  ):
    init = nnx.initializers.normal(init_std)
    sizes = {
      EMBED: hidden_size,
      HEADS: num_heads,
      KV_HEADS: num_kv_heads,
      None: head_dim,
    }

    def weight(*axes: str | None, remembered: bool = False) -> nnx.Param:
      shape = [sizes[axis] for axis in axes]
      value = init(rngs.params(), shape, jnp.float32)
      return param(value, axes, decay=True, remembered=remembered)

    self.query_DHA = weight(EMBED, HEADS, None)
    self.key_DGA = weight(EMBED, KV_HEADS, None, remembered=True)
    self.value_DGA = weight(EMBED, KV_HEADS, None, remembered=True)
    self.out_HAD = weight(HEADS, None, EMBED)
    self.attend = attend

  def __call__(
    self,
    context_BLD: jax.Array,
    length: int,
    key_pe_AW: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Attends from the last `length` positions of the context, [B, L, D].

    Args:
      context_BLD: what came before the sequence, if anything, and itself.
      length: of the sequence.
      key_pe_AW: for `SpanAttend`.
      key: of dropout; None for none.
    """
    dtype = context_BLD.dtype

    def project(equation: str, x_BLD: jax.Array, w: nnx.Param) -> jax.Array:
      return jnp.einsum(equation, x_BLD, w[...].astype(dtype))

    x_BLD = context_BLD[:, context_BLD.shape[1] - length :]
    attended_BLHA = self.attend(
      project('BLD,DHA->BLHA', x_BLD, self.query_DHA),
      project('BLD,DGA->BLGA', context_BLD, self.key_DGA),
      project('BLD,DGA->BLGA', context_BLD, self.value_DGA),
      key_pe_AW,
      key,
    )
    return project('BLHA,HAD->BLD', attended_BLHA, self.out_HAD)


class RotaryAttend:
  """Every position sees itself and all before it; positions are rotations."""

  def __init__(self, theta: float, dropout: float, causal: Causal):
    """Describes it.

    Args:
      theta: the base of the wavelengths.
      dropout: rate on the attention weights.
      causal: the attention of rotated queries and keys.
    """
    self.theta = theta
    self.dropout = dropout
    self.causal = causal

  def __call__(
    self,
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    key_pe_AW: jax.Array | None,
    key: jax.Array | None,
  ) -> jax.Array:
    del key_pe_AW
    query_BLHA = rotate(query_BLHA, self.theta)
    key_BLGA = rotate(key_BLGA, self.theta)
    if self.dropout and key is not None:
      return attention_blocks.blocks(
        query_BLHA, key_BLGA, value_BLGA, self.dropout, key
      )
    return self.causal(query_BLHA, key_BLGA, value_BLGA)


def group_logits(query_BLHA: jax.Array, key_BLGA: jax.Array) -> jax.Array:
  """Query times key, [B, G, H/G, queries, keys] float32, not yet scaled."""
  batch, length, heads, head_dim = query_BLHA.shape
  groups = key_BLGA.shape[2]
  query = query_BLHA.reshape(batch, length, groups, heads // groups, head_dim)
  return jnp.einsum(
    'BLGhA,BKGA->BGhLK', query, key_BLGA, preferred_element_type=jnp.float32
  )


def weigh(
  logits: jax.Array, value_BLGA: jax.Array, rate: float, key: jax.Array | None
) -> jax.Array:
  """Softmax, dropout at `rate`, weighted sum of the values: [B, L, H, A]."""
  weights = dropout(jax.nn.softmax(logits, axis=-1), rate, key)
  attended = jnp.einsum(
    'BGhLK,BKGA->BLGhA', weights.astype(value_BLGA.dtype), value_BLGA
  )
  batch, length, _, _, head_dim = attended.shape
  return attended.reshape(batch, length, -1, head_dim)
