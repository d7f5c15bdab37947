"""Feed-forward layers: Mixture of Experts, dense, and chains of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax.experts.dispatch import Dispatch, Experts
from moe_jax.experts.dropout import dropout
from moe_jax.experts.mlp import ExpertsInPlace, ReLUMLP, SwiGLU
from moe_jax.parameter import param
from moe_jax.routing.balance import Load, load_of
from moe_jax.routing.matmul import matmul
from moe_jax.routing.router import Context, Router, RouterState
from moe_jax.routing.selection import Routing, Select

Norm = Callable[[jax.Array], jax.Array]


class Aux(NamedTuple):
  """What an MoE layer returns beside its output.

  Attributes:
    load: The sums over tokens that losses and metrics are made of.
    routing: Where every token went.
  """

  load: Load
  routing: Routing


class Layer(Protocol):
  """A feed-forward: dense, a Mixture of Experts, or a chain of them."""

  def __call__(
    self, x_TD: jax.Array, state: RouterState, context: Context
  ) -> tuple[jax.Array, RouterState, Aux | None]:
    """Returns y_TD, the router's next state, and `Aux` (None if dense)."""
    ...


class Mixing(Protocol):
  """Joins what the routed and the shared experts computed."""

  def __call__(
    self, u_TD: jax.Array, routed_TD: jax.Array, shared_TD: jax.Array
  ) -> jax.Array:
    """Returns y_TD from the layer's input and its two outputs."""
    ...


class MoELayer(nnx.Module):
  """`y = sum_k w_k E_k(x)` over the experts the router chose (RMoE eq. 1, 6).

  Attributes:
    router: Makes the logits and the next router state.
    select: Makes a `Routing` of the logits.
    dispatch: Brings tokens to their experts and the results back.
    experts: The routed experts.
    shared: An expert that every token visits, or None.
    shared_parts: The number of networks that `shared` stands for: their
      outputs' mean is its own, divided by their number.
    mixing: Joins the routed and the shared output; by default it adds them.
    bias_D: A learned vector added to the routed output, or None (RMoE's
      released code has it as an option).
    dropout: The rate on the output; if not 0, experts get seeds for theirs.
  """

  def __init__(
    self,
    router: Router,
    select: Select,
    dispatch: Dispatch,
    experts: Experts,
    *,
    shared: SwiGLU | ReLUMLP | None = None,
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
    self.mixing: Mixing = SumMixing() if mixing is None else mixing
    self.bias_D = bias_D
    self.dropout = dropout

  def __call__(
    self,
    x_TD: jax.Array,
    state: RouterState,
    context: Context,
  ) -> tuple[jax.Array, RouterState, Aux]:
    """Returns y_TD, the router's next state and `Aux`."""
    for_router, for_experts, for_output = context.split(3)
    for_seeds, for_shared = for_experts.split(2)
    logits_TN, state = self.router(x_TD, state, for_router)
    routing = self.select(logits_TN).only(context.padding_mask_T[:, None])
    routing = checkpoint_name(routing, 'routing')  # for the remat policies
    seeded = self._with_seeds(routing, for_seeds.rng)
    experts: Experts = self.experts
    if context.period is not None:
      experts = ExpertsInPlace(self.experts, context.period)
    with jax.named_scope('experts'):
      y_TD, dropped, overflowed = self.dispatch(
        x_TD, seeded.among(experts.num_experts), experts
      )
    if self.bias_D is not None:
      y_TD += self.bias_D[...].astype(y_TD.dtype)
    if self.shared is not None:
      with jax.named_scope('shared_expert'):
        shared_TD = self.shared(x_TD, for_shared.rng) / self.shared_parts
        y_TD = self.mixing(x_TD, y_TD, shared_TD)
    y_TD = dropout(y_TD, self.dropout, for_output.rng)
    load = load_of(
      routing,
      context.padding_mask_BL,
      dropped,
      self.select,
      overflowed,
      context.seq_shards,
    )
    return y_TD, state, Aux(load, routing)

  def _with_seeds(self, routing: Routing, rng: jax.Array | None) -> Routing:
    """Returns the routing with a seed for the dropout of every assignment.

    They are drawn here, token by token, so that dropout depends on no dispatch.
    """
    if not self.dropout or rng is None:
      return routing
    seeds_TK = jax.random.bits(rng, routing.indices_TK.shape, jnp.uint32)
    return dataclasses.replace(routing, seeds_TK=seeds_TK)


class DenseLayer(nnx.Module):
  """A dense feed-forward with the calling convention of `MoELayer`.

  Attributes:
    feed_forward: The network, a callable of x_TD and a key for its dropout.
    dropout: The rate on its output.
  """

  def __init__(
    self,
    feed_forward: Callable[[jax.Array, jax.Array | None], jax.Array],
    dropout: float = 0.0,
  ):
    self.feed_forward = feed_forward
    self.dropout = dropout

  def __call__(
    self, x_TD: jax.Array, state: RouterState, context: Context
  ) -> tuple[jax.Array, RouterState, None]:
    """Returns y_TD, and the router's state as it was."""
    for_hidden, for_output = context.split(2)
    y_TD = self.feed_forward(x_TD, for_hidden.rng)
    return dropout(y_TD, self.dropout, for_output.rng), state, None


class PreNormChain(nnx.Module):
  """`x = x + layer(norm(x))`, one layer after the other.

  One MoE layer is a conventional MoE layer, one dense layer a conventional
  feed-forward. Two MoE layers are CartesianMoE's Cartesian Product Layer (arXiv
  2410.16077): a token's expert is the pair (A_i, B_j), computed as `a = x +
  MoE_A(norm(x))`, `y = a + MoE_B(norm_mid(a))`. Any number makes a product of
  that many factors. The router's state goes from layer to layer.
  """

  def __init__(self, norms: Sequence[Norm], sub_layers: Sequence[Layer]):
    self.norms = nnx.List(norms)
    self.sub_layers = nnx.List(sub_layers)

  def __call__(
    self, x_TD: jax.Array, state: RouterState, context: Context
  ) -> tuple[jax.Array, RouterState, Aux | None]:
    """Returns y_TD, the router's state, and `Aux` with a leading axis [S]."""
    auxes = []
    contexts = context.split(len(self.sub_layers))
    for norm, layer, of_layer in zip(
      self.norms, self.sub_layers, contexts, strict=True
    ):
      y_TD, state, aux = layer(norm(x_TD), state, of_layer)
      x_TD = x_TD + y_TD
      auxes.append(aux)
    return x_TD, state, _stacked(auxes)


class PostNormChain(nnx.Module):
  """`x = norm(x + layer(x))`, one layer after the other."""

  def __init__(self, norms: Sequence[Norm], sub_layers: Sequence[Layer]):
    self.norms = nnx.List(norms)
    self.sub_layers = nnx.List(sub_layers)

  def __call__(
    self, x_TD: jax.Array, state: RouterState, context: Context
  ) -> tuple[jax.Array, RouterState, Aux | None]:
    """Returns y_TD, the router's state, and `Aux` with a leading axis [S]."""
    auxes = []
    contexts = context.split(len(self.sub_layers))
    for norm, layer, of_layer in zip(
      self.norms, self.sub_layers, contexts, strict=True
    ):
      y_TD, state, aux = layer(x_TD, state, of_layer)
      x_TD = norm(x_TD + y_TD)
      auxes.append(aux)
    return x_TD, state, _stacked(auxes)


def _stacked(auxes: Sequence[Aux | None]) -> Aux | None:
  return jax.tree.map(lambda *a: jnp.stack(a), *auxes)


class SumMixing(nnx.Module):
  """Makes `routed + shared`."""

  def __call__(
    self, u_TD: jax.Array, routed_TD: jax.Array, shared_TD: jax.Array
  ) -> jax.Array:
    del u_TD
    return routed_TD + shared_TD


class FixedMixing(nnx.Module):
  """Makes `routed_weight routed + shared_weight shared` (RMoE's released code).

  Attributes:
    routed_weight, shared_weight: The two numbers.
  """

  def __init__(self, routed_weight: float, shared_weight: float):
    self.routed_weight = routed_weight
    self.shared_weight = shared_weight

  def __call__(
    self, u_TD: jax.Array, routed_TD: jax.Array, shared_TD: jax.Array
  ) -> jax.Array:
    del u_TD
    return self.routed_weight * routed_TD + self.shared_weight * shared_TD


class CoefficientMixing(nnx.Module):
  """Makes `c_0 routed + c_1 shared` with `c = softmax(u C + b)` per token.

  CartesianMoE (arXiv 2410.16077) mixes so, as residual MoE does.

  Attributes:
    coefficient_D2: C, float32.
    bias_2: b, float32.
  """

  def __init__(self, hidden_size: int, *, init_std: float, rngs: nnx.Rngs):
    init = nnx.initializers.normal(init_std)
    self.coefficient_D2 = param(
      init(rngs.params(), (hidden_size, 2), jnp.float32), decay=True
    )
    self.bias_2 = param(jnp.zeros((2,), jnp.float32))

  def __call__(
    self, u_TD: jax.Array, routed_TD: jax.Array, shared_TD: jax.Array
  ) -> jax.Array:
    logits_T2 = matmul(u_TD, self.coefficient_D2[...])
    c_T2 = jax.nn.softmax(logits_T2 + self.bias_2[...]).astype(u_TD.dtype)
    return c_T2[:, :1] * routed_TD + c_T2[:, 1:] * shared_TD
