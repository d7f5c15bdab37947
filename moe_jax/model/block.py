"""A decoder block, and a period of blocks."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
from flax import nnx

from moe_jax.experts.layer import (
  Aux,
  Layer,
  Norm,
  PostNormChain,
  PreNormChain,
)
from moe_jax.model.attention import Attention, AttentionState, BlockContext
from moe_jax.routing.router import Context, RouterState


class Carry(NamedTuple):
  """What a block passes on to the next.

  Attributes:
    x_BLD: The hidden states.
    state: The state of the recurrent router.
  """

  x_BLD: jax.Array
  state: RouterState


class Block(Protocol):
  """A layer of the decoder: attention and a feed-forward."""

  @property
  def chain(self) -> PreNormChain | PostNormChain:
    """The feed-forwards, each with the norms around it."""
    ...

  def __call__(
    self, carry: Carry, context: BlockContext, attention_state: AttentionState
  ) -> tuple[Carry, Aux | None, AttentionState]:
    """Returns what to pass on, `Aux`, and the next state of attention.

    `Aux` is None for a dense block.
    """
    ...


class PreNormBlock(nnx.Module):
  """`x = x + attention(norm(x))`, then the same of every feed-forward.

  The chain of feed-forwards, `PreNormChain`, has its own norms and residuals.
  """

  def __init__(
    self, norm: Norm, attention: Attention, chain: PreNormChain
  ) -> None:
    self.norm = norm
    self.attention = attention
    self.chain = chain

  def __call__(
    self, carry: Carry, context: BlockContext, attention_state: AttentionState
  ) -> tuple[Carry, Aux | None, AttentionState]:
    """Returns what to pass on, `Aux`, and the next state of attention."""
    x_BLD, state = carry
    for_attention, for_chain = context.split(2)
    with jax.named_scope('attention'):
      seen_BLD, attention_state = self.attention.extend(x_BLD, attention_state)
      y_BLD, attention_state = self.attention(
        self.norm(seen_BLD), for_attention, attention_state
      )
      x_BLD = x_BLD + y_BLD
    x_BLD, state, aux = _by_token(self.chain, x_BLD, state, for_chain)
    return Carry(x_BLD, state), aux, attention_state


class PostNormBlock(nnx.Module):
  """`x = norm(x + attention(x))`, then `x = outer_norm(x + chain(x))`.

  The chain, `PostNormChain`, has norms and residuals of its own, so that two
  norms are around each feed-forward, as in the CompeteSMoE code base.
  """

  def __init__(
    self,
    norm: Norm,
    attention: Attention,
    chain: PostNormChain,
    outer_norm: Norm,
  ) -> None:
    self.norm = norm
    self.attention = attention
    self.chain = chain
    self.outer_norm = outer_norm

  def __call__(
    self, carry: Carry, context: BlockContext, attention_state: AttentionState
  ) -> tuple[Carry, Aux | None, AttentionState]:
    """Returns what to pass on, `Aux`, and the next state of attention."""
    x_BLD, state = carry
    for_attention, for_chain = context.split(2)
    with jax.named_scope('attention'):
      seen_BLD, attention_state = self.attention.extend(x_BLD, attention_state)
      y_BLD, attention_state = self.attention(
        seen_BLD, for_attention, attention_state
      )
      x_BLD = self.norm(x_BLD + y_BLD)
    y_BLD, state, aux = _by_token(self.chain, x_BLD, state, for_chain)
    x_BLD = self.outer_norm(x_BLD + y_BLD)
    return Carry(x_BLD, state), aux, attention_state


class Period(nnx.Module):
  """The blocks of one repetition of the layer pattern."""

  def __init__(self, blocks: Sequence[Block]) -> None:
    self.blocks = nnx.List(blocks)

  def __call__(
    self,
    carry: Carry,
    context: BlockContext,
    attention_states: Sequence[AttentionState],
  ) -> tuple[Carry, list[Aux], list[AttentionState]]:
    """Returns what to pass on, each MoE block's `Aux`, and all next states.

    `attention_states` has an element for every block.
    """
    auxes, next_states = [], []
    contexts = context.split(len(self.blocks))
    for block, of_block, attention_state in zip(
      self.blocks, contexts, attention_states, strict=True
    ):
      carry, aux, next_state = block(carry, of_block, attention_state)
      next_states.append(next_state)
      if aux is not None:
        auxes.append(aux)
    return carry, auxes, next_states


def _by_token(
  chain: Layer, x_BLD: jax.Array, state: RouterState, context: Context
) -> tuple[jax.Array, RouterState, Aux | None]:
  """Calls the feed-forwards with [B, L, D] flattened to [T, D]."""
  x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
  y_TD, state, aux = chain(x_TD, state, context)
  return y_TD.reshape(x_BLD.shape), state, aux
