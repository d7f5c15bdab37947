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
from flax import nnx

from moe_jax.experts.dropout import dropout
from moe_jax.model.attention import AttentionState, BlockContext
from moe_jax.parameter import param

# Queries that are computed together; each then costs W + this many keys.
BLOCK = 128


class SpanAttend:
  """Lets a query see the W positions before it; the state is memory_BWD.

  Attributes:
    span: W.
    state_axes: As in `Attend`.
  """

  state_axes: tuple[str, ...] = ()

  def __init__(self, span: int, dropout: float, block: int = BLOCK) -> None:
    """Sets how far is seen.

    Args:
      span: W.
      dropout: The rate of dropout on the attention weights.
      block: The number of queries that are computed together.
    """
    self.span = span
    self.dropout = dropout
    self.block = block

  def key_pe(self, head_dim: int, rngs: nnx.Rngs) -> nnx.Param:
    """Returns key_pe_AW, drawn from a normal distribution as released."""
    key_pe_AW = jax.random.normal(rngs.params(), (head_dim, self.span))
    return param(key_pe_AW, matmuls=0)  # which are counted with attention

  def start(
    self, num_layers: int, batch_size: int, hidden_size: int, dtype: jnp.dtype
  ) -> jax.Array:
    """Returns the memory before a text begins, zeros [layers, B, W, D]."""
    return jnp.zeros((num_layers, batch_size, self.span, hidden_size), dtype)

  def extend(
    self, x_BLD: jax.Array, memory_BWD: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the memory and the sequence, [B, W + L, D], and its last W.

    No gradient reaches the sequence before.
    """
    memory_BWD = memory_BWD.astype(x_BLD.dtype)
    seen_BLD = jnp.concatenate([memory_BWD, x_BLD], axis=1)
    newest_BWD = seen_BLD[:, -self.span :]
    return seen_BLD, jax.lax.stop_gradient(newest_BWD)

  def __call__(
    self,
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    context: BlockContext,
    state: AttentionState,
  ) -> tuple[jax.Array, AttentionState]:
    """Returns the weighted values, [B, L, H, A], and the state as it is."""
    attended_BLHA = self._in_blocks(query_BLHA, key_BLGA, value_BLGA, context)
    return attended_BLHA, state

  def _in_blocks(
    self,
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    context: BlockContext,
  ) -> jax.Array:
    length, rng = query_BLHA.shape[1], context.rng
    assert context.key_pe_AW is not None, 'the decoder makes it'
    assert context.segments is None, 'a config that asks for both is refused'
    key_pe_AW = context.key_pe_AW.astype(query_BLHA.dtype)
    if length <= self.block:
      return self._attend(query_BLHA, key_BLGA, value_BLGA, key_pe_AW, rng)
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
      query, key, value = (
        jax.lax.dynamic_slice_in_dim(a, first, size, axis=1)
        for a, size in zip(padded, sizes, strict=True)
      )
      block_rng = None if rng is None else jax.random.fold_in(rng, i)
      return self._attend(query, key, value, key_pe_AW, block_rng)

    blocks = jax.lax.map(block, jnp.arange(num_blocks))
    attended = blocks.swapaxes(0, 1).reshape(padded[0].shape)
    return attended[:, :length]

  def _attend(
    self,
    query_BQHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    key_pe_AW: jax.Array,
    rng: jax.Array | None,
  ) -> jax.Array:
    """Attends from Q queries to the W + Q positions that end with the last."""
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
    return weigh(logits, value_BLGA, self.dropout, rng)


def shift_rows(x_BHQW: jax.Array, fill: float) -> jax.Array:
  """Moves row q to the right by q: [B, H, Q, W] -> [B, H, Q, W + Q].

  So the columns become positions: j of query q stands at position q + j. What
  a row does not reach holds `fill`.
  """
  *lead, rows, columns = x_BHQW.shape
  padding = [(0, 0)] * (x_BHQW.ndim - 1) + [(0, rows + 1)]
  flat = jnp.pad(x_BHQW, padding, constant_values=fill).reshape(*lead, -1)
  return flat[..., :-rows].reshape(*lead, rows, columns + rows)


def group_logits(query_BLHA: jax.Array, key_BLGA: jax.Array) -> jax.Array:
  """Returns query times key, [B, G, H/G, queries, keys] float32, not scaled."""
  batch, length, heads, head_dim = query_BLHA.shape
  groups = key_BLGA.shape[2]
  query = query_BLHA.reshape(batch, length, groups, heads // groups, head_dim)
  return jnp.einsum(
    'BLGhA,BKGA->BGhLK', query, key_BLGA, preferred_element_type=jnp.float32
  )


def weigh(
  logits: jax.Array, value_BLGA: jax.Array, rate: float, rng: jax.Array | None
) -> jax.Array:
  """Returns the sum of values by softmax and dropout weights, [B, L, H, A]."""
  weights = dropout(jax.nn.softmax(logits, axis=-1), rate, rng)
  attended = jnp.einsum(
    'BGhLK,BKGA->BLGhA', weights.astype(value_BLGA.dtype), value_BLGA
  )
  batch, length, _, _, head_dim = attended.shape
  return attended.reshape(batch, length, -1, head_dim)
