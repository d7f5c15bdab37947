"""Dispatch across devices: experts live on the devices of the `expert` axis."""

import dataclasses

import jax
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from moe_jax.experts.dispatch import Dispatch, Dispatched
from moe_jax.experts.feed_forward import ExpertBank
from moe_jax.experts.shard import Layout, Shard
from moe_jax.routing.selection import Routing


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
  """`inner` on every device's own tokens and experts, within one `shard_map`.

  Attributes:
    mesh: with the axes of `layout`.
    inner: an exchange; where the axis of experts has one device, any dispatch.
    layout: of the experts' parameters.
  """

  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
  inner: Dispatch
  layout: Layout

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: ExpertBank
  ) -> Dispatched:
    graphdef, params = nnx.split(experts)
    tokens = P(self.layout.token_axes)
    width_axis = self.layout.width_axis

    def local(
      x_TD: jax.Array, routing: Routing, params: nnx.State
    ) -> Dispatched:
      # Everything varies over every axis before experts see it: the gradient
      # of these casts is the sum over devices that custom gradients leave out.
      x_TD, routing = jax.tree.map(
        lambda a: lax.pcast(a, width_axis, to='varying'), (x_TD, routing)
      )
      shard = Shard(params, graphdef, self.layout)
      y_TD, *counts = self.inner(x_TD, routing, shard)
      y_TD = lax.psum(y_TD, width_axis)
      return Dispatched(y_TD, *jax.tree.map(self._total, counts))

    return jax.shard_map(
      local,
      mesh=self.mesh,
      in_specs=(tokens, tokens, self.layout.specs(params)),
      out_specs=Dispatched(tokens, P(), P()),
      check_vma=True,
    )(x_TD, _slim(routing), params)

  def _total(self, dropped: jax.Array) -> jax.Array:
    width_axis = self.layout.width_axis
    total = lax.psum(dropped, (*self.layout.token_axes, width_axis))
    return total // lax.axis_size(width_axis)  # each width counted it


def _slim(routing: Routing) -> Routing:
  """Drops the rows of probabilities and logits.

  A dispatch reads only their width, N.
  """
  return dataclasses.replace(
    routing,
    probabilities_TN=routing.probabilities_TN[:0],
    logits_TN=routing.logits_TN[:0],
  )
