"""A decoder block, and a period of blocks."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.experts.layer import Aux, Norm, PostNormChain, PreNormChain
from moe_jax.model.attention import Attention
from moe_jax.routing.router import Context, RouterState


class Carry(NamedTuple):
  """What a block passes on to the next.

  Attributes:
    x_BLD: hidden states.
    state: of the recurrent router.
  """

  x_BLD: jax.Array
  state: RouterState


class Past(NamedTuple):
  """What attention sees beside the sequence.

  Attributes:
    memory_BWD: hidden states before the sequence that this block read then.
    key_pe_AW: keys of relative positions, the same in all layers and heads.
  """

  memory_BWD: jax.Array
  key_pe_AW: jax.Array


class Block(nnx.Module):
  """Pre-norm: `x = x + attention(norm(x))`, then the feed-forward chain."""

  def __init__(
    self, norm: Norm, attention: Attention, chain: PreNormChain | PostNormChain
  ):
    self.norm = norm
    self.attention = attention
    self.chain = chain

  def __call__(
    self,
    carry: Carry,
    context: Context,
    past: Past | None,
  ) -> tuple[Carry, Aux | None, jax.Array | None]:
    """Returns what to pass on, `Aux`, and the block's next memory."""
    x_BLD, state = carry
    context_BLD, memory_BWD = _with_memory(x_BLD, past)
    for_attention, for_chain = context.split(2)
    with jax.named_scope('attention'):
      u_BLD = self._read(context_BLD)
      seen_BLD = self._attend(u_BLD, x_BLD, past, for_attention.rng)
      x_BLD = self._add(x_BLD, seen_BLD)
    y_BLD, state, aux = self._chain(x_BLD, state, for_chain)
    return Carry(self._leave(x_BLD, y_BLD), state), aux, memory_BWD

  def _read(self, context_BLD: jax.Array) -> jax.Array:
    return self.norm(context_BLD)

  def _add(self, x_BLD: jax.Array, seen_BLD: jax.Array) -> jax.Array:
    return x_BLD + seen_BLD

  def _leave(self, x_BLD: jax.Array, y_BLD: jax.Array) -> jax.Array:
    """From the chain's input and output, the block's output."""
    del x_BLD
    return y_BLD

  def _attend(
    self,
    context_BLD: jax.Array,
    x_BLD: jax.Array,
    past: Past | None,
    key: jax.Array | None,
  ) -> jax.Array:
    key_pe_AW = None if past is None else past.key_pe_AW
    return self.attention(context_BLD, x_BLD.shape[1], key_pe_AW, key)

  def _chain(
    self, x_BLD: jax.Array, state: RouterState, context: Context
  ) -> tuple[jax.Array, RouterState, Aux | None]:
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    y_TD, state, aux = self.chain(x_TD, state, context)
    return y_TD.reshape(x_BLD.shape), state, aux


class PostNormBlock(Block):
  """`x = norm(x + attention(x))`, then `x = outer_norm(x + chain(x))`.

  The chain ends with a norm of its own and has the residual within (see
  `PostNormChain`), so there are two norms around each feed-forward, as in the
  CompeteSMoE code base.
  """

  def __init__(
    self,
    norm: Norm,
    attention: Attention,
    chain: PreNormChain | PostNormChain,
    outer_norm: Norm,
  ):
    super().__init__(norm, attention, chain)
    self.outer_norm = outer_norm

  def _read(self, context_BLD: jax.Array) -> jax.Array:
    return context_BLD

  def _add(self, x_BLD: jax.Array, seen_BLD: jax.Array) -> jax.Array:
    return self.norm(x_BLD + seen_BLD)

  def _leave(self, x_BLD: jax.Array, y_BLD: jax.Array) -> jax.Array:
    return self.outer_norm(x_BLD + y_BLD)


class Period(nnx.Module):
  """The blocks of one repetition of the layer pattern."""

  def __init__(self, blocks: Sequence[Block]):
    self.blocks = nnx.List(blocks)

  def __call__(
    self,
    carry: Carry,
    context: Context,
    past: Sequence[Past | None],
  ) -> tuple[Carry, list[Aux], list[jax.Array | None]]:
    """Returns what to pass on, each MoE block's `Aux`, all memories.

    `past` has an element for every block.
    """
    auxes, memory = [], []
    contexts = context.split(len(self.blocks))
    for block, seen, of_block in zip(self.blocks, past, contexts, strict=True):
      carry, aux, next_BWD = block(carry, of_block, seen)
      memory.append(next_BWD)
      if aux is not None:
        auxes.append(aux)
    return carry, auxes, memory


def _with_memory(
  x_BLD: jax.Array, past: Past | None
) -> tuple[jax.Array, jax.Array | None]:
  """The context of the attention, and the next sequence's memory."""
  if past is None:
    return x_BLD, None
  memory_BWD = past.memory_BWD.astype(x_BLD.dtype)
  context_BLD = jnp.concatenate([memory_BWD, x_BLD], axis=1)
  newest_BWD = context_BLD[:, -memory_BWD.shape[1] :]
  return context_BLD, jax.lax.stop_gradient(newest_BWD)
