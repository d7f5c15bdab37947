"""Causal self-attention with grouped queries.

`Attention` projects; what its queries see and what is remembered for the next
sequence is the matter of its `Attend`: `RotaryAttend` here, `SpanAttend` in
`attention_span`, and in `attention_cached` those of generation, which remember
keys and values. With rotary positions the attention of whole sequences is one
of `ATTENTIONS`, and a user's own class may be among them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.model.layers import rotate
from moe_jax.parallel import context as context_lib
from moe_jax.parameter import EMBED, HEADS, KV_HEADS, param
from moe_jax.registry import ATTENTIONS as ATTENTIONS
from moe_jax.routing.router import Context

# What backward needs of a kernel's result goes by this name.
ATTENDED = 'attended'

# What attention remembers of a sequence for the one that follows: any pytree of
# arrays [B, ...], () where it remembers nothing. Only `Attend` looks into it.
AttentionState = Any


class Slots(NamedTuple):
  """How a cache of keys and values stands before the next token of every row.

  Attributes:
    position_B: The position of that token in its text, int32.
    seen_BC: Bool, True at the slots that it sees; None where it sees all.
    next: The slot that it takes itself, int32 [].
  """

  position_B: jax.Array
  seen_BC: jax.Array | None
  next: jax.Array


class Segments(NamedTuple):
  """Where the documents of packed rows lie.

  Attributes:
    ids_BL: The number of a position's segment in its row, int32: 1, 2, ... from
      left to right, and 0 at padding. A token sees its own segment alone.
    positions_BL: The position in its segment, int32, from 0 on.
  """

  ids_BL: jax.Array
  positions_BL: jax.Array


def segments_of(batch: Mapping[str, jax.Array]) -> Segments | None:
  """Returns the segments of a batch; None where its rows are not packed."""
  if 'segment_ids' not in batch:
    return None
  return Segments(batch['segment_ids'], batch['positions'])


@dataclasses.dataclass(frozen=True)
class BlockContext(Context):
  """What a block is told beside its input and its states.

  Attributes:
    key_pe_AW: The learned keys of relative positions, which all layers and
      heads share; None where positions are not learned.
    segments: The documents of packed rows; None where a row is one segment.
    slots: The slots of the cache that the state of attention is; None where it
      is another, and for the beginning of a text.
  """

  key_pe_AW: jax.Array | None = None
  segments: Segments | None = None
  slots: Slots | None = None


class Attend(Protocol):
  """Says what a query sees, and what of a sequence is remembered.

  Attributes:
    state_axes: The mesh axes that split the axes behind B of the states.
  """

  state_axes: tuple[str, ...]

  def key_pe(self, head_dim: int, rngs: nnx.Rngs) -> nnx.Param | None:
    """Returns the keys of positions that all layers share, if they have any."""
    ...

  def start(
    self, num_layers: int, batch_size: int, hidden_size: int, dtype: jnp.dtype
  ) -> AttentionState:
    """Returns the state at the beginning of a text, each [layers, B, ...]."""
    ...

  def extend(
    self, x_BLD: jax.Array, state: AttentionState
  ) -> tuple[jax.Array, AttentionState]:
    """Returns seen_BLD, which ends with x_BLD, and the next state."""
    ...

  def __call__(
    self,
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    context: BlockContext,
    state: AttentionState,
  ) -> tuple[jax.Array, AttentionState]:
    """Returns the weighted values, [B, L, H, A], and the next state.

    Keys and values are of all that `extend` returned, and the state is the one
    beside it.
    """
    ...


class Attention(nnx.Module):
  """Grouped-query attention (arXiv 2305.13245), without biases.

  Padding stands at the end of a sequence, so causality alone hides it.

  Attributes:
    query_DHA, key_DGA, value_DGA, out_HAD: The projections; H is a multiple of
      G. They start with deviations of `init_std`, the last of `out_std`, which
      is `init_std` if None.
    attend: Goes from queries, keys and values to what is seen.
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
    out_std: float | None = None,
  ):
    out_std = init_std if out_std is None else out_std
    sizes = {
      EMBED: hidden_size,
      HEADS: num_heads,
      KV_HEADS: num_kv_heads,
      None: head_dim,
    }

    def weight(
      *axes: str | None, std: float = init_std, remembered: bool = False
    ) -> nnx.Param:
      shape = [sizes[axis] for axis in axes]
      value = nnx.initializers.normal(std)(rngs.params(), shape, jnp.float32)
      return param(value, axes, decay=True, remembered=remembered)

    self.query_DHA = weight(EMBED, HEADS, None)
    self.key_DGA = weight(EMBED, KV_HEADS, None, remembered=True)
    self.value_DGA = weight(EMBED, KV_HEADS, None, remembered=True)
    self.out_HAD = weight(HEADS, None, EMBED, std=out_std)
    self.attend = attend

  def extend(
    self, x_BLD: jax.Array, state: AttentionState
  ) -> tuple[jax.Array, AttentionState]:
    """Returns what is seen of the past in front of x_BLD, and the next state.

    Args:
      x_BLD: The hidden states of a sequence.
      state: What this method returned for the tokens right before.
    """
    return self.attend.extend(x_BLD, state)

  def __call__(
    self, seen_BLD: jax.Array, context: BlockContext, state: AttentionState
  ) -> tuple[jax.Array, AttentionState]:
    """Attends from the sequence to all that is seen.

    Args:
      seen_BLD: What `extend` returned, or a position-wise function of it.
      context: Its key is that of dropout.
      state: What `extend` returned beside it.

    Returns:
      [B, L, D], and the next state.
    """
    dtype = seen_BLD.dtype

    def project(equation: str, x_BLD: jax.Array, w: nnx.Param) -> jax.Array:
      return jnp.einsum(equation, x_BLD, w[...].astype(dtype))

    past = seen_BLD.shape[1] - context.token_ids_BL.shape[1]
    attended_BLHA, state = self.attend(
      project('BLD,DHA->BLHA', seen_BLD[:, past:], self.query_DHA),
      project('BLD,DGA->BLGA', seen_BLD, self.key_DGA),
      project('BLD,DGA->BLGA', seen_BLD, self.value_DGA),
      context,
      state,
    )
    return project('BLHA,HAD->BLD', attended_BLHA, self.out_HAD), state


class Case(NamedTuple):
  """What decides which causal attention can run.

  Attributes:
    device: The kind that the program is for; it need not be here.
    mesh: Where the arrays are; None for one device.
    dtype: The type of queries, keys and values.
    head_dim: A.
    packed: Whether a row holds several documents, none of which sees another.
  """

  device: jax.Device
  mesh: jax.sharding.Mesh | None
  dtype: jnp.dtype
  head_dim: int
  packed: bool = False


class CausalAttention:
  """A way to compute causal attention, for `model.attention`.

  A subclass of a user's own, registered with `@ATTENTIONS.register('mine')`, is
  meant by `model.attention = 'mine'`. The arrays it is given are split over the
  mesh as `moe_jax.parallel.mesh` says, sequences and heads, and need no
  attention to that where all is written in plain JAX.
  """

  def __init__(self, case: Case) -> None:
    """Makes the attention of a case that it fits."""
    self.case = case

  @classmethod
  def obstacle(cls, case: Case) -> str | None:
    """Returns why it does not fit a case, 'runs on ...', or None if it does."""
    del case
    return None

  def __call__(
    self, query_BLHA: jax.Array, key_BLGA: jax.Array, value_BLGA: jax.Array
  ) -> jax.Array:
    """Returns softmax attention, [B, L, H, A].

    Every position sees itself and all before it, with the scale 1 / sqrt(A).
    """
    raise NotImplementedError

  def within(
    self,
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    segment_ids_BL: jax.Array,
  ) -> jax.Array:
    """Returns the same where a position sees its own segment alone.

    It is for packed rows, where a class that does not have it is refused.

    Args:
      query_BLHA: As in `__call__`, like the two after it.
      key_BLGA: The keys.
      value_BLGA: The values.
      segment_ids_BL: As in `Segments`.
    """
    raise NotImplementedError


class RotaryAttend:
  """Lets a position see itself and all before it; positions are rotations."""

  state_axes: tuple[str, ...] = ()

  def __init__(
    self,
    theta: float,
    causal: CausalAttention,
    dropout: float,
    dropping: Callable[..., jax.Array],
    mesh: jax.sharding.Mesh | None = None,
  ) -> None:
    """Puts the parts together.

    Args:
      theta: The base of the wavelengths.
      causal: The attention of rotated queries and keys.
      dropout: The rate of dropout on the attention weights.
      dropping: The attention with dropout: like `causal`, and with the rate,
        the key of the random numbers and the ids of segments, or None, as
        further arguments.
      mesh: Where it runs; None for one device.
    """
    self.theta = theta
    self.causal = causal
    self.dropout = dropout
    self.dropping = dropping
    self.mesh = mesh

  def key_pe(self, head_dim: int, rngs: nnx.Rngs) -> None:
    """Returns None, as rotations are not learned."""
    del head_dim, rngs

  def start(
    self, num_layers: int, batch_size: int, hidden_size: int, dtype: jnp.dtype
  ) -> tuple[()]:
    """Returns the empty state: nothing before a sequence is seen."""
    del num_layers, batch_size, hidden_size, dtype
    return ()

  def extend(
    self, x_BLD: jax.Array, state: AttentionState
  ) -> tuple[jax.Array, AttentionState]:
    """Returns both as they are."""
    return x_BLD, state

  def __call__(
    self,
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    context: BlockContext,
    state: AttentionState,
  ) -> tuple[jax.Array, AttentionState]:
    """Returns the weighted values, [B, L, H, A], and the state as it is."""
    ids_BL, positions_BL = context.segments or (None, None)

    def attend(
      query_BLHA: jax.Array, key_BLGA: jax.Array, value_BLGA: jax.Array
    ) -> jax.Array:
      query_BLHA = rotate(query_BLHA, self.theta, positions_BL)
      key_BLGA = rotate(key_BLGA, self.theta, positions_BL)
      rotated = query_BLHA, key_BLGA, value_BLGA
      if self.dropout and context.rng is not None:
        return self.dropping(*rotated, self.dropout, context.rng, ids_BL)
      if ids_BL is None:
        return self.causal(*rotated)
      return self.causal.within(*rotated, ids_BL)

    return self._whole(context, attend, query_BLHA, key_BLGA, value_BLGA), state

  def _whole(
    self,
    context: BlockContext,
    attend: Callable[..., jax.Array],
    *arrays: jax.Array,
  ) -> jax.Array:
    """Calls an attention of whole sequences, in whatever shards they are."""
    return context_lib.by_heads(attend, self.mesh, context.seq_shards, *arrays)
