"""From logits to the chosen experts and their weights."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """What a router decided: all that experts and observers get to see.

  Attributes:
    weights_TK: float32, of each chosen expert; 0 in an unused slot.
    indices_TK: int32 in [0, N); N in an unused slot.
    probabilities_TN: float32, softmax over all experts.
    logits_TN: float32.
    seeds_TK: uint32, of the dropout in each slot's expert; None for none.
  """

  weights_TK: jax.Array
  indices_TK: jax.Array
  probabilities_TN: jax.Array
  logits_TN: jax.Array
  seeds_TK: jax.Array | None = None

  @property
  def num_experts(self) -> int:
    return self.logits_TN.shape[-1]

  def only(self, used_TK: jax.Array) -> 'Routing':
    """The same with every slot outside the bool `used_TK` left unused."""
    return dataclasses.replace(
      self,
      weights_TK=jnp.where(used_TK, self.weights_TK, 0.0),
      indices_TK=jnp.where(used_TK, self.indices_TK, self.num_experts),
    )


def top_k(logits_TN: jax.Array, *, k: int, renormalize: bool) -> Routing:
  """The k most probable experts of each token (RMoE eq. 1: TopK(softmax)).

  Args:
    logits_TN: float32.
    k: experts per token, at most N. Of equal logits the lower index is chosen.
    renormalize: divide the chosen weights by their sum. With k = 1 this would
      make every weight 1 and leave the router without a gradient, so there it
      does nothing.

  Returns:
    A `Routing` with every slot used, most probable expert first.
  """
  probabilities_TN = jax.nn.softmax(logits_TN, axis=-1)
  weights_TK, indices_TK = _largest(probabilities_TN, k)
  if renormalize and k > 1:
    weights_TK = weights_TK / weights_TK.sum(-1, keepdims=True)
  return Routing(weights_TK, indices_TK, probabilities_TN, logits_TN)


def _largest(values_TN: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """`jax.lax.top_k` as k passes over [T, N].

  The partitioner splits these by tokens like any other arithmetic; `top_k` it
  would run on every device for the tokens of all of them.
  """
  experts_N = jnp.arange(values_TN.shape[-1], dtype=jnp.int32)
  left_TN, indices = values_TN, []
  for _ in range(k):
    best_T = jnp.argmax(left_TN, axis=-1).astype(jnp.int32)
    left_TN = jnp.where(experts_N == best_T[:, None], -jnp.inf, left_TN)
    indices.append(best_T)
  indices_TK = jnp.stack(indices, axis=-1)
  chosen_TKN = indices_TK[..., None] == experts_N
  largest_TK = jnp.where(chosen_TKN, values_TN[:, None], 0).sum(-1)
  return largest_TK, indices_TK
