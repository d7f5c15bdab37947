"""Feed-forward sub-layers in a chain; two MoE ones are a Cartesian layer."""

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.experts.dropout import split
from moe_jax.experts.moe import Watched
from moe_jax.routing.cells import Cell
from moe_jax.routing.router import State, Tokens

Norm = Callable[[jax.Array], jax.Array]


class SubLayer(Protocol):
  """A feed-forward: dense or a Mixture of Experts."""

  def __call__(
    self,
    x_TD: jax.Array,
    state: State,
    cell: Cell,
    tokens: Tokens,
    key: jax.Array | None,
  ) -> tuple[jax.Array, State, Watched | None]:
    """y_TD, the router's next state, and what to watch (None if dense).

    `key` is of the sub-layer's random numbers; None where there are none.
    """


class Chain(nnx.Module):
  """`x = x + sub_layer(norm(x))`, one sub-layer after the other.

  One MoE sub-layer is a conventional MoE layer, one dense sub-layer a
  conventional feed-forward. Two MoE sub-layers are CartesianMoE's Cartesian
  Product Layer (arXiv 2410.16077): a token's expert is the pair (A_i, B_j),
  computed as `a = x + MoE_A(norm(x))`, `y = a + MoE_B(norm_mid(a))`. Any number
  makes a product of that many factors. The router's state goes from sub-layer
  to sub-layer, as it does from layer to layer.
  """

  def __init__(
    self,
    norms: Sequence[Norm],
    sub_layers: Sequence[SubLayer],
  ):
    self.norms = nnx.List(norms)
    self.sub_layers = nnx.List(sub_layers)

  def __call__(
    self,
    x_TD: jax.Array,
    state: State,
    cell: Cell,
    tokens: Tokens,
    key: jax.Array | None,
  ) -> tuple[jax.Array, State, Watched | None]:
    """Returns y_TD, the state, and what to watch with a leading axis [S]."""
    watched = []
    keys = split(key, len(self.sub_layers))
    for norm, sub_layer, sub_key in zip(
      self.norms, self.sub_layers, keys, strict=True
    ):
      u_TD = self._read(norm, x_TD)
      y_TD, state, seen = sub_layer(u_TD, state, cell, tokens, sub_key)
      x_TD = self._add(norm, x_TD, y_TD)
      watched.append(seen)
    return x_TD, state, jax.tree.map(lambda *a: jnp.stack(a), *watched)

  def _read(self, norm: Norm, x_TD: jax.Array) -> jax.Array:
    return norm(x_TD)

  def _add(self, norm: Norm, x_TD: jax.Array, y_TD: jax.Array) -> jax.Array:
    del norm
    return x_TD + y_TD


class PostNormChain(Chain):
  """`x = norm(x + sub_layer(x))`, one sub-layer after the other."""

  def _read(self, norm: Norm, x_TD: jax.Array) -> jax.Array:
    del norm
    return x_TD

  def _add(self, norm: Norm, x_TD: jax.Array, y_TD: jax.Array) -> jax.Array:
    return norm(x_TD + y_TD)
