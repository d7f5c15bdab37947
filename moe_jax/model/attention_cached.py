"""Attention of generation, which keeps keys and values in a cache.

A text is read in one call, from its beginning, with rows as long as the longest
and padding behind the others. Attention returns the `Cache` of what it read,
from which `fill` makes the one to go on with. In every call after that there is
one token a row. It sees the slots of the cache that `slots` names, and the
`Cache` that is returned holds that token alone, to be put into its slot: the
keys and values of all layers in one small write, where a scan that handed on
whole caches would copy them.

With rotary positions a slot is for every row the same, however long its prompt
is: prompts take the first slots, padding too, which nothing sees, and what is
generated the slots behind. With a span there are W, and the next token takes
that of the farthest one.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.model.attention import (
  Attend,
  AttentionState,
  BlockContext,
  RotaryAttend,
  Slots,
)
from moe_jax.model.attention_span import SpanAttend
from moe_jax.model.layers import rotate
from moe_jax.parallel.mesh import TENSOR


class Cache(NamedTuple):
  """Keys and values of a layer; [layers] in front of all axes for all of them.

  Attributes:
    key_BGCA: The keys, as queries meet them.
    value_BGCA: The values.
  """

  key_BGCA: jax.Array
  value_BGCA: jax.Array

  @classmethod
  def of(cls, key_BLGA: jax.Array, value_BLGA: jax.Array) -> Self:
    """Returns a cache in which position l takes slot l."""
    return cls(key_BLGA.swapaxes(1, 2), value_BLGA.swapaxes(1, 2))

  def put(self, new: Self, slots: Slots) -> Self:
    """Returns the cache with one more token of every row in it."""
    key, value = (
      lax.dynamic_update_slice_in_dim(old, token, slots.next, axis=-2)
      for old, token in zip(self, new, strict=True)
    )
    return self._replace(key_BGCA=key, value_BGCA=value)


class CachedAttend(Attend, Protocol):
  """An `Attend` whose states are caches, but at the beginning of a text."""

  def num_slots(self, num_tokens: int) -> int:
    """Returns how many slots texts of so many tokens need."""
    ...

  def fill(self, read: Cache, lengths_B: jax.Array, num_slots: int) -> Cache:
    """Returns the cache of what was read, with room for what follows.

    Args:
      read: What attention returned of the beginnings, for all layers.
      lengths_B: How many of these tokens are no padding, int32.
      num_slots: C.
    """
    ...

  def slots(
    self,
    lengths_B: jax.Array,
    read: jax.Array,
    count: jax.Array,
    num_slots: int,
  ) -> Slots:
    """Returns how the cache stands, with `count` tokens put into it.

    Args:
      lengths_B: As in `fill`.
      read: The length of the rows that were read, padding included, int32 [].
      count: How many tokens each row got since then, int32 [].
      num_slots: C.
    """
    ...


class CachedRotary(RotaryAttend):
  """`RotaryAttend` with a cache of rotated keys."""

  state_axes = (TENSOR,)

  def num_slots(self, num_tokens: int) -> int:
    """Returns a slot for every token."""
    return num_tokens

  def fill(self, read: Cache, lengths_B: jax.Array, num_slots: int) -> Cache:
    """Adds empty slots behind; see `CachedAttend`."""
    del lengths_B
    missing = num_slots - read.key_BGCA.shape[-2]
    widths = [(0, 0)] * (read.key_BGCA.ndim - 2) + [(0, missing), (0, 0)]
    return jax.tree.map(lambda a: jnp.pad(a, widths), read)

  def slots(
    self,
    lengths_B: jax.Array,
    read: jax.Array,
    count: jax.Array,
    num_slots: int,
  ) -> Slots:
    """Names those of each row's own tokens; see `CachedAttend`."""
    slot_C, end = jnp.arange(num_slots), read + count
    prompt_BC = slot_C < lengths_B[:, None]
    generated_C = (slot_C >= read) & (slot_C < end)
    return Slots(lengths_B + count, prompt_BC | generated_C, end)

  def __call__(
    self,
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    context: BlockContext,
    state: AttentionState,
  ) -> tuple[jax.Array, Cache]:
    """Returns the weighted values, [B, L, H, A], and the `Cache` of L."""
    slots = context.slots
    positions_BL = None if slots is None else slots.position_B[:, None]
    query_BLHA = rotate(query_BLHA, self.theta, positions_BL)
    key_BLGA = rotate(key_BLGA, self.theta, positions_BL)
    new = Cache.of(key_BLGA, value_BLGA)
    if slots is None:
      arrays = query_BLHA, key_BLGA, value_BLGA
      return self._whole(context, self.causal, *arrays), new
    past_BGhC = _logits(query_BLHA, state)
    seen_BC = slots.seen_BC
    assert seen_BC is not None, '`slots` above names them'
    past_BGhC = jnp.where(seen_BC[:, None, None], past_BGhC, -jnp.inf)
    # The token itself is not in the cache yet.
    own_BGh1 = _logits(query_BLHA, new)
    return _weigh([past_BGhC, own_BGh1], [state, new]), new


class CachedSpan(SpanAttend):
  """`SpanAttend` whose cache holds the W positions before a token, as a ring.

  Before a text begins the state is that of `SpanAttend`: a memory of zeros.
  """

  state_axes = (TENSOR,)

  def num_slots(self, num_tokens: int) -> int:
    """Returns W, for texts of any length."""
    del num_tokens
    return self.span

  def fill(self, read: Cache, lengths_B: jax.Array, num_slots: int) -> Cache:
    """Takes the last W of each row; see `CachedAttend`."""
    # Of row b they are W memories and lengths_B[b] tokens, then padding.
    place_BC = lengths_B[:, None] + jnp.arange(num_slots)
    place_BGCA = place_BC[:, None, :, None]
    return jax.tree.map(
      lambda a: jnp.take_along_axis(
        a, place_BGCA.reshape(*(1,) * (a.ndim - 4), *place_BGCA.shape), axis=-2
      ),
      read,
    )

  def slots(
    self,
    lengths_B: jax.Array,
    read: jax.Array,
    count: jax.Array,
    num_slots: int,
  ) -> Slots:
    """Names the farthest token's as the next; see `CachedAttend`."""
    del read
    return Slots(lengths_B + count, None, count % num_slots)

  def extend(
    self, x_BLD: jax.Array, state: AttentionState
  ) -> tuple[jax.Array, AttentionState]:
    """Returns x_BLD, before which the memory stands at a text's beginning."""
    if isinstance(state, Cache):
      return x_BLD, state
    return super().extend(x_BLD, state)

  def __call__(
    self,
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    context: BlockContext,
    state: AttentionState,
  ) -> tuple[jax.Array, Cache]:
    """Returns the weighted values, [B, L, H, A], and the `Cache` of L.

    At a text's beginning that has the memory in front.
    """
    new = Cache.of(key_BLGA, value_BLGA)
    slots = context.slots
    if slots is None:
      attended, _ = super().__call__(
        query_BLHA, key_BLGA, value_BLGA, context, state
      )
      return attended, new
    content_BGhC = _logits(query_BLHA, state)
    assert context.key_pe_AW is not None, 'the decoder makes it'
    position_BHW = jnp.einsum(
      'BLHA,AW->BHW',
      query_BLHA,
      context.key_pe_AW.astype(query_BLHA.dtype),
      preferred_element_type=jnp.float32,
    )
    # The farthest of the positions has the slot that is taken next.
    position_BHC = jnp.roll(position_BHW, slots.next, axis=-1)
    logits = content_BGhC + position_BHC.reshape(content_BGhC.shape)
    return _weigh([logits], [state]), new


def _logits(query_B1HA: jax.Array, cache: Cache) -> jax.Array:
  """Returns query times key, [B, G, H/G, C] float32, not scaled."""
  batch, groups, _, head_dim = cache.key_BGCA.shape
  return jnp.einsum(
    'BGhA,BGCA->BGhC',
    query_B1HA.reshape(batch, groups, -1, head_dim),
    cache.key_BGCA,
    preferred_element_type=jnp.float32,
  )


def _weigh(logits: Sequence[jax.Array], caches: Sequence[Cache]) -> jax.Array:
  """Returns the values by one softmax over the logits of all, [B, 1, H, A]."""
  sizes = [each.shape[-1] for each in logits]
  batch, _, _, head_dim = caches[0].value_BGCA.shape
  weights = jax.nn.softmax(jnp.concatenate(logits, -1) / head_dim**0.5)
  parts = zip(lax.split(weights, sizes, -1), caches, strict=True)
  attended_BGhA = functools.reduce(
    jnp.add, [_weighted(part, each.value_BGCA) for part, each in parts]
  )
  return attended_BGhA.reshape(batch, 1, -1, head_dim)


def _weighted(weights_BGhC: jax.Array, value_BGCA: jax.Array) -> jax.Array:
  return jnp.einsum(
    'BGhC,BGCA->BGhA', weights_BGhC.astype(value_BGCA.dtype), value_BGCA
  )
