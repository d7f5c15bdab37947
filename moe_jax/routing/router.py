"""A router: features of a token, perhaps with a memory, and a gate."""

import dataclasses
from typing import NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import parameter
from moe_jax.routing.cells import Cell, CellState
from moe_jax.routing.gates import Gate, GateContext


@dataclasses.dataclass(frozen=True)
class Context:
  """What a layer is told beside its input and the router's state.

  It is made where layers are called, and never stored in one: a cell that is
  an attribute of scanned layers would become one cell per layer.

  Attributes:
    cell: The recurrent cell that the routers of all layers share.
    token_ids_BL: The vocabulary indices of the tokens, int32; where sequences
      are in shards, each of these is a row.
    padding_mask_BL: Bool, alike; False marks padding, which is never routed or
      counted.
    step: The training step, int32; None in evaluation.
    rng: The key of this layer's random numbers; None where nothing is drawn.
    period: Which period of layers runs, int32, where experts have the
      parameters of all periods, stacked; None where they have their own.
    seq_shards: The rows that make up a sequence, one after the other.
  """

  cell: Cell
  token_ids_BL: jax.Array
  padding_mask_BL: jax.Array
  step: jax.Array | None = None
  rng: jax.Array | None = None
  period: jax.Array | None = dataclasses.field(default=None, kw_only=True)
  seq_shards: int = dataclasses.field(default=1, kw_only=True)

  @property
  def padding_mask_T(self) -> jax.Array:
    """The padding mask of the flattened tokens."""
    return self.padding_mask_BL.reshape(-1)

  def with_rng(self, rng: jax.Array | None) -> Self:
    """Returns the same context with another key."""
    return dataclasses.replace(self, rng=rng)

  def split(self, count: int) -> list[Self]:
    """Returns `count` contexts, each with a key of its own or none at all."""
    if self.rng is None:
      return [self] * count
    return [self.with_rng(rng) for rng in jax.random.split(self.rng, count)]


class RouterState(NamedTuple):
  """What a token's routing hands from one MoE sub-layer to the next.

  Attributes:
    cell: The state of the recurrent cell; () without one.
    logits: logits_TN of the sub-layer before, where routers add them; else ().
  """

  cell: CellState
  logits: jax.Array | tuple[()]


def start(cell: Cell, num_tokens: int, num_logits: int = 0) -> RouterState:
  """Returns the state below the first MoE layer.

  Args:
    cell: The cell that the routers share.
    num_tokens: T.
    num_logits: N where routers add the logits of the sub-layer before, else 0.
  """
  logits = jnp.zeros((num_tokens, num_logits)) if num_logits else ()
  return RouterState(cell.start(num_tokens), logits)


class Features(Protocol):
  """Makes what a gate reads of the hidden state and the router's memory."""

  def __call__(
    self, x_TD: jax.Array, state: CellState, cell: Cell
  ) -> tuple[jax.Array, CellState]:
    """Returns features_TX float32 and the memory's next state."""
    ...


class Router(nnx.Module):
  """`gate(features(x, state))`, in float32 whatever the model computes in.

  Rounding a logit to bfloat16 moves tokens to other experts, so the arithmetic
  is float32 from the one cast on entry to the logits.

  Attributes:
    features: Makes what the gate reads.
    score: The gate, which rates the experts. (Checkpoints hold its parameters
      by this name.)
    residual: The a of RMoE's residual scores (r-a): a times the logits of the
      MoE sub-layer before, its own residual included, is added. 0: nothing is.
    detached: Whether no gradient reaches those logits (detach-r).
    jitter: In training the input is multiplied by numbers between 1 - jitter
      and 1 + jitter (Switch Transformers, arXiv 2101.03961, section 2.2).
  """

  def __init__(
    self,
    features: Features,
    gate: Gate,
    *,
    residual: float = 0.0,
    detached: bool = False,
    jitter: float = 0.0,
  ):
    self.features = features
    self.score = gate
    self.residual = residual
    self.detached = detached
    self.jitter = jitter
    parameter.declare(self, part=parameter.ROUTER)

  def __call__(
    self, x_TD: jax.Array, state: RouterState, context: Context
  ) -> tuple[jax.Array, RouterState]:
    """Returns logits_TN float32 and the state for the next MoE sub-layer."""
    with jax.named_scope('router'):
      x_TD = self._jittered(x_TD.astype(jnp.float32), context.rng)
      features_TX, memory = self.features(x_TD, state.cell, context.cell)
      logits_TN = self.score(features_TX, self._gate_context(context))
      if not self.residual:
        return logits_TN, RouterState(memory, state.logits)
      below_TN = state.logits
      if isinstance(below_TN, tuple):
        raise TypeError('router.residual adds logits, and the state has none')
      if self.detached:
        below_TN = jax.lax.stop_gradient(below_TN)
      logits_TN += self.residual * below_TN
      return logits_TN, RouterState(memory, logits_TN)

  def _gate_context(self, context: Context) -> GateContext:
    rng = context.rng
    if rng is not None:
      # The jitter draws from the key itself.
      rng = jax.random.fold_in(rng, 1) if self.score.draws else None
    return GateContext(
      context.token_ids_BL.reshape(-1),
      context.padding_mask_T,
      context.step,
      rng,
    )

  def _jittered(self, x_TD: jax.Array, rng: jax.Array | None) -> jax.Array:
    if rng is None or not self.jitter:
      return x_TD
    return x_TD * jax.random.uniform(
      rng, x_TD.shape, minval=1 - self.jitter, maxval=1 + self.jitter
    )
