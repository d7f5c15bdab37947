"""Dispatch across devices: experts live on the devices of the `expert` axis.

Tokens are gathered along the axis, every device computes the share of its own
experts, and the partial sums are scattered back to the tokens' devices. It is
exact for any routing, with buffers of fixed size.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from moe_jax.experts.dispatch import Bank, Dispatch
from moe_jax.experts.feed_forward import ExpertBank
from moe_jax.routing.selection import Routing


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
  """`inner` on every device's own experts, within one `shard_map`.

  Attributes:
    mesh: with axes of the names below.
    inner: the dispatch of one device.
    token_axes: the mesh axes that split tokens, `expert_axis` among them.
    expert_axis: splits the experts.
    width_axis: splits the width of every expert.
  """

  mesh: jax.sharding.Mesh
  inner: Dispatch
  token_axes: tuple[str, ...]
  expert_axis: str = 'expert'
  width_axis: str = 'tensor'

  def __call__(
    self, x_TD: jax.Array, routing: Routing, experts: ExpertBank
  ) -> tuple[jax.Array, jax.Array]:
    graphdef, params = nnx.split(experts)
    # Cast before the weights travel: half the bytes in bfloat16.
    params = jax.tree.map(lambda a: a.astype(x_TD.dtype), params)
    param_specs = jax.tree_util.tree_map_with_path(self._spec, params)
    tokens = P(self.token_axes)

    def local(
      x_TD: jax.Array, routing: Routing, params: nnx.State
    ) -> tuple[jax.Array, jax.Array]:
      x_TD, routing = jax.tree.map(self._gather, (x_TD, routing))
      params = jax.tree.map(self._repeat, params, param_specs)
      bank = nnx.merge(graphdef, params)
      bank = _Shard(bank, lax.axis_index(self.width_axis))
      y_TD, dropped = self.inner(x_TD, self._mine(routing, bank), bank)
      y_TD = lax.psum(y_TD, self.width_axis)
      y_TD = lax.psum_scatter(
        y_TD, self.expert_axis, scatter_dimension=0, tiled=True
      )
      return y_TD, self._total(dropped)

    return jax.shard_map(
      local,
      mesh=self.mesh,
      in_specs=(tokens, tokens, param_specs),
      out_specs=(tokens, P()),
      check_vma=True,
    )(x_TD, routing, params)

  def _spec(self, path: tuple[Any, ...], param: jax.Array) -> P:
    """Split the axes N and F, which the parameter's name ends with."""
    names = [str(getattr(k, 'key', '')) for k in path]
    name = next(name for name in reversed(names) if '_' in name)
    letters = name.rpartition('_')[2]
    assert len(letters) == param.ndim, name
    axes = {'N': self.expert_axis, 'F': self.width_axis}
    return P(*map(axes.get, letters))

  # Everything varies over every axis before the dispatch sees it: the gradient
  # of these casts is the sum over devices that its custom gradients leave out.

  def _gather(self, a: jax.Array) -> jax.Array:
    """Tokens of the whole expert axis, repeated along the width axis."""
    a = lax.all_gather(a, self.expert_axis, tiled=True)
    return lax.pcast(a, self.width_axis, to='varying')

  def _repeat(self, param: jax.Array, spec: P) -> jax.Array:
    """The experts of this device, repeated along the other axes.

    Along the widths the partial sums are added up, and what is not split there,
    the bias of the output, has to be in one of them only.
    """
    axes = {*self.token_axes, self.width_axis} - {*spec}
    param = lax.pcast(param, tuple(sorted(axes)), to='varying')
    if self.width_axis in axes:
      first = lax.axis_index(self.width_axis) == 0
      param = jnp.where(first, param, jnp.zeros_like(param))
    return param

  def _mine(self, routing: Routing, bank: Bank) -> Routing:
    """Indices counted from this device's first expert; others' slots unused."""
    first = lax.axis_index(self.expert_axis) * bank.num_experts
    local_TK = routing.indices_TK - first
    mine_TK = (local_TK >= 0) & (local_TK < bank.num_experts)
    return dataclasses.replace(
      routing,
      weights_TK=jnp.where(mine_TK, routing.weights_TK, 0.0),
      indices_TK=jnp.where(mine_TK, local_TK, bank.num_experts),
    )

  def _total(self, dropped: jax.Array) -> jax.Array:
    total = lax.psum(dropped, (*self.token_axes, self.width_axis))
    return total // lax.axis_size(self.width_axis)  # each width counted it


@dataclasses.dataclass(frozen=True)
class _Shard:
  """A bank of which this device holds some experts and part of their widths.

  Attributes:
    part: number of this device's part of the widths.
  """

  bank: ExpertBank
  part: jax.Array

  @property
  def num_experts(self) -> int:
    return self.bank.num_experts

  def grouped(
    self, rows_MD: jax.Array, sizes_N: jax.Array, seeds_M: jax.Array | None
  ) -> jax.Array:
    return self.bank.grouped(rows_MD, sizes_N, seeds_M, self._first_unit())

  def batched(
    self, rows_NCD: jax.Array, seeds_NC: jax.Array | None
  ) -> jax.Array:
    return self.bank.batched(rows_NCD, seeds_NC, self._first_unit())

  def _first_unit(self) -> jax.Array:
    return self.part * self.bank.down_NFD.shape[1]
