"""Layers and routers for a Flax NNX model of your own.

A layer takes x of shape [..., D] and returns an output of that shape and `Aux`,
which holds its losses, where every token went, and the router's state:

  moe = layers.MoE(256, num_experts=8, top_k=2, rngs=nnx.Rngs(0))
  y, aux = moe(x)
  loss = task_loss + 0.01 * aux.balance_loss

RMoE's recurrent router is one module that all layers share. It is passed at
call, with the state that the layer before returned, and never stored in a
layer, where stacking layers would make a copy of it for each:

  router = layers.RecurrentRouter(256, rngs=rngs)
  stack = [layers.MoE(256, router=router, rngs=rngs) for _ in range(4)]
  state = None
  for moe in stack:
    y, aux = moe(x, state, router=router)
    x, state = x + y, aux.state
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax import parameter
from moe_jax.experts.layer import Layer, PreNormChain
from moe_jax.model import build
from moe_jax.routing import balance
from moe_jax.routing.balance import Load
from moe_jax.routing.cells import Cell, Memoryless
from moe_jax.routing.router import Context, RouterState, start
from moe_jax.routing.selection import Routing

__all__ = ['Aux', 'CartesianMoE', 'MoE', 'RecurrentRouter']


class Aux(NamedTuple):
  """What a layer returns beside its output.

  T counts the tokens of all leading axes of x. The arrays of a `CartesianMoE`
  have one more leading axis, that of its sub-layers.

  Attributes:
    balance_loss: `N sum_n f_n P_n`, K where experts are used evenly; summed
      over sub-layers. See `moe_jax.routing.balance.balance_loss`.
    z_loss: The mean squared log-partition of the logits.
    routing: Where every token went: weights_TK, indices_TK, probabilities_TN
      and logits_TN.
    load: The sums over tokens that the losses are made of.
    state: What the next layer's router is given, if it is recurrent.
  """

  balance_loss: jax.Array
  z_loss: jax.Array
  routing: Routing
  load: Load
  state: RouterState


class RecurrentRouter(nnx.Module):
  """RMoE's memory of the layers below (arXiv 2408.06793), shared by all layers.

  Attributes:
    cell: The recurrent cell.
    keys: What layers that are made for this router have in their configs.
  """

  def __init__(
    self,
    hidden_size: int,
    *,
    state_size: int = 128,
    cell: str = 'gru',
    projector: str = 'layerwise',
    passing: str = 'state',
    rngs: nnx.Rngs,
  ):
    """Makes the cell.

    Args:
      hidden_size: D.
      state_size: R, the size of the state of each token.
      cell: A name in `moe_jax.registry.CELLS`: gru, rnn or lstm.
      projector: Whether each layer projects its input before the cell
        (layerwise, RMoE eq. 4), or the cell reads it itself (shared).
      passing: What of the state below a layer reads: state, detached or none.
      rngs: Has the stream `params`.
    """
    self.keys = (
      ('router.recurrent', cell),
      ('router.state_size', state_size),
      ('router.projector', projector),
      ('router.passing', passing),
    )
    config = _config(hidden_size, None, dict(self.keys))
    self.cell = build.make_cell(config, rngs)


class MoE(nnx.Module):
  """A Mixture-of-Experts feed-forward: `y = sum_k w_k E_k(x)`.

  Attributes:
    layer: What computes it, a `moe_jax.experts.layer.Layer`.
  """

  def __init__(
    self,
    hidden_size: int,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    width: int | None = None,
    score: str = 'linear',
    router: RecurrentRouter | None = None,
    shared_width: int = 0,
    activation: str = 'swiglu',
    dispatch: str = 'dropless',
    dropout: float = 0.0,
    init_std: float = 0.02,
    vocab_size: int = 1,
    keys: Mapping[str, Any] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rngs: nnx.Rngs,
  ):
    """Makes the parameters.

    Args:
      hidden_size: D.
      num_experts: N.
      top_k: K, the experts that each token visits.
      width: The width of an expert; None for 2 D. (The factors of a
        `CartesianMoE` share it, so that it costs what an `MoE` does.)
      score: The gate, a name in `moe_jax.registry.GATES`.
      router: The recurrent router that calls will pass. It is read here for its
        sizes, and not kept.
      shared_width: The width of an expert that every token visits, or 0.
      activation: What experts are: swiglu, or relu with biases.
      dispatch: A name in `moe_jax.registry.DISPATCHES`: dropless or capacity.
      dropout: The rate on hidden units and outputs, where calls pass `rng`.
      init_std: The standard deviation of the initial weights.
      vocab_size: V, for gates that look token ids up.
      keys: Any other key of a run's config, by its dotted name, such as
        `{'router.weights': 'sigmoid'}`.
      mesh: The devices, with the axes of `moe_jax.parallel.mesh.make_mesh`;
        experts are split over its axis `expert`. None for one device.
      rngs: Has the stream `params`.

    Raises:
      UserError: Options contradict each other; the message names config keys.
    """
    config = _config(
      hidden_size,
      mesh,
      {
        'moe.num_experts': num_experts,
        'moe.top_k': top_k,
        'moe.expert_width': 2 * hidden_size if width is None else width,
        'moe.shared.width': shared_width,
        'moe.dispatch': dispatch,
        'model.activation': activation,
        'model.dropout': dropout,
        'model.init_std': init_std,
        'router.score': score,
      }
      | dict(router.keys if router else ())
      | dict(keys or {}),
    )
    self.recurrent = router is not None
    self.num_residual_logits = build.num_residual_logits(config)
    parts = build.make_parts(config, vocab_size, mesh)
    self.layer = self._joined(config, build.make_moe_layers(parts, rngs))
    parameter.declare(self)

  def __call__(
    self,
    x: jax.Array,
    state: RouterState | None = None,
    *,
    router: RecurrentRouter | None = None,
    token_ids: jax.Array | None = None,
    padding_mask: jax.Array | None = None,
    step: jax.Array | None = None,
    rng: jax.Array | None = None,
  ) -> tuple[jax.Array, Aux]:
    """Returns the output, of the shape and dtype of x, and `Aux`.

    Args:
      x: The input, [..., D].
      state: The `aux.state` of the layer before; None for the first one.
      router: The recurrent router that the layer was made for, if any.
      token_ids: The vocabulary indices, int32 [...]; for gates that look them
        up.
      padding_mask: Bool [...]; False marks padding, which visits no expert and
        is not counted.
      step: The training step, for gates that depend on it.
      rng: The key of dropout and of what gates draw; None, as in evaluation,
        for none of it.

    Raises:
      ValueError: `router` is missing, or the layer is not made for one.
    """
    if self.recurrent != (router is not None):
      raise ValueError(
        'a layer made with router=... is called with the same router=...'
        if self.recurrent
        else 'router=... is for layers that are made with it'
      )
    context = _context(x, router, token_ids, padding_mask, step, rng)
    x_TD = x.reshape(-1, x.shape[-1])
    if state is None:
      state = start(context.cell, len(x_TD), self.num_residual_logits)
    y_TD, state, aux = self.layer(x_TD, state, context)
    assert aux is not None  # it is None of dense layers alone
    load, routing = aux
    losses = balance.balance_loss(load), balance.z_loss(load)
    return y_TD.reshape(x.shape), Aux(*losses, routing, load, state)

  def _joined(self, config: ConfigDict, layers: list[Layer]) -> Layer:
    """Returns what `layer` is, from the MoE layers of the config."""
    del config
    [layer] = layers
    return layer


class CartesianMoE(MoE):
  """CartesianMoE's product of experts (arXiv 2410.16077), residuals included.

  `a = x + MoE_A(norm(x))`, `y = a + MoE_B(norm(a))`: a token's expert is the
  pair (A_i, B_j). It stands where a block has `x + feed_forward(norm(x))`.
  """

  def __init__(self, hidden_size: int, *, factors: int = 2, **options: Any):
    """Makes the parameters.

    Args:
      hidden_size: D.
      factors: The number of sub-layers, whose experts make up the product.
      **options: The options of `MoE`.
    """
    keys = {'moe.factors': factors} | dict(options.pop('keys', None) or {})
    super().__init__(hidden_size, keys=keys, **options)

  def _joined(self, config: ConfigDict, layers: list[Layer]) -> Layer:
    return PreNormChain([build.make_norm(config) for _ in layers], layers)


def _config(
  hidden_size: int, mesh: jax.sharding.Mesh | None, keys: Mapping[str, Any]
) -> ConfigDict:
  """Returns the config of a model whose layers are asked for."""
  devices = 1 if mesh is None else mesh.size
  axes = {} if mesh is None else {f'mesh.{k}': n for k, n in mesh.shape.items()}
  config = config_lib.get_config()
  fixed = {
    'model.hidden_size': hidden_size,
    'model.dtype': 'float32',
    # Of attention, which is not made; any mesh divides them.
    'model.num_heads': devices,
    'model.num_kv_heads': devices,
    'model.head_dim': 2,
    'train.batch_size': devices,
  }
  config.update_from_flattened_dict(fixed | axes | dict(keys))
  config_lib.validate(config, devices)
  return config


def _context(
  x: jax.Array,
  router: RecurrentRouter | None,
  token_ids: jax.Array | None,
  padding_mask: jax.Array | None,
  step: jax.Array | None,
  rng: jax.Array | None,
) -> Context:
  cell: Cell = (
    Memoryless(0, 0, rngs=nnx.Rngs()) if router is None else router.cell
  )
  shape_BL = (-1, x.shape[-2] if x.ndim > 1 else 1)
  leading = x.shape[:-1]
  if token_ids is None:
    token_ids = jnp.zeros(leading, jnp.int32)
  if padding_mask is None:
    padding_mask = jnp.ones(leading, bool)
  return Context(
    cell, token_ids.reshape(shape_BL), padding_mask.reshape(shape_BL), step, rng
  )
