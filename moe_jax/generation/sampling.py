"""Choosing the next token: the likeliest, or one drawn at random."""

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError


def _static() -> bool:
  """Declares a field that a compiled program is made for."""
  return dataclasses.field(metadata={'static': True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is chosen from logits; `Sampling.of` makes one.

  Attributes:
    temperature: What logits are divided by.
    top_p: The probability that the tokens to choose from reach together.
    top_k: How many tokens there are to choose from; 0 for all.
    greedy: Whether the likeliest is taken, whatever else is said.
    cuts_tail: Whether `top_p` leaves tokens out.
  """

  temperature: float
  top_p: float
  top_k: int = _static()
  greedy: bool = _static()
  cuts_tail: bool = _static()

  @classmethod
  def of(
    cls, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0
  ) -> Self:
    """Returns what samples as flags of these names say.

    Args:
      temperature: 0 is greedy.
      top_k: The most tokens to choose from; 0 for all.
      top_p: The likeliest tokens that reach this probability together are those
        to choose from; 1 for all. It is taken of what `top_k` leaves.

    Raises:
      UserError: A number is out of range.
    """
    if not 0 <= temperature < math.inf:
      raise UserError(f'temperature = {temperature} must be 0 or more')
    if top_k < 0:
      raise UserError(f'top_k = {top_k} must be 0, for all tokens, or more')
    if not 0 < top_p <= 1:
      raise UserError(f'top_p = {top_p} must be above 0 and at most 1')
    # A denormal number would make logits infinite.
    greedy = temperature < 1e-6
    return cls(temperature, top_p, top_k, greedy, top_p < 1)


def sample(
  logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling
) -> jax.Array:
  """Returns a token for every row, int32 [B].

  Args:
    logits_BV: The logits, float32.
    keys_B: The key of each row's random numbers, which decide for it alone.
    sampling: How.
  """
  if sampling.greedy:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV / sampling.temperature
  if not sampling.top_k and not sampling.cuts_tail:
    return _draw(keys_B, logits_BV)
  count = min(sampling.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
  best_BK, ids_BK = jax.lax.top_k(logits_BV, count)
  if sampling.cuts_tail:
    best_BK = _without_tail(best_BK, sampling.top_p)
  drawn_B1 = _draw(keys_B, best_BK)[:, None]
  return jnp.take_along_axis(ids_BK, drawn_B1, axis=-1)[:, 0].astype(jnp.int32)


def _draw(keys_B: jax.Array, logits_BK: jax.Array) -> jax.Array:
  drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BK)
  return drawn_B.astype(jnp.int32)


def _without_tail(logits_BK: jax.Array, top_p: jax.Array | float) -> jax.Array:
  """Leaves the first that reach `top_p` together, at least one (1904.09751).

  Args:
    logits_BK: Falling along each row.
    top_p: The probability.
  """
  share_BK = jax.nn.softmax(logits_BK, axis=-1)
  before_BK = jnp.cumsum(share_BK, axis=-1) - share_BK
  return jnp.where(before_BK < top_p, logits_BK, -jnp.inf)
