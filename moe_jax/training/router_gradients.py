"""How hard each part of the loss pulls at the routers: the norms, apart."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.model.attention import AttentionState
from moe_jax.model.routers import by_router
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parameter import TRAINED
from moe_jax.training import optimizer
from moe_jax.training.losses import Metrics, Share
from moe_jax.training.metrics import OF_ROUTERS
from moe_jax.training.state import Setup, TrainState
from moe_jax.training.step import Batch, Inputs, gradient, loss_of

# Of the metrics of a step, the norms that `make_router_norms` measures of it.
ROUTER_GRADIENTS = 'router_gradients'

MeasureNorms = Callable[[TrainState, Batch], dict[str, jax.Array]]


def make_router_norms(setup: Setup) -> MeasureNorms:
  """Returns a jitted function of a state and the batch that it will see next.

  It measures the gradient in each router of two parts of the loss, the
  cross-entropy and `loss.balance_weight` times the balance loss, and returns
  their norms, `routing/cross_entropy_gradient` and
  `routing/balance_loss_gradient`, float32 [MoE layers, S]. Of a recurrent
  router also that in the cell, which all of them share, without `routing/`.
  """

  def norms(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    gradients, _, _ = gradient(setup, state, batch, _of_routers)
    found: dict[str, jax.Array] = {}
    for name, tree in gradients.items():
      routers = by_router(tree, setup.config)
      norm_W = jnp.stack([optax.tree.norm(router) for router in routers])
      shape = -1, setup.config.moe.factors
      found[f'{OF_ROUTERS}{name}_gradient'] = norm_W.reshape(shape)
      if cell := tree.get('cell'):
        found[f'cell_{name}_gradient'] = optax.tree.norm(cell)
    return found

  shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
  return jax.jit(
    norms,
    in_shardings=(shardings, mesh_lib.batch_sharding(setup.mesh)),
    out_shardings=mesh_lib.replicated(setup.mesh),
    compiler_options=mesh_lib.compiler_options(setup.mesh),
  )


def _of_routers(
  setup: Setup,
  params: Any,
  inputs: Inputs,
  num_targets: jax.Array,
  share: Share,
) -> tuple[dict[str, Any], tuple[Metrics, AttentionState]]:
  """Returns the routers' gradients of both parts, from one forward pass."""
  routers, others = _split(setup, params)

  def terms(routers: Any) -> tuple[Any, tuple[Metrics, AttentionState]]:
    whole = jax.tree.map(
      lambda router, other: other if router is None else router,
      routers,
      others,
      is_leaf=lambda leaf: leaf is None,
    )
    _, rest = loss_of(setup, whole, inputs, num_targets, share)
    weight = setup.config.loss.balance_weight
    return (rest[0]['loss'], weight * rest[0]['balance_loss']), rest

  _, pull, rest = jax.vjp(terms, routers, has_aux=True)
  one, zero = jnp.ones(()), jnp.zeros(())
  [of_cross_entropy] = pull((one, zero))
  [of_balance] = pull((zero, one))
  gradients = {'cross_entropy': of_cross_entropy, 'balance_loss': of_balance}
  return gradients, rest


def _split(setup: Setup, params: Any) -> tuple[Any, Any]:
  """Returns what is trained of routers and their cell, and everything else.

  Both are trees like `params`, None at the leaves of the other.
  """
  of_routers = jax.tree.map(
    lambda inside, label: inside and label == TRAINED,
    optimizer.of_routers(setup.declarations),
    optimizer.labels(setup.declarations, freeze='none'),
  )

  def part(wanted: bool) -> Any:
    return jax.tree.map(
      lambda leaf, inside: leaf if inside == wanted else None,
      params,
      of_routers,
    )

  return part(True), part(False)
