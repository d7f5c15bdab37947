"""A Mixture-of-Experts layer: route, select, dispatch, combine, share."""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax.experts.dispatch import Dispatch
from moe_jax.experts.dropout import dropout, split
from moe_jax.experts.mlp import SwiGLU, SwiGLUExperts
from moe_jax.routing.balance import Load, load_of
from moe_jax.routing.cells import PRECISION, Cell
from moe_jax.routing.router import Router, State, Tokens
from moe_jax.routing.selection import Routing, Select


class Watched(NamedTuple):
  """What an MoE layer lets others see of its routing."""

  load: Load
  routing: Routing


class Mixing(Protocol):
  """Joins what the routed and the shared experts computed."""

  def __call__(
    self, u_TD: jax.Array, routed_TD: jax.Array, shared_TD: jax.Array
  ) -> jax.Array:
    """Joins the routed and the shared output of the layer's input `u_TD`."""


class MoELayer(nnx.Module):
  """`y = sum_k w_k E_k(x)` over the experts the router chose (RMoE eq. 1, 6).

  Attributes:
    router: -> logits and the next router state.
    select: logits -> Routing.
    dispatch: moves tokens to experts and back.
    experts: the bank of routed experts.
    shared: an expert that every token visits, or None.
    shared_parts: networks that `shared` stands for: their outputs' mean is its
      own, divided by their number.
    mixing: joins routed and shared output.
    bias_D: a learned vector added to the routed output, or None (RMoE's
      released code has it as an option).
    dropout: rate on the output, and whether experts need seeds for theirs.
  """

  def __init__(
    self,
    router: Router,
    select: Select,
    dispatch: Dispatch,
    experts: SwiGLUExperts,
    *,
    shared: SwiGLU | None = None,
    shared_parts: int = 1,
    mixing: Mixing | None = None,
    bias_D: nnx.Param | None = None,
    dropout: float = 0.0,
  ):
    self.router = router
    self.select = select
    self.dispatch = dispatch
    self.experts = experts
    self.shared = shared
    self.shared_parts = shared_parts
    self.mixing = mixing
    self.bias_D = bias_D
    self.dropout = dropout

  def __call__(
    self,
    x_TD: jax.Array,
    state: State,
    cell: Cell,
    tokens: Tokens,
    key: jax.Array | None,
  ) -> tuple[jax.Array, State, Watched]:
    """Returns y_TD, the router's next state and what to watch."""
    router_key, experts_key, output_key = split(key, 3)
    seeds_key, shared_key = split(experts_key, 2)
    logits_TN, state = self.router(x_TD, state, cell, tokens, router_key)
    routing = self.select(logits_TN).only(tokens.real_T[:, None])
    routing = checkpoint_name(routing, 'routing')  # for the remat policies
    seeded = self._with_seeds(routing, seeds_key)
    with jax.named_scope('experts'):
      y_TD, dropped, overflowed = self.dispatch(x_TD, seeded, self.experts)
    if self.bias_D is not None:
      y_TD += self.bias_D[...].astype(y_TD.dtype)
    if self.shared is not None:
      with jax.named_scope('shared_expert'):
        shared_TD = self.shared(x_TD, shared_key) / self.shared_parts
        y_TD = self.mixing(x_TD, y_TD, shared_TD)
    y_TD = dropout(y_TD, self.dropout, output_key)
    load = load_of(routing, tokens, dropped, self.select.steering, overflowed)
    return y_TD, state, Watched(load, routing)

  def _with_seeds(self, routing: Routing, key: jax.Array | None) -> Routing:
    """Drawn here, token by token, so that dropout depends on no dispatch."""
    if not self.dropout or key is None:
      return routing
    seeds_TK = jax.random.bits(key, routing.indices_TK.shape, jnp.uint32)
    return dataclasses.replace(routing, seeds_TK=seeds_TK)


class SumMixing(nnx.Module):
  """routed + shared."""

  def __call__(
    self, u_TD: jax.Array, routed_TD: jax.Array, shared_TD: jax.Array
  ) -> jax.Array:
    del u_TD
    return routed_TD + shared_TD


class FixedMixing(nnx.Module):
  """`moe_weight * routed + share_weight * shared`: RMoE's released code."""

  def __init__(self, routed_weight: float, shared_weight: float):
    self.routed_weight = routed_weight
    self.shared_weight = shared_weight

  def __call__(
    self, u_TD: jax.Array, routed_TD: jax.Array, shared_TD: jax.Array
  ) -> jax.Array:
    del u_TD
    return self.routed_weight * routed_TD + self.shared_weight * shared_TD


class CoefficientMixing(nnx.Module):
  """`c_0 routed + c_1 shared` with `c = softmax(u C + b)` per token.

  CartesianMoE (arXiv 2410.16077), as in residual MoE.

  Attributes:
    coefficient_D2: C, float32.
    bias_2: b, float32.
  """

  def __init__(self, hidden_size: int, *, init_std: float, rngs: nnx.Rngs):
    init = nnx.initializers.normal(init_std)
    self.coefficient_D2 = nnx.Param(
      init(rngs.params(), (hidden_size, 2), jnp.float32)
    )
    self.bias_2 = nnx.Param(jnp.zeros((2,), jnp.float32))

  def __call__(
    self, u_TD: jax.Array, routed_TD: jax.Array, shared_TD: jax.Array
  ) -> jax.Array:
    logits_T2 = jnp.matmul(
      u_TD.astype(jnp.float32), self.coefficient_D2[...], precision=PRECISION
    )
    c_T2 = jax.nn.softmax(logits_T2 + self.bias_2[...]).astype(u_TD.dtype)
    return c_T2[:, :1] * routed_TD + c_T2[:, 1:] * shared_TD
