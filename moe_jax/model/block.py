"""A decoder block, and a period of blocks."""

from collections.abc import Sequence

import jax
from flax import nnx

from moe_jax.experts.cartesian import Chain, split
from moe_jax.experts.moe import Watched
from moe_jax.model.attention import Attention
from moe_jax.model.layers import RMSNorm
from moe_jax.routing.cells import Cell
from moe_jax.routing.router import State, Tokens


class Block(nnx.Module):
  """Pre-norm: `x = x + attention(norm(x))`, then the feed-forward chain."""

  def __init__(self, norm: RMSNorm, attention: Attention, chain: Chain):
    self.norm = norm
    self.attention = attention
    self.chain = chain

  def __call__(
    self,
    x_BLD: jax.Array,
    state: State,
    cell: Cell,
    tokens: Tokens,
    key: jax.Array | None,
  ) -> tuple[jax.Array, State, Watched | None]:
    """Returns x_BLD, the router's next state, and what to watch.

    `key` is of this block's random numbers; None where there are none.
    """
    with jax.named_scope('attention'):
      x_BLD += self.attention(self.norm(x_BLD))
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    x_TD, state, watched = self.chain(x_TD, state, cell, tokens, key)
    return x_TD.reshape(x_BLD.shape), state, watched


class Period(nnx.Module):
  """The blocks of one repetition of the layer pattern."""

  def __init__(self, blocks: Sequence[Block]):
    self.blocks = nnx.List(blocks)

  def __call__(
    self,
    x_BLD: jax.Array,
    state: State,
    cell: Cell,
    tokens: Tokens,
    key: jax.Array | None,
  ) -> tuple[jax.Array, State, list[Watched]]:
    """Returns x_BLD, the state, and what each MoE block lets watch."""
    watched = []
    keys = split(key, len(self.blocks))
    for block, block_key in zip(self.blocks, keys, strict=True):
      x_BLD, state, seen = block(x_BLD, state, cell, tokens, block_key)
      if seen is not None:
        watched.append(seen)
    return x_BLD, state, watched
