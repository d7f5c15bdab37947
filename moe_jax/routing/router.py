"""A router: features of a token, perhaps with a memory, and a score."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.routing.cells import Cell, CellState


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


class State(NamedTuple):
  """What a token's routing hands from one MoE sub-layer to the next.

  Attributes:
    cell: of the recurrent cell; () without one.
    logits: logits_TN of the sub-layer before, where routers add them; else ().
  """

  cell: CellState
  logits: jax.Array | tuple[()]


def start(cell: Cell, num_tokens: int, num_logits: int) -> State:
  """The state below the first MoE layer.

  Args:
    cell: of the router.
    num_tokens: T.
    num_logits: N where routers add the logits of the sub-layer before, else 0.
  """
  logits = jnp.zeros((num_tokens, num_logits)) if num_logits else ()
  return State(cell.start(num_tokens), logits)


class Features(Protocol):
  """What a score reads, made of the hidden state and the router's memory."""

  def __call__(
    self, x_TD: jax.Array, state: CellState, cell: Cell
  ) -> tuple[jax.Array, CellState]:
    """The features a score reads, and the memory's next state."""


class Score(Protocol):
  """Rates every expert for every token."""

  def __call__(self, features_TX: jax.Array, ids_T: jax.Array) -> jax.Array:
    """logits_TN float32."""


class Router(nnx.Module):
  """`score(features(x, state))`, in float32 whatever the model computes in.

  Rounding a logit to bfloat16 moves tokens to other experts, so the arithmetic
  is float32 from the one cast on entry to the logits.

  Attributes:
    features: what the score reads.
    score: rates the experts.
    residual: a of RMoE's residual scores (r-a): a times the logits of the MoE
      sub-layer before, its own residual included, is added. 0: nothing is.
    detached: without the gradient of those logits (detach-r).
    jitter: training multiplies the input by numbers between 1 - jitter and
      1 + jitter (Switch Transformers, arXiv 2101.03961, section 2.2).
  """

  def __init__(
    self,
    features: Features,
    score: Score,
    *,
    residual: float = 0.0,
    detached: bool = False,
    jitter: float = 0.0,
  ):
    self.features = features
    self.score = score
    self.residual = residual
    self.detached = detached
    self.jitter = jitter

  def __call__(
    self,
    x_TD: jax.Array,
    state: State,
    cell: Cell,
    tokens: Tokens,
    key: jax.Array | None,
  ) -> tuple[jax.Array, State]:
    """Returns logits_TN float32 and the state for the next MoE sub-layer."""
    with jax.named_scope('router'):
      x_TD = self._jittered(x_TD.astype(jnp.float32), key)
      features_TX, memory = self.features(x_TD, state.cell, cell)
      logits_TN = self.score(features_TX, tokens.ids_T)
      if not self.residual:
        return logits_TN, State(memory, state.logits)
      below_TN = state.logits
      if self.detached:
        below_TN = jax.lax.stop_gradient(below_TN)
      logits_TN += self.residual * below_TN
      return logits_TN, State(memory, logits_TN)

  def _jittered(self, x_TD: jax.Array, key: jax.Array | None) -> jax.Array:
    if key is None or not self.jitter:
      return x_TD
    return x_TD * jax.random.uniform(
      key, x_TD.shape, minval=1 - self.jitter, maxval=1 + self.jitter
    )
