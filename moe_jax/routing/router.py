"""A router: features of a token, perhaps with a memory, and a score."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.routing.recurrent import Cell, State


class Tokens(NamedTuple):
  """What is known of the tokens beside their hidden states.

  Attributes:
    ids_BL: int32 vocabulary indices.
    real_BL: bool; False marks padding, which is never routed or counted.
  """

  ids_BL: jax.Array
  real_BL: jax.Array

  @property
  def ids_T(self) -> jax.Array:
    return self.ids_BL.reshape(-1)

  @property
  def real_T(self) -> jax.Array:
    return self.real_BL.reshape(-1)


class Features(Protocol):
  """What a score reads, made of the hidden state and the router's memory."""

  def __call__(
    self, x_TD: jax.Array, state: State, cell: Cell
  ) -> tuple[jax.Array, State]:
    """The features a score reads, and the router's next state."""


class Score(Protocol):
  """Rates every expert for every token."""

  def __call__(self, features_TX: jax.Array, ids_T: jax.Array) -> jax.Array:
    """logits_TN float32."""


class Router(nnx.Module):
  """`score(features(x, state))`, in float32 whatever the model computes in.

  Rounding a logit to bfloat16 moves tokens to other experts, so the arithmetic
  is float32 from the one cast on entry to the logits.
  """

  def __init__(self, features: Features, score: Score):
    self.features = features
    self.score = score

  def __call__(
    self,
    x_TD: jax.Array,
    state: State,
    cell: Cell,
    tokens: Tokens,
    key: jax.Array | None,
  ) -> tuple[jax.Array, State]:
    """Returns logits_TN float32 and the state for the next MoE layer."""
    with jax.named_scope('router'):
      features_TX, state = self.features(x_TD.astype(jnp.float32), state, cell)
      return self.score(features_TX, tokens.ids_T), state
