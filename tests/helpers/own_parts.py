"""Dispatches and exchanges as a user may write and register them."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.experts.dispatch import Dispatched, Experts
from moe_jax.experts.exchange import AllGather
from moe_jax.routing.selection import Routing


def every_expert(
  x_TD: jax.Array, routing: Routing, experts: Experts
) -> Dispatched:
  """Computes every expert for every token; a dispatch of the simplest kind."""
  chosen_TKN = routing.indices_TK[..., None] == jnp.arange(experts.num_experts)
  seeds_NT = None
  if routing.seeds_TK is not None:
    seeds_TKN = jnp.where(chosen_TKN, routing.seeds_TK[..., None], 0)
    seeds_NT = seeds_TKN.sum(1, dtype=jnp.uint32).T
  x_NTD = jnp.broadcast_to(x_TD, (experts.num_experts, *x_TD.shape))
  out_NTD = experts.batched(x_NTD, seeds_NT)
  weights_TN = (chosen_TKN * routing.weights_TK[..., None]).sum(1)
  y_TD = jnp.einsum('TN,NTD->TD', weights_TN, out_NTD)
  return Dispatched(y_TD, jnp.zeros_like(routing.indices_TK[0, 0]))


@dataclasses.dataclass(frozen=True)
class SumEverywhere(AllGather):
  """Sums the outputs of all tokens on all devices, and keeps its own part."""

  def combine(self, y_TD: jax.Array) -> jax.Array:
    """Returns the sum over devices, of this device's own tokens."""
    total_TD = lax.psum(y_TD, self.axis)
    own = len(y_TD) // lax.axis_size(self.axis)
    first = lax.axis_index(self.axis) * own
    return lax.dynamic_slice_in_dim(total_TD, first, own)
