"""Attention to a span of positions before a token, by learned relative keys.

The attention of RMoE's enwik8 and WikiText-103 settings (arXiv 2408.06793),
which are those of the CompeteSMoE code base: position i sees i - W .. i - 1,
not itself, and

  logits = (query . key + query . key_pe[:, j]) / sqrt(A)

where j = 0 is the farthest position and W - 1 the one before the query. What
came before the sequence is a memory of hidden states. At the beginning of a
text it is zero, and zeros are seen like anything else: their content adds
nothing to the logits, but their positions do, and they take their share of the
softmax (as released).
"""

import jax
import jax.numpy as jnp

from moe_jax.model.attention import group_logits, weigh

# Queries that are computed together; each then costs W + this many keys.
BLOCK = 128


class SpanAttend:
  """See the module; the context is W positions and the sequence itself."""

  def __init__(self, dropout: float, block: int = BLOCK):
    """Describes it.

    Args:
      dropout: rate on the attention weights.
      block: queries computed together.
    """
    self.dropout = dropout
    self.block = block

  def __call__(
    self,
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    key_pe_AW: jax.Array | None,
    key: jax.Array | None,
  ) -> jax.Array:
    length = query_BLHA.shape[1]
    key_pe_AW = key_pe_AW.astype(query_BLHA.dtype)
    if length <= self.block:
      return self._attend(query_BLHA, key_BLGA, value_BLGA, key_pe_AW, key)
    num_blocks = -(-length // self.block)
    missing = num_blocks * self.block - length
    padded = [
      jnp.pad(a, [(0, 0), (0, missing), (0, 0), (0, 0)])
      for a in (query_BLHA, key_BLGA, value_BLGA)
    ]

    # Recomputed in the backward pass: else the logits of all blocks would be
    # kept, which is what the blocks are there to avoid.
    @jax.checkpoint
    def block(i: jax.Array) -> jax.Array:
      first = i * self.block
      sizes = (self.block, *[self.block + key_pe_AW.shape[1]] * 2)
      parts = [
        jax.lax.dynamic_slice_in_dim(a, first, size, axis=1)
        for a, size in zip(padded, sizes, strict=True)
      ]
      block_key = None if key is None else jax.random.fold_in(key, i)
      return self._attend(*parts, key_pe_AW, block_key)

    blocks = jax.lax.map(block, jnp.arange(num_blocks))
    attended = blocks.swapaxes(0, 1).reshape(padded[0].shape)
    return attended[:, :length]

  def _attend(
    self,
    query_BQHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    key_pe_AW: jax.Array,
    key: jax.Array | None,
  ) -> jax.Array:
    """Of Q queries and the W + Q positions that end with the last of them."""
    batch, length, heads, head_dim = query_BQHA.shape
    content = group_logits(query_BQHA, key_BLGA)
    position_BHQW = jnp.einsum(
      'BQHA,AW->BHQW',
      query_BQHA,
      key_pe_AW,
      preferred_element_type=jnp.float32,
    )
    position = shift_rows(position_BHQW, -jnp.inf).reshape(content.shape)
    logits = (content + position) / head_dim**0.5
    return weigh(logits, value_BLGA, self.dropout, key)


def shift_rows(x_BHQW: jax.Array, fill: float) -> jax.Array:
  """[B, H, Q, W] -> [B, H, Q, W + Q], row q moved to the right by q.

  So the columns become positions: j of query q stands at position q + j. What
  a row does not reach holds `fill`.
  """
  *lead, rows, columns = x_BHQW.shape
  padding = [(0, 0)] * (x_BHQW.ndim - 1) + [(0, rows + 1)]
  flat = jnp.pad(x_BHQW, padding, constant_values=fill).reshape(*lead, -1)
  return flat[..., :-rows].reshape(*lead, rows, columns + rows)
