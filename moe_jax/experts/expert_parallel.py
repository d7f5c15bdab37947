"""Dispatch across devices: experts live on the devices of the `expert` axis."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from moe_jax.experts.dispatch import Dispatch, Dispatched
from moe_jax.experts.mlp import HIDDEN, SwiGLUExperts
from moe_jax.experts.remat import remat
from moe_jax.routing.selection import Routing


def static(**options: Any) -> Any:
  """Declares a field of a registered dataclass that is no array."""
  return dataclasses.field(metadata={'static': True}, **options)


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where on a mesh the parameters of a bank lie.

  Attributes:
    token_axes: the mesh axes that split tokens, `expert_axis` among them.
    expert_axis: splits the experts.
    tensor_axis: splits the width of every expert.
    fsdp_axis: splits the hidden size of the parameters where they are kept;
      where they are used they are gathered along it, and their gradients
      scattered.
  """

  token_axes: tuple[str, ...]
  expert_axis: str = 'expert'
  tensor_axis: str = 'tensor'
  fsdp_axis: str = 'fsdp'

  def specs(self, params: nnx.State) -> nnx.State:
    """How each parameter is split, as `shard_map` wants to know."""
    return jax.tree_util.tree_map_with_path(self._spec, params)

  def whole(self, params: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """The experts of this device as its own tokens use them, in `dtype`."""

    def whole(path: tuple[Any, ...], param: jax.Array) -> jax.Array:
      # Cast before the weights travel: half the bytes in bfloat16.
      return self._whole(param.astype(dtype), self._spec(path, param))

    return jax.tree_util.tree_map_with_path(whole, params)

  def _spec(self, path: tuple[Any, ...], param: jax.Array) -> P:
    """Split the axes N, D and F, which the parameter's name ends with."""
    names = [str(getattr(k, 'key', '')) for k in path]
    name = next(name for name in reversed(names) if '_' in name)
    letters = name.rpartition('_')[2]
    assert len(letters) == param.ndim, name
    axes = {
      'N': self.expert_axis,
      'D': self.fsdp_axis,
      'F': self.tensor_axis,
    }
    return P(*map(axes.get, letters))

  def _whole(self, param: jax.Array, spec: P) -> jax.Array:
    """A parameter, gathered; repeated along the axes that do not split it.

    Along the widths the partial sums are added up, and what is not split there,
    the bias of the output, has to be in one of them only.
    """
    axes = {*self.token_axes, self.tensor_axis} - {*spec}
    param = lax.pcast(param, tuple(sorted(axes)), to='varying')
    if self.tensor_axis in axes:
      first = lax.axis_index(self.tensor_axis) == 0
      param = jnp.where(first, param, jnp.zeros_like(param))
    if self.fsdp_axis not in spec or lax.axis_size(self.fsdp_axis) == 1:
      return param  # whole; CPUs would copy its gradient to scatter it
    # Last, so that backward scatters the gradient first and sums up parts of
    # it. Left to the partitioner, some gradients would be summed up whole.
    return self._gathered(param, tuple(spec).index(self.fsdp_axis))

  def _gathered(self, param: jax.Array, dimension: int) -> jax.Array:
    if param.ndim > 3:
      # [N, D, 2, F] as [N, D, 2F], which the matmuls read: where the axis
      # before the last is as small as 2, TPUs do not scatter.
      joined = self._gathered(param.reshape(*param.shape[:2], -1), dimension)
      return joined.reshape(*joined.shape[:2], *param.shape[2:])
    return lax.all_gather(param, self.fsdp_axis, axis=dimension, tiled=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocalExperts:
  """A bank of which this device holds some experts and part of their widths.

  For the backward pass it keeps its rows and `HIDDEN`. The weights in the dtype
  of the rows and whole, which would be those of every layer at once, are made
  again.

  Attributes:
    params: of the bank, those that are stored here.
    graphdef: of the bank.
    layout: of the parameters.
    is_whole: whether they are as `Layout.whole` makes them.
  """

  params: nnx.State
  graphdef: nnx.GraphDef = static()
  layout: Layout = static()
  is_whole: bool = static(default=False)

  @property
  def num_experts(self) -> int:
    """As in `Experts`."""
    return nnx.merge(self.graphdef, self.params).num_experts

  def grouped(
    self, rows_MD: jax.Array, sizes_N: jax.Array, seeds_M: jax.Array | None
  ) -> jax.Array:
    """As in `Experts`."""
    return self._compute('grouped', rows_MD, sizes_N, seeds_M)

  def batched(
    self, rows_NCD: jax.Array, seeds_NC: jax.Array | None
  ) -> jax.Array:
    """As in `Experts`."""
    return self._compute('batched', rows_NCD, seeds_NC)

  def whole(self, dtype: jnp.dtype) -> 'LocalExperts':
    """The same with whole parameters, for who uses them many times."""
    params = self.layout.whole(self.params, dtype)
    return dataclasses.replace(self, params=params, is_whole=True)

  def _compute(self, method: str, rows: jax.Array, *others: Any) -> jax.Array:
    def compute(params: nnx.State, rows: jax.Array, *others: Any) -> jax.Array:
      if not self.is_whole:
        params = self.layout.whole(params, rows.dtype)
      bank = nnx.merge(self.graphdef, params)
      width = bank.down_NFD.shape[1]
      first_unit = lax.axis_index(self.layout.tensor_axis) * width
      return getattr(bank, method)(rows, *others, first_unit)

    return remat(compute, HIDDEN)(self.params, rows, *others)


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
    self, x_TD: jax.Array, routing: Routing, experts: SwiGLUExperts
  ) -> Dispatched:
    graphdef, params = nnx.split(experts)
    tokens = P(self.layout.token_axes)
    tensor_axis = self.layout.tensor_axis

    def local(
      x_TD: jax.Array, routing: Routing, params: nnx.State
    ) -> Dispatched:
      # Everything varies over every axis before experts see it: the gradient
      # of these casts is the sum over devices that custom gradients leave out.
      x_TD, routing = jax.tree.map(
        lambda a: lax.pcast(a, tensor_axis, to='varying'), (x_TD, routing)
      )
      shard = LocalExperts(params, graphdef, self.layout)
      y_TD, *counts = self.inner(x_TD, routing, shard)
      y_TD = lax.psum(y_TD, tensor_axis)
      return Dispatched(y_TD, *jax.tree.map(self._total, counts))

    return jax.shard_map(
      local,
      mesh=self.mesh,
      in_specs=(tokens, tokens, self.layout.specs(params)),
      out_specs=Dispatched(tokens, P(), P()),
      check_vma=True,
    )(x_TD, _slim(routing), params)

  def _total(self, dropped: jax.Array) -> jax.Array:
    tensor_axis = self.layout.tensor_axis
    total = lax.psum(dropped, (*self.layout.token_axes, tensor_axis))
    return total // lax.axis_size(tensor_axis)  # each width counted it


def _slim(routing: Routing) -> Routing:
  """Drops the rows of probabilities and logits.

  A dispatch reads only their width, N.
  """
  return dataclasses.replace(
    routing,
    probabilities_TN=routing.probabilities_TN[:0],
    logits_TN=routing.logits_TN[:0],
  )
