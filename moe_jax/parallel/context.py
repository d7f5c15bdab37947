"""Context parallelism: the positions of a sequence on several devices.

A sequence is cut into shards, as many as the mesh axis `context` has devices,
and every shard is a row: [B, L] becomes [B n, L / n], a plain reshape, for n of
them. Tokens keep their order, so whatever works token by token notices nothing.
Attention alone needs whole sequences: before it devices exchange positions for
heads, and back after it (DeepSpeed-Ulysses, arXiv 2309.14509), so that each has
all positions of some of the heads. Any attention then runs as it is, with no
more to mask, and no device has more to do than another.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.mesh import BATCH_AXES, CONTEXT, TENSOR, TOKEN_AXES

# Of arrays [rows, positions, heads, A]: where rows are shards of sequences, and
# where every device has whole sequences of its part of the heads.
SHARDED = P(TOKEN_AXES, None, TENSOR, None)
WHOLE = P(BATCH_AXES, None, (TENSOR, CONTEXT), None)


def size(mesh: Mesh | None) -> int:
  """Returns the number of devices along `context`; 1 without a mesh."""
  return 1 if mesh is None else mesh.shape[CONTEXT]


def shard(a_BL: jax.Array, count: int) -> jax.Array:
  """Returns the rows [B, L] as [B count, L / count]."""
  batch, length = a_BL.shape
  return a_BL.reshape(batch * count, length // count)


def by_heads(
  attend: Callable[..., jax.Array],
  mesh: Mesh | None,
  seq_shards: int,
  query_BLHA: jax.Array,
  key_BLGA: jax.Array,
  value_BLGA: jax.Array,
) -> jax.Array:
  """Calls an attention of whole sequences on rows that are shards of them.

  Args:
    attend: The function of queries, keys and values of whole sequences. Their
      heads are split over `tensor` and `context`; where there are fewer heads
      of keys than that takes, each stands there several times.
    mesh: Where the arrays are; None for one device. The product of its axes
      `tensor` and `context` divides H.
    seq_shards: The rows that make up a sequence.
    query_BLHA: The queries, [B seq_shards, L / seq_shards, H, A].
    key_BLGA: The keys, with G heads.
    value_BLGA: Their values.

  Returns:
    What `attend` returns, in the shape of the queries.
  """
  if mesh is None or size(mesh) == 1:
    return attend(query_BLHA, key_BLGA, value_BLGA)
  num_keys = key_BLGA.shape[2]
  copies = math.lcm(num_keys, mesh.shape[TENSOR] * size(mesh)) // num_keys
  if copies > 1:
    key_BLGA, value_BLGA = (
      jnp.repeat(a, copies, axis=2) for a in (key_BLGA, value_BLGA)
    )

  def local(a: jax.Array, length: int, split: int, joined: int) -> jax.Array:
    # Tokens of all rows, in whose order a device's follow those of the last.
    tokens = a.reshape(-1, *a.shape[2:])
    tokens = lax.all_to_all(tokens, CONTEXT, split, joined, tiled=True)
    return tokens.reshape(-1, length, *tokens.shape[1:])

  def whole(a: jax.Array) -> jax.Array:
    return local(a, a.shape[1] * seq_shards, split=1, joined=0)

  def sharded(a: jax.Array) -> jax.Array:
    return local(a, a.shape[1] // seq_shards, split=0, joined=1)

  exchange = jax.shard_map(
    whole, mesh=mesh, in_specs=SHARDED, out_specs=WHOLE, check_vma=True
  )
  back = jax.shard_map(
    sharded, mesh=mesh, in_specs=WHOLE, out_specs=SHARDED, check_vma=True
  )
  arrays = query_BLHA, key_BLGA, value_BLGA
  return back(attend(*map(exchange, arrays)))
