"""From a config and a mesh to the dispatch: how tokens meet their experts."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe_jax.config import BATCH_AXES
from moe_jax.errors import UserError, choose
from moe_jax.experts import exchange_cost
from moe_jax.experts.dispatch import DISPATCHES, Dispatch
from moe_jax.experts.exchange import (
  AllGather,
  Blocks,
  BufferedAllToAll,
  CapacityAllToAll,
)
from moe_jax.experts.exchange_cost import ExchangeSizes
from moe_jax.experts.expert_parallel import ExpertParallel, Layout
from moe_jax.experts.ragged_exchange import Ragged
from moe_jax.parallel import mesh as mesh_lib

_EXPERT = 'expert'  # the mesh axis

# For every `moe.dispatch` the values of `moe.exchange`, from the config and the
# dispatch of one device.
EXCHANGES: dict[str, dict[str, Callable[[ConfigDict, Dispatch], Dispatch]]] = {
  'dropless': {
    'gather': lambda moe, inner: AllGather(inner, _EXPERT),
    'all_to_all': lambda moe, inner: BufferedAllToAll(
      Blocks(_EXPERT, moe.buffer_factor), _EXPERT, mesh_lib.MESH_AXES
    ),
    'ragged': lambda moe, inner: BufferedAllToAll(
      Ragged(_EXPERT, moe.buffer_factor), _EXPERT, mesh_lib.MESH_AXES
    ),
  },
  'capacity': {
    'gather': lambda moe, inner: AllGather(inner, _EXPERT),
    'all_to_all': lambda moe, inner: CapacityAllToAll(inner, _EXPERT),
  },
}

# What each sends, from the config, the sizes and the bytes of a hidden state.
_SENT: dict[
  str, dict[str, Callable[[ConfigDict, ExchangeSizes, int], float]]
] = {
  'dropless': {
    'gather': lambda moe, sizes, row: exchange_cost.gather_bytes(sizes, row),
    'all_to_all': lambda moe, sizes, row: exchange_cost.block_bytes(
      sizes, row, moe.buffer_factor
    ),
    'ragged': lambda moe, sizes, row: exchange_cost.ragged_bytes(sizes, row),
  },
  'capacity': {
    'gather': lambda moe, sizes, row: exchange_cost.gather_bytes(sizes, row),
    'all_to_all': lambda moe, sizes, row: exchange_cost.queue_bytes(
      sizes, row, moe.capacity_factor
    ),
  },
}

# XLA has no `ragged_all_to_all` on CPU, and a slow one on GPUs.
_RAGGED_PLATFORMS = ('tpu',)


def dispatch(
  config: ConfigDict, mesh: jax.sharding.Mesh | None, dtype: jnp.dtype
) -> Dispatch:
  """The dispatch of all MoE layers; `dtype` is that of their arithmetic."""
  name = choose('moe.dispatch', config.moe.dispatch, DISPATCHES)
  if mesh is None or mesh.size == 1:
    return DISPATCHES[name](config.moe)
  device = next(iter(mesh.devices.flat))
  return across(config, mesh, resolve(config, mesh.shape, dtype, device))


def across(
  config: ConfigDict,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  exchange: str,
) -> ExpertParallel:
  """The dispatch on the devices of a mesh, by an exchange of that name."""
  moe = config.moe
  inner = DISPATCHES[moe.dispatch](moe)
  if mesh.shape[_EXPERT] > 1:
    inner = EXCHANGES[moe.dispatch][exchange](moe, inner)
  return ExpertParallel(mesh, inner, Layout(mesh_lib.BATCH_AXES))


def resolve(
  config: ConfigDict,
  mesh: Mapping[str, int],
  dtype: jnp.dtype,
  device: jax.Device,
) -> str:
  """`moe.exchange`; auto is what sends the fewest bytes on such devices.

  Raises:
    UserError: it is not known, or does not compile for so many devices.
  """
  asked, count = config.moe.exchange, math.prod(mesh.values())
  limited = mesh_lib.limited_routing(device, count)
  sent = exchange_bytes(config, mesh, dtype)
  if device.platform not in _RAGGED_PLATFORMS or limited:
    sent.pop('ragged', None)
  best = min(sent, key=sent.get)
  if asked == 'auto':
    return best
  if asked == 'ragged' and limited and mesh[_EXPERT] > 1:
    raise UserError(
      f"moe.exchange = 'ragged' does not compile for {count} x"
      f" {device.device_kind}; 'auto' takes {best!r}, which does"
    )
  return choose('moe.exchange', asked, EXCHANGES[config.moe.dispatch])


def exchange_bytes(
  config: ConfigDict, mesh: Mapping[str, int], dtype: jnp.dtype
) -> dict[str, int]:
  """What one device sends, by exchange, in one MoE sub-layer's forward pass.

  Of one micro-batch; backward sends as much again. Where slots travel on their
  own it counts balanced experts. Not counted are a few numbers per expert.

  Args:
    config: validated.
    mesh: devices along every axis.
    dtype: of hidden states.
  """
  moe, shards = config.moe, math.prod(mesh[axis] for axis in BATCH_AXES)
  rows = config.train.batch_size // config.train.accumulation // shards
  used = config.router.selection == 'top_k'
  sizes = ExchangeSizes(
    tokens=rows * config.data.seq_len,
    slots=moe.top_k if used else moe.num_experts,
    num_experts=moe.num_experts,
    devices=mesh[_EXPERT],
  )
  row_bytes = config.model.hidden_size * jnp.dtype(dtype).itemsize
  return {
    name: round(sent(moe, sizes, row_bytes))
    for name, sent in _SENT[moe.dispatch].items()
  }
