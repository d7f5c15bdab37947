"""Causal attention in plain JAX, for every backend.

`blocks` keeps no square of positions; it is the best where there is no kernel,
on CPUs above all. XLA's own keeps one.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.experts.dropout import dropout
from moe_jax.model.attention import ATTENTIONS, CausalAttention

BLOCKS = 'blocks'
# Queries whose scores are in memory together.
BLOCK = 128
# Parts of a sequence: the program has code for each, however long they are.
_PARTS = 8


@ATTENTIONS.register('xla')
class SquareAttention(CausalAttention):
  """XLA's own attention, whose scores are a square of positions."""

  def __call__(
    self, query_BLHA: jax.Array, key_BLGA: jax.Array, value_BLGA: jax.Array
  ) -> jax.Array:
    """Returns softmax attention, [B, L, H, A]."""
    return jax.nn.dot_product_attention(
      query_BLHA, key_BLGA, value_BLGA, is_causal=True, implementation='xla'
    )

  def within(
    self,
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    segment_ids_BL: jax.Array,
  ) -> jax.Array:
    """Returns the same within segments."""
    return jax.nn.dot_product_attention(
      query_BLHA,
      key_BLGA,
      value_BLGA,
      mask=same_segment(segment_ids_BL, segment_ids_BL)[:, None],
      is_causal=True,
      implementation='xla',
    )


@ATTENTIONS.register(BLOCKS)
class BlockAttention(CausalAttention):
  """Attention of `BLOCK` queries at a time."""

  def __call__(
    self, query_BLHA: jax.Array, key_BLGA: jax.Array, value_BLGA: jax.Array
  ) -> jax.Array:
    """Returns softmax attention, [B, L, H, A]."""
    return blocks(query_BLHA, key_BLGA, value_BLGA)

  def within(
    self,
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    segment_ids_BL: jax.Array,
  ) -> jax.Array:
    """Returns the same within segments."""
    return blocks(
      query_BLHA, key_BLGA, value_BLGA, segment_ids_BL=segment_ids_BL
    )


def same_segment(query_BQ: jax.Array, key_BL: jax.Array) -> jax.Array:
  """Returns seen_BQL, bool: of which keys a query's segment is.

  Padding is a segment too, the last of its row, so that every query sees
  itself and no softmax is empty.
  """
  return query_BQ[:, :, None] == key_BL[:, None, :]


def blocks(
  query_BLHA: jax.Array,
  key_BLGA: jax.Array,
  value_BLGA: jax.Array,
  rate: float = 0.0,
  rng: jax.Array | None = None,
  segment_ids_BL: jax.Array | None = None,
) -> jax.Array:
  """Causal softmax attention, 128 queries at a time.

  A sequence is cut into eight parts at most, and the blocks of a part meet the
  keys up to its end. So of the square of positions 10 in 16 are computed for
  512 of them, and 9 in 16 for 1024 and more. Backward computes the scores once
  more, and what it keeps grows as the sequence does.

  Args:
    query_BLHA: The queries; H is a multiple of G.
    key_BLGA: The keys of as many positions.
    value_BLGA: Their values.
    rate: The rate of dropout on the weights.
    rng: The key of its random numbers; None for no dropout.
    segment_ids_BL: The segments that a query does not see beyond; None for one
      a row.

  Returns:
    An array [B, L, H, A] in the dtype of the values. The softmax is float32.
  """
  length = query_BLHA.shape[1]
  rows = min(BLOCK, length)
  count = math.ceil(length / rows)
  per_part = math.ceil(count / _PARTS)
  firsts = range(0, count, per_part)
  queries = _cut(query_BLHA, rows, groups=key_BLGA.shape[2])
  key_BGLA, value_BGLA = key_BLGA.swapaxes(1, 2), value_BLGA.swapaxes(1, 2)
  if segment_ids_BL is not None:
    # What fills the last block up is like the last query, which sees itself.
    padding = [(0, 0), (0, -length % rows)]
    segment_ids_BL = jnp.pad(segment_ids_BL, padding, mode='edge')
  sizes = [min(per_part, count - first) for first in firsts]
  attended = []
  # `lax.split`, as its gradient is one concatenation.
  for first, part in zip(firsts, lax.split(queries, sizes), strict=True):
    end = min((first + per_part) * rows, length)
    attend = functools.partial(_block, end=end, rate=rate)

    # Recomputed in the backward pass. The keys are cut inside, as what goes in
    # is kept.
    @jax.checkpoint
    def block(
      query_BGhQA: jax.Array, i: jax.Array | int, attend=attend
    ) -> jax.Array:
      return attend(query_BGhQA, key_BGLA, value_BGLA, i, rng, segment_ids_BL)

    if len(part) == 1:
      attended.append(block(part[0], first)[None])
    else:
      ids = first + jnp.arange(len(part))
      attended.append(lax.map(lambda a: block(*a), (part, ids)))
  return _join(jnp.concatenate(attended), length)


def _block(
  query_BGhQA: jax.Array,
  key_BGLA: jax.Array,
  value_BGLA: jax.Array,
  i: jax.Array | int,
  rng: jax.Array | None,
  segment_ids_BL: jax.Array | None,
  *,
  end: int,
  rate: float,
) -> jax.Array:
  """Attends from the i-th block of Q queries to the first `end` keys."""
  batch, groups, _, rows, head_dim = query_BGhQA.shape
  # The heads of a group as more rows of one matmul.
  query_BGMA = query_BGhQA.reshape(batch, groups, -1, head_dim)
  scores_BGML = jnp.einsum(
    'BGMA,BGLA->BGML',
    query_BGMA,
    key_BGLA[:, :, :end],
    preferred_element_type=jnp.float32,
  )
  scores = scores_BGML.reshape(batch, groups, -1, rows, end) / head_dim**0.5
  seen = i * rows + jnp.arange(rows)[:, None] >= jnp.arange(end)
  if segment_ids_BL is not None:
    own_BQ = lax.dynamic_slice_in_dim(segment_ids_BL, i * rows, rows, axis=1)
    own_BQL = same_segment(own_BQ, segment_ids_BL[:, :end])
    seen = seen & own_BQL[:, None, None]
  weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
  if rng is not None:
    weights = dropout(weights, rate, jax.random.fold_in(rng, i))
  attended_BGMA = jnp.einsum(
    'BGML,BGLA->BGMA',
    weights.reshape(scores_BGML.shape).astype(value_BGLA.dtype),
    value_BGLA[:, :, :end],
  )
  return attended_BGMA.reshape(query_BGhQA.shape)


def _cut(query_BLHA: jax.Array, rows: int, groups: int) -> jax.Array:
  """Cuts into [blocks, B, G, H/G, Q, A]; the last block may be padded."""
  batch, length, heads, head_dim = query_BLHA.shape
  padding = [(0, 0), (0, -length % rows), (0, 0), (0, 0)]
  shape = batch, -1, rows, groups, heads // groups, head_dim
  return jnp.pad(query_BLHA, padding).reshape(shape).transpose(1, 0, 3, 4, 2, 5)


def _join(blocks: jax.Array, length: int) -> jax.Array:
  """Joins what `_cut` took apart, to [B, L, H, A]."""
  count, batch, groups, heads, rows, head_dim = blocks.shape
  shape = batch, count * rows, groups * heads, head_dim
  return blocks.transpose(1, 0, 4, 2, 3, 5).reshape(shape)[:, :length]
