"""Which implementation runs: the one that is asked for, or the best.

Of attention, of the grouped matmul of experts and of the exchange of tokens
between devices, `auto` means the first or cheapest that can run; one that is
named and cannot run is refused with the reason, its obstacle.
"""

import logging
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe_jax import parameter
from moe_jax.config import BATCH_AXES, head_dim
from moe_jax.errors import UserError, choose
from moe_jax.experts.dispatch import DISPATCHES, Dispatch
from moe_jax.experts.exchange import EXCHANGES, exchanges_for
from moe_jax.experts.exchange_cost import ExchangeSizes
from moe_jax.experts.expert_parallel import ExpertParallel, Layout
from moe_jax.experts.grouped_matmul import GROUPED_MATMULS, TunedMatmul
from moe_jax.model import attention_blocks, attention_kernels, tuned
from moe_jax.model.attention import ATTENTIONS, Attend, Case, RotaryAttend
from moe_jax.model.attention_span import SpanAttend
from moe_jax.parallel import mesh as mesh_lib

_LOG = logging.getLogger(__name__)


def first_device(mesh: jax.sharding.Mesh | None) -> jax.Device:
  """Returns a device of a mesh; without one, of the default platform."""
  devices = jax.devices() if mesh is None else mesh.devices.flat
  return next(iter(devices))


def attention(
  config: ConfigDict, mesh: jax.sharding.Mesh | None, dtype: jnp.dtype
) -> Attend:
  """Returns the attention of a validated config.

  Args:
    config: The whole config.
    mesh: Where it will run; None for one device of the default platform.
    dtype: The type of the arithmetic.

  Raises:
    UserError: `model.attention` names what cannot run there.
  """
  model = config.model
  if model.positions == 'span':
    return SpanAttend(model.span, model.dropout)
  case = attention_case(config, mesh, dtype)
  causal = ATTENTIONS[attention_name(model.attention, case)](case)
  return RotaryAttend(
    model.rope_theta, causal, model.dropout, attention_blocks.blocks
  )


def attention_case(
  config: ConfigDict, mesh: jax.sharding.Mesh | None, dtype: jnp.dtype
) -> Case:
  """Returns what `attention` chooses by."""
  return Case(first_device(mesh), mesh, dtype, head_dim(config))


def attention_name(asked: str, case: Case) -> str:
  """Returns the name of what `model.attention` means; see `attention`."""
  if asked == 'auto':
    return next(
      n for n in _PREFERRED_ATTENTIONS if not ATTENTIONS[n].obstacle(case)
    )
  obstacle = ATTENTIONS[asked].obstacle(case)
  if obstacle:
    raise UserError(
      f"model.attention = {asked!r} {obstacle}; 'auto' is what fits here,"
      f' {attention_name("auto", case)!r}'
    )
  return asked


# Of those that are possible `auto` takes the first.
_PREFERRED_ATTENTIONS = (
  attention_kernels.CUDNN,
  attention_kernels.SPLASH,
  attention_blocks.BLOCKS,
)


def grouped_matmul(
  config: ConfigDict, mesh: jax.sharding.Mesh | None
) -> TunedMatmul:
  """The grouped matmul of a validated config.

  Args:
    config: the whole config.
    mesh: where it will run; None for one device of the default platform.

  Raises:
    UserError: `moe.grouped_matmul` names what cannot run there.
  """
  devices = jax.devices() if mesh is None else mesh.devices.flat
  return chosen_matmul(config.moe.grouped_matmul, next(iter(devices)))


def chosen_matmul(asked: str, device: jax.Device) -> TunedMatmul:
  """What a value of `moe.grouped_matmul` means; see `grouped_matmul`.

  Args:
    asked: the value.
    device: of the kind that the program is for; it need not be here.

  Raises:
    UserError: the value names what cannot run there.
  """
  if asked == 'auto':
    possible = available_matmuls(device)
    preferred = _PREFERRED_MATMULS.get(device.platform, _MATMULS_ELSEWHERE)
    name = next(n for n in preferred if n in possible)
    if name != preferred[0]:
      why = GROUPED_MATMULS[preferred[0]].obstacle(device)
      _LOG.warning('grouped matmul %r: %r %s', name, preferred[0], why)
    measured = tuned.best(device, possible)
    return TunedMatmul(name, tuple(sorted(measured.items())))
  obstacle = GROUPED_MATMULS[asked].obstacle(device)
  if obstacle:
    raise UserError(
      f'moe.grouped_matmul = {asked!r} {obstacle}; here it can be auto,'
      f' {", ".join(available_matmuls(device))}'
    )
  return TunedMatmul(asked)


def available_matmuls(device: jax.Device) -> list[str]:
  """The implementations that can run there."""
  return [
    name
    for name in GROUPED_MATMULS
    if not GROUPED_MATMULS[name].obstacle(device)
  ]


# By platform, the first that can run is taken where nothing was measured.
_PREFERRED_MATMULS = {
  'cpu': ('blocks',),
  'gpu': ('triton', 'padded'),
  'tpu': ('ragged_dot',),
}
_MATMULS_ELSEWHERE = ('ragged_dot',)


def dispatch(
  config: ConfigDict, mesh: jax.sharding.Mesh | None, dtype: jnp.dtype
) -> Dispatch:
  """The dispatch of all MoE layers; `dtype` is that of their arithmetic."""
  if mesh is None or mesh.size == 1:
    return DISPATCHES[config.moe.dispatch](config.moe)
  device = next(iter(mesh.devices.flat))
  return across(config, mesh, exchange_name(config, mesh.shape, dtype, device))


def across(
  config: ConfigDict,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  exchange: str,
) -> ExpertParallel:
  """The dispatch on the devices of a mesh, by an exchange of that name."""
  moe = config.moe
  layout = Layout(
    token_axes=mesh_lib.BATCH_AXES,
    expert_axis=mesh_lib.MESH_AXIS[parameter.EXPERT],
    tensor_axis=mesh_lib.MESH_AXIS[parameter.MLP],
    fsdp_axis=mesh_lib.MESH_AXIS[parameter.EMBED],
  )
  inner = DISPATCHES[moe.dispatch](moe)
  if mesh.shape[layout.expert_axis] > 1:
    inner = EXCHANGES[exchange].make(moe, inner, layout)
  return ExpertParallel(mesh, inner, layout)


def exchange_name(
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
  sent = {
    name: num_bytes
    for name, num_bytes in exchange_bytes(config, mesh, dtype).items()
    if EXCHANGES[name].suits(device, count)
  }
  best = min(sent, key=lambda name: sent[name])
  if asked == 'auto':
    return best
  name = choose('moe.exchange', asked, exchanges_for(config.moe.dispatch))
  obstacle = EXCHANGES[name].obstacle(device, count)
  if obstacle and mesh[mesh_lib.EXPERT] > 1:
    raise UserError(
      f"moe.exchange = {asked!r} {obstacle}; 'auto' takes {best!r}, which does"
    )
  return name


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
    top_k=moe.top_k if used else moe.num_experts,
    num_experts=moe.num_experts,
    devices=mesh[mesh_lib.EXPERT],
  )
  row_bytes = config.model.hidden_size * jnp.dtype(dtype).itemsize
  return {
    name: round(EXCHANGES[name].num_bytes(moe, sizes, row_bytes))
    for name in exchanges_for(moe.dispatch)
  }
