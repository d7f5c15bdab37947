"""One MoE sub-layer's experts on many devices, by every exchange there is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.experts.exchange import exchanges_for
from moe_jax.model import build, implementations
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.planning.collectives import collectives, total_bytes
from moe_jax.routing.selection import Routing


class Operands(NamedTuple):
  """What an exchange is measured on.

  Attributes:
    params: of the experts.
  """

  x_TD: jax.Array
  weights_TK: jax.Array
  indices_TK: jax.Array
  params: nnx.State


class Program(NamedTuple):
  """A compiled forward and backward pass.

  Attributes:
    gradient: of the operands.
    costs: as in `expert_parallel.measure`.
  """

  gradient: jax.stages.Compiled
  costs: dict[str, int]

  def run(self, operands: Operands) -> dict[str, int]:
    """Computes the gradient; returns what happened to the assignments."""
    _, dropped, overflowed = jax.block_until_ready(self.gradient(operands))
    if overflowed is None:
      overflowed = 0
    return {'overflowed': int(overflowed), 'dropped': int(dropped)}


class Layer:
  """The experts of one sub-layer, with all devices along the expert axis.

  Attributes:
    exchanges: the names of all for the config's dispatch.
    assignments: the number of used ones, of all tokens of a step.
  """

  def __init__(self, config: ConfigDict):
    if jax.device_count() < 2:
      raise UserError(
        f'there is one {jax.default_backend()} device, and an exchange needs'
        ' more; with JAX_PLATFORMS=cpu --devices=8 there are eight fake ones'
      )
    config = config.copy_and_resolve_references()
    shape = dict.fromkeys(mesh_lib.MESH_AXES, 1) | {
      'expert': jax.device_count()
    }
    config.mesh.update(shape)
    config_lib.validate(config, jax.device_count())
    self._config = config
    self._mesh = mesh_lib.make_mesh(shape, jax.devices())
    self._dtype = build.compute_dtype(config, self._mesh)
    self._tokens = config.train.batch_size * config.data.seq_len
    self.exchanges = exchanges_for(config.moe.dispatch)
    self.assignments = self._tokens * config.moe.top_k
    all_chosen = config.router.selection == 'top_p'
    self._assignments_of_token = (
      config.moe.num_experts if all_chosen else config.moe.top_k
    )
    self._graphdef, self._params = self._experts()

  def operands(self, routing: str) -> Operands:
    """Random tokens for a routing of `expert_parallel.ROUTINGS`."""
    moe, rng = self._config.moe, np.random.default_rng(0)
    size = (self._tokens, self._config.model.hidden_size)
    x_TD = rng.standard_normal(size, np.float32)
    first_T = np.arange(self._tokens) * moe.top_k
    if routing == 'skewed':
      first_T[::2] = 0
    indices_TK = (first_T[:, None] + np.arange(moe.top_k)) % moe.num_experts
    weights_TK = np.full(indices_TK.shape, 1 / moe.top_k, np.float32)
    # Top-p has an assignment for every expert; the last ones are not used.
    unused = (0, 0), (0, self._assignments_of_token - moe.top_k)
    indices_TK = np.pad(indices_TK, unused, constant_values=moe.num_experts)
    weights_TK = np.pad(weights_TK, unused)
    along = NamedSharding(self._mesh, P(mesh_lib.BATCH_AXES))
    return Operands(
      jax.device_put(jnp.asarray(x_TD, self._dtype), along),
      jax.device_put(weights_TK, along),
      jax.device_put(indices_TK.astype(np.int32), along),
      self._params,
    )

  def compiled(self, exchange: str) -> Program:
    """Compiles the forward pass, for its bytes, and the gradient."""
    dispatch = implementations.across(self._config, self._mesh, exchange)
    estimates = implementations.exchange_bytes(
      self._config, self._mesh.shape, self._dtype
    )

    def forward(of: Operands) -> Any:
      logits_TN = jnp.zeros((self._tokens, self._config.moe.num_experts))
      routing = Routing(of.weights_TK, of.indices_TK, logits_TN, logits_TN)
      return dispatch(of.x_TD, routing, nnx.merge(self._graphdef, of.params))

    def gradient(of: Operands) -> Any:
      def loss(moving: Any) -> Any:
        x_TD, weights_TK, params = moving
        done = forward(Operands(x_TD, weights_TK, of.indices_TK, params))
        return (done.y_TD.astype(jnp.float32) ** 2).sum(), done[1:]

      moving = of.x_TD, of.weights_TK, of.params
      grads, counts = jax.grad(loss, has_aux=True)(moving)
      return grads, *counts

    operands = self.operands('balanced')
    there, both = (
      jax.jit(function).lower(operands).compile()
      for function in (forward, gradient)
    )
    forward_bytes, total, most = (
      total_bytes(collectives(compiled.as_text(), choose))
      for compiled, choose in ((there, min), (both, min), (both, max))
    )
    costs = {
      'estimated_bytes': estimates[exchange],
      'forward_bytes': forward_bytes,
      'backward_bytes': total - forward_bytes,
      'rare_bytes': most - total,
      'temp_bytes': both.memory_analysis().temp_size_in_bytes,
    }
    return Program(both, costs)

  def _experts(self) -> tuple[nnx.GraphDef, nnx.State]:
    model, moe = self._config.model, self._config.moe
    _, make = build.FEED_FORWARDS[model.activation]

    def create() -> Any:
      return make(
        moe.num_experts,
        model.hidden_size,
        moe.expert_width // moe.factors,
        init_std=model.init_std,
        rngs=nnx.Rngs(params=0),
        multiply=implementations.grouped_matmul(self._config, self._mesh),
      )

    graphdef = nnx.graphdef(nnx.eval_shape(create))
    along = NamedSharding(self._mesh, P('expert'))
    params = jax.jit(lambda: nnx.state(create()), out_shardings=along)()
    return graphdef, params
