"""Dispatch across devices: experts live on the devices of the `expert` axis."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from moe_jax.experts.dispatch import Dispatch, Dispatched
from moe_jax.experts.feed_forward import ExpertBank
from moe_jax.experts.trip import static
from moe_jax.routing.selection import Routing


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
  """`inner` on every device's own tokens and experts, within one `shard_map`.

  Attributes:
    mesh: with axes of the names below.
    inner: an exchange; where `expert_axis` has one device, any dispatch.
    token_axes: the mesh axes that split tokens, `expert_axis` among them.
    expert_axis: splits the experts.
    width_axis: splits the width of every expert.
    stored_axis: splits the hidden size of the parameters where they are kept;
      here they are gathered along it, and their gradients scattered.
  """

  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
  inner: Dispatch
  token_axes: tuple[str, ...]
  expert_axis: str = 'expert'
  width_axis: str = 'tensor'
  stored_axis: str = 'fsdp'

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: ExpertBank
  ) -> Dispatched:
    graphdef, params = nnx.split(experts)
    # Cast before the weights travel: half the bytes in bfloat16.
    params = jax.tree.map(lambda a: a.astype(x_TD.dtype), params)
    param_specs = jax.tree_util.tree_map_with_path(self._spec, params)
    tokens = P(self.token_axes)

    def local(
      x_TD: jax.Array, routing: Routing, params: nnx.State
    ) -> Dispatched:
      # Everything varies over every axis before the dispatch sees it: the
      # gradient of these casts is the sum over devices that its custom
      # gradients leave out.
      x_TD, routing = jax.tree.map(
        lambda a: lax.pcast(a, self.width_axis, to='varying'), (x_TD, routing)
      )
      params = jax.tree.map(self._whole, params, param_specs)
      bank = _Shard(params, graphdef, self.width_axis)
      y_TD, *counts = self.inner(x_TD, routing, bank)
      y_TD = lax.psum(y_TD, self.width_axis)
      return Dispatched(y_TD, *jax.tree.map(self._total, counts))

    return jax.shard_map(
      local,
      mesh=self.mesh,
      in_specs=(tokens, tokens, param_specs),
      out_specs=Dispatched(tokens, P(), P()),
      check_vma=True,
    )(x_TD, _slim(routing), params)

  def _spec(self, path: tuple[Any, ...], param: jax.Array) -> P:
    """Split the axes N, D and F, which the parameter's name ends with."""
    names = [str(getattr(k, 'key', '')) for k in path]
    name = next(name for name in reversed(names) if '_' in name)
    letters = name.rpartition('_')[2]
    assert len(letters) == param.ndim, name
    axes = {
      'N': self.expert_axis,
      'D': self.stored_axis,
      'F': self.width_axis,
    }
    return P(*map(axes.get, letters))

  def _whole(self, param: jax.Array, spec: P) -> jax.Array:
    """The experts of this device, gathered; repeated along the other axes.

    Along the widths the partial sums are added up, and what is not split there,
    the bias of the output, has to be in one of them only.
    """
    axes = {*self.token_axes, self.width_axis} - {*spec}
    param = lax.pcast(param, tuple(sorted(axes)), to='varying')
    if self.width_axis in axes:
      first = lax.axis_index(self.width_axis) == 0
      param = jnp.where(first, param, jnp.zeros_like(param))
    if self.stored_axis not in spec or self.mesh.shape[self.stored_axis] == 1:
      return param  # whole; CPUs would copy its gradient to scatter it
    # Last, so that backward scatters the gradient first and sums up parts of
    # it. Left to the partitioner, some gradients would be summed up whole.
    return self._gathered(param, tuple(spec).index(self.stored_axis))

  def _gathered(self, param: jax.Array, dimension: int) -> jax.Array:
    if param.ndim > 3:
      # [N, D, 2, F] as [N, D, 2F], which the matmuls read: where the axis
      # before the last is as small as 2, TPUs do not scatter.
      joined = self._gathered(param.reshape(*param.shape[:2], -1), dimension)
      return joined.reshape(*joined.shape[:2], *param.shape[2:])
    return lax.all_gather(param, self.stored_axis, axis=dimension, tiled=True)

  def _total(self, dropped: jax.Array) -> jax.Array:
    total = lax.psum(dropped, (*self.token_axes, self.width_axis))
    return total // lax.axis_size(self.width_axis)  # each width counted it


def _slim(routing: Routing) -> Routing:
  """Without what a dispatch reads nothing of but the number of experts."""
  return dataclasses.replace(
    routing,
    probabilities_TN=routing.probabilities_TN[:0],
    logits_TN=routing.logits_TN[:0],
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Shard:
  """A bank of which this device holds some experts and part of their widths.

  Attributes:
    params: of the bank, those that are held here.
    graphdef: of the bank.
    width_axis: along which the widths are split.
  """

  params: nnx.State
  graphdef: nnx.GraphDef = static()
  width_axis: str = static()

  @property
  def num_experts(self) -> int:
    return self._bank().num_experts

  def grouped(
    self, rows_MD: jax.Array, sizes_N: jax.Array, seeds_M: jax.Array | None
  ) -> jax.Array:
    bank = self._bank()
    return bank.grouped(rows_MD, sizes_N, seeds_M, self._first_unit(bank))

  def batched(
    self, rows_NCD: jax.Array, seeds_NC: jax.Array | None
  ) -> jax.Array:
    bank = self._bank()
    return bank.batched(rows_NCD, seeds_NC, self._first_unit(bank))

  def _bank(self) -> ExpertBank:
    return nnx.merge(self.graphdef, self.params)

  def _first_unit(self, bank: ExpertBank) -> jax.Array:
    return lax.axis_index(self.width_axis) * bank.down_NFD.shape[1]
