"""Dispatch across devices: experts live on the devices of the `expert` axis."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from moe_jax import parameter
from moe_jax.experts.dispatch import Dispatch, Dispatched, Experts
from moe_jax.experts.mlp import HIDDEN
from moe_jax.experts.remat import remat
from moe_jax.parameter import EMBED, EXPERT, MLP
from moe_jax.routing.selection import Routing


def static(**options: Any) -> Any:
  """Declares a field of a registered dataclass that is no array."""
  return dataclasses.field(metadata={'static': True}, **options)


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the parameters of experts are split over the axes of a mesh.

  Attributes:
    token_axes: The mesh axes that split tokens, `expert_axis` among them.
    expert_axis: The axis that splits the experts.
    tensor_axis: The axis that splits the width of every expert.
    fsdp_axis: The axis that splits the hidden size of the parameters where they
      are kept; where they are used they are gathered along it, and their
      gradients scattered.
  """

  token_axes: tuple[str, ...]
  expert_axis: str
  tensor_axis: str
  fsdp_axis: str

  @property
  def all_axes(self) -> tuple[str, ...]:
    """The axes of the whole mesh."""
    return *self.token_axes, self.tensor_axis

  def specs(self, params: nnx.State) -> nnx.State:
    """Returns how each parameter is split, as `shard_map` wants to know.

    Raises:
      ValueError: A parameter declares no axis of experts.
    """
    specs = [self._spec(param) for param in _variables(params)]
    return jax.tree.unflatten(jax.tree.structure(params), specs)

  def unshard(self, params: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """Returns this device's experts as its own tokens use them, in `dtype`."""
    unsharded = [
      # Cast before the weights travel: half the bytes in bfloat16.
      self._unshard(param[...].astype(dtype), self._spec(param))
      for param in _variables(params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), unsharded)

  def _spec(self, param: nnx.Variable) -> P:
    """Returns the mesh axis of each of the axes that the parameter declares."""
    axes = parameter.declaration(param).axes
    if EXPERT not in axes:
      raise ValueError(
        f'a parameter of experts, of shape {param.shape}, declares the axes'
        f' {axes}; give parameter.param the axis parameter.EXPERT'
      )
    mesh_axes = {
      EXPERT: self.expert_axis,
      MLP: self.tensor_axis,
      EMBED: self.fsdp_axis,
    }
    return P(*(mesh_axes.get(axis) if axis else None for axis in axes))

  def _unshard(self, param: jax.Array, spec: P) -> jax.Array:
    """Gathers a parameter; repeats it along the axes that do not split it.

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
    return self._gather(param, tuple(spec).index(self.fsdp_axis))

  def _gather(self, param: jax.Array, dimension: int) -> jax.Array:
    if param.ndim > 3:
      # [N, D, 2, F] as [N, D, 2F], which the matmuls read: where the axis
      # before the last is as small as 2, TPUs do not scatter.
      joined = self._gather(param.reshape(*param.shape[:2], -1), dimension)
      return joined.reshape(*joined.shape[:2], *param.shape[2:])
    return lax.all_gather(param, self.fsdp_axis, axis=dimension, tiled=True)


def _variables(params: nnx.State) -> list[nnx.Variable]:
  """Returns the parameters of a state, in the order of its leaves."""
  return jax.tree.leaves(
    params, is_leaf=lambda node: isinstance(node, nnx.Variable)
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocalExperts:
  """Some experts, with part of their widths, that this device holds.

  For the backward pass it keeps its rows and `HIDDEN`. The weights in the dtype
  of the rows and unsharded, which would be those of every layer at once, are
  made again.

  Attributes:
    params: The experts' parameters that are stored here.
    graphdef: The experts' module without them.
    layout: How the parameters are split.
    is_unsharded: Whether `params` are as `Layout.unshard` makes them.
  """

  params: nnx.State
  graphdef: nnx.GraphDef = static()
  layout: Layout = static()
  is_unsharded: bool = static(default=False)

  @property
  def num_experts(self) -> int:
    """The number of experts on this device."""
    return nnx.merge(self.graphdef, self.params).num_experts

  def grouped(
    self,
    rows_MD: jax.Array,
    sizes_N: jax.Array,
    seeds_M: jax.Array | None,
    weights_M: jax.Array | None = None,
  ) -> jax.Array:
    """Computes sorted rows; see `Experts`."""
    return self._compute('grouped', rows_MD, sizes_N, seeds_M, weights_M)

  def batched(
    self, rows_NCD: jax.Array, seeds_NC: jax.Array | None
  ) -> jax.Array:
    """Computes C rows for every expert; see `Experts`."""
    return self._compute('batched', rows_NCD, seeds_NC)

  def unshard(self, dtype: jnp.dtype) -> 'LocalExperts':
    """Returns the same with parameters gathered once; see `Experts`."""
    params = self.layout.unshard(self.params, dtype)
    return dataclasses.replace(self, params=params, is_unsharded=True)

  def _compute(self, method: str, rows: jax.Array, *others: Any) -> jax.Array:
    def compute(params: nnx.State, rows: jax.Array, *others: Any) -> jax.Array:
      if not self.is_unsharded:
        params = self.layout.unshard(params, rows.dtype)
      experts = nnx.merge(self.graphdef, params)
      width = experts.down_NFD.shape[1]
      first_unit = lax.axis_index(self.layout.tensor_axis) * width
      return getattr(experts, method)(rows, *others, first_unit)

    return remat(compute, HIDDEN)(self.params, rows, *others)


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
  """Runs `inner` on every device's own tokens and experts in one `shard_map`.

  Attributes:
    mesh: A mesh with the axes of `layout`.
    inner: A dispatch across devices; where the axis of experts has one device,
      any dispatch.
    layout: How the experts' parameters are split.
  """

  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
  inner: Dispatch
  layout: Layout

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: Experts
  ) -> Dispatched:
    graphdef, params = nnx.split(experts)
    tokens = P(self.layout.token_axes)
    tensor_axis = self.layout.tensor_axis

    def local(
      x_TD: jax.Array, routing: Routing, params: nnx.State
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
      # Everything varies over every axis before experts see it: the gradient
      # of these casts is the sum over devices that custom gradients leave out.
      x_TD, routing = jax.tree.map(
        lambda a: lax.pcast(a, tensor_axis, to='varying'), (x_TD, routing)
      )
      local_experts = LocalExperts(params, graphdef, self.layout)
      done = self.inner(x_TD, routing, local_experts)
      y_TD = lax.psum(done.y_TD, tensor_axis)
      counts = done.dropped, done.overflowed
      return y_TD, *jax.tree.map(self._total, counts)

    run = jax.shard_map(
      local,
      mesh=self.mesh,
      in_specs=(tokens, tokens, self.layout.specs(params)),
      out_specs=(tokens, P(), P()),
      check_vma=True,
    )
    y_TD, dropped, overflowed = run(x_TD, _slim(routing), params)
    return Dispatched(y_TD, dropped, overflowed)

  def _total(self, count: jax.Array) -> jax.Array:
    total = lax.psum(count, self.layout.all_axes)
    # The devices along the widths all counted the same.
    return total // lax.axis_size(self.layout.tensor_axis)


def _slim(routing: Routing) -> Routing:
  """Drops the rows of probabilities and logits.

  A dispatch reads only their width, N.
  """
  return dataclasses.replace(
    routing,
    probabilities_TN=routing.probabilities_TN[:0],
    logits_TN=routing.logits_TN[:0],
  )
