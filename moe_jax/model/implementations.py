"""Which implementation runs: the one that is asked for, or the best.

Of attention, of the grouped matmul of experts and of the exchange of tokens
between devices, `auto` means the first or cheapest that can run; one that is
named and cannot run is refused with the reason, its obstacle.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe_jax import parameter
from moe_jax.config import BATCH_AXES, head_dim, layer_kinds
from moe_jax.errors import UserError, choose
from moe_jax.experts.dispatch import (
  DISPATCHES,
  Dispatch,
  dropless,
  dropless_weighing_outputs,
)
from moe_jax.experts.exchange import EXCHANGES, exchanges_for
from moe_jax.experts.exchange_cost import ExchangeSizes
from moe_jax.experts.expert_parallel import ExpertParallel, Layout
from moe_jax.experts.grouped_matmul import (
  GROUPED_MATMULS,
  TunedMatmul,
  quantization,
  tokamax,
)
from moe_jax.model import attention_blocks, attention_kernels, tuned
from moe_jax.model.attention import (
  ATTENTIONS,
  Attend,
  Case,
  CausalAttention,
  RotaryAttend,
)
from moe_jax.model.attention_cached import CachedRotary, CachedSpan
from moe_jax.model.attention_span import SpanAttend
from moe_jax.parallel import mesh as mesh_lib

_LOG = logging.getLogger(__name__)

# Periods of layers up to which GPUs' programs are unrolled: so many take five
# times as long to compile, which is minutes.
_UNROLLED = 24


def resolved(
  config: ConfigDict, mesh: Mapping[str, int], device: jax.Device
) -> dict[str, str]:
  """Returns what runs where the config says `auto`, by the name of the part.

  It has `dtype` and `attention`, and for models with experts `exchange` ('none'
  where experts are not split), `grouped_matmul` and, where a measurement on
  such a device takes precedence, `grouped_matmul.measured`: the implementation
  of each measured shape; and `grouped_matmul.tiled`: the shapes for which
  kernels have tiles that were measured.

  Args:
    config: A validated config.
    mesh: The number of devices along every axis.
    device: One of them; it need not be here.

  Raises:
    UserError: The config names what cannot run there.
  """
  dtype = compute_dtype(config, device)
  parts = {'dtype': dtype.name, 'attention': config.model.positions}
  if config.model.positions != 'span':
    case = _attention_case(config, None, dtype, device)
    parts['attention'] = attention_name(config.model.attention, case)
  if 'moe' not in layer_kinds(config):
    return parts
  matmul = chosen_matmul(
    config.moe.grouped_matmul, device, config.moe.quantization
  )
  parts['grouped_matmul'] = str(matmul.name)
  if matmul.measured:
    shapes = [f'{shape}: {name}' for shape, name in matmul.measured]
    parts['grouped_matmul.measured'] = '; '.join(shapes)
  if matmul.tiles:
    parts['grouped_matmul.tiled'] = '; '.join(
      shape for shape, _ in matmul.tiles
    )
  split = mesh[mesh_lib.EXPERT] > 1
  exchange = exchange_name(config, mesh, dtype, device) if split else 'none'
  return parts | {'exchange': exchange}


def first_device(mesh: jax.sharding.Mesh | None) -> jax.Device:
  """Returns a device of a mesh; without one, of the default platform."""
  devices = jax.devices() if mesh is None else mesh.devices.flat
  return next(iter(devices))


def compute_dtype(config: ConfigDict, device: jax.Device) -> jnp.dtype:
  """Returns `model.dtype`; auto is bfloat16 where a device is good at it."""
  if config.model.dtype != 'auto':
    return jnp.dtype(config.model.dtype)
  return jnp.dtype(jnp.float32 if device.platform == 'cpu' else jnp.bfloat16)


def unrolled(asked: int, device: jax.Device, repeats: int) -> int:
  """Returns how many periods of layers a step of the scan over them has.

  A GPU's program moves what a scan hands from step to step and keeps for the
  backward pass through its memory; unrolled it does not, and takes longer to
  compile.

  Args:
    asked: `model.unroll`, 0 for what suits the platform.
    device: One of the devices; it need not be here.
    repeats: How many periods there are.
  """
  if asked:
    return asked
  return repeats if device.platform == 'gpu' and repeats <= _UNROLLED else 1


def attention(
  config: ConfigDict,
  mesh: jax.sharding.Mesh | None,
  dtype: jnp.dtype,
  cached: bool = False,
) -> Attend:
  """Returns the attention of a validated config.

  Args:
    config: The whole config.
    mesh: Where it will run; None for one device of the default platform.
    dtype: The type of the arithmetic.
    cached: Whether it is that of generation, a `CachedAttend`.

  Raises:
    UserError: `model.attention` names what cannot run there.
  """
  model = config.model
  if model.positions == 'span':
    of_span = CachedSpan if cached else SpanAttend
    return of_span(model.span, model.dropout)
  case = _attention_case(config, mesh, dtype, first_device(mesh))
  causal = ATTENTIONS[attention_name(model.attention, case)](case)
  rotary = CachedRotary if cached else RotaryAttend
  return rotary(
    model.rope_theta, causal, model.dropout, attention_blocks.blocks, mesh
  )


def _attention_case(
  config: ConfigDict,
  mesh: jax.sharding.Mesh | None,
  dtype: jnp.dtype,
  device: jax.Device,
) -> Case:
  # A released checkpoint says nothing of data.
  packed = 'data' in config and config.data.order == 'packed'
  return Case(device, mesh, dtype, head_dim(config), packed)


# Of the attentions that can run `auto` takes the first.
_PREFERRED_ATTENTIONS = (
  attention_kernels.CUDNN,
  attention_kernels.SPLASH,
  attention_blocks.BLOCKS,
)


def attention_name(asked: str, case: Case) -> str:
  """Returns the name of what `model.attention` means; see `attention`."""

  def obstacle(name: str) -> str | None:
    own = ATTENTIONS[name]
    if case.packed and own.within is CausalAttention.within:
      return (
        "has no method `within`, which data.order = 'packed' needs to keep"
        ' documents apart'
      )
    return own.obstacle(case)

  preferred = list(_PREFERRED_ATTENTIONS)
  if case.packed:  # it would keep a square of positions, the mask
    preferred.remove(attention_kernels.CUDNN)
  best = next(name for name in preferred if not obstacle(name))
  if asked == 'auto' and attention_kernels.CUDNN in preferred:
    reason = obstacle(attention_kernels.CUDNN) or ''
    if reason.startswith(attention_kernels.CUDNN_FAILS):
      _warn(f'attention {best!r}: {attention_kernels.CUDNN!r} {reason}')
  return _asked_or_best('model.attention', asked, best, ATTENTIONS, obstacle)


@functools.cache
def _warn(line: str) -> None:
  """Warns once: a model may be built several times."""
  _LOG.warning(line)


def grouped_matmul(
  config: ConfigDict, mesh: jax.sharding.Mesh | None
) -> TunedMatmul:
  """Returns the grouped matmul of a validated config.

  Args:
    config: The whole config.
    mesh: Where it will run; None for one device of the default platform.

  Raises:
    UserError: `moe.grouped_matmul` names what cannot run there, or
      `moe.quantization` a type that is not multiplied there.
  """
  moe = config.moe
  return chosen_matmul(moe.grouped_matmul, first_device(mesh), moe.quantization)


def _preferred_matmuls(device: jax.Device) -> tuple[str, ...]:
  """Returns those of which `auto` takes the first, where none was measured."""
  by_platform = {
    'cpu': ('blocks',),
    'gpu': ('triton', 'padded'),
    'tpu': ('megablox', 'ragged_dot'),
  }
  return by_platform.get(device.platform, ('ragged_dot',))


def chosen_matmul(
  asked: str, device: jax.Device, quantized: str = ''
) -> TunedMatmul:
  """Returns what a value of `moe.grouped_matmul` means; see `grouped_matmul`.

  Args:
    asked: The value.
    device: The kind that the program is for; it need not be here.
    quantized: The value of `moe.quantization`.

  Raises:
    UserError: One of the values names what cannot run there.
  """
  if quantized and (reason := quantization.obstacle(quantized, device)):
    raise UserError(
      f"moe.quantization = {quantized!r} {reason}: set '' to multiply in"
      ' model.dtype'
    )

  def obstacle(name: str) -> str | None:
    if quantized and not GROUPED_MATMULS[name].eight_bits:
      return f'has no product for moe.quantization = {quantized!r}'
    return GROUPED_MATMULS[name].obstacle(device)

  key, preferred = 'moe.grouped_matmul', _preferred_matmuls(device)
  best = next(name for name in preferred if not obstacle(name))
  name = _asked_or_best(key, asked, best, GROUPED_MATMULS, obstacle)
  possible = [name] if asked != 'auto' else available_matmuls(device)
  matmul = TunedMatmul(
    name,
    device=None if device in jax.devices() else device,
    # What was measured was so in `model.dtype`.
    tiles=() if quantized else _tiles(device, possible),
    quantized=quantized,
  )
  if asked != 'auto':
    return matmul
  if name != preferred[0]:
    why = obstacle(preferred[0])
    _LOG.warning('grouped matmul %r: %r %s', name, preferred[0], why)
  if quantized:
    return matmul
  measured = tuned.best(device, possible)
  return dataclasses.replace(matmul, measured=tuple(sorted(measured.items())))


def _tiles(
  device: jax.Device, possible: Iterable[str]
) -> tuple[tuple[str, str], ...]:
  """Returns the tiles of tokamax's kernels, where some of these call them."""
  if not any(GROUPED_MATMULS[name].kernels for name in possible):
    return ()
  return tuple(sorted(tuned.tiles(device, tokamax.unreadable).items()))


def available_matmuls(device: jax.Device) -> list[str]:
  """Returns the grouped matmuls that can run on a device."""
  return [
    name
    for name in GROUPED_MATMULS
    if not GROUPED_MATMULS[name].obstacle(device)
  ]


def _asked_or_best(
  key: str,
  asked: str,
  best: str,
  names: Iterable[str],
  obstacle: Callable[[str], str | None],
) -> str:
  """Returns the name of the implementation that a config key means.

  Args:
    key: The config key.
    asked: Its value, a name or `auto`.
    best: What `auto` means.
    names: All implementations.
    obstacle: Says why one cannot run, 'runs on ...', or None if it can.

  Raises:
    UserError: What is asked for is not known or cannot run.
  """
  if asked == 'auto':
    return best
  reason = obstacle(choose(key, asked, names))
  if reason:
    possible = ', '.join(name for name in names if not obstacle(name))
    raise UserError(
      f'{key} = {asked!r} {reason}; here it can be auto, which takes {best!r},'
      f' or one of {possible}'
    )
  return asked


def dispatch(
  config: ConfigDict, mesh: jax.sharding.Mesh | None, dtype: jnp.dtype
) -> Dispatch:
  """Returns the dispatch of all MoE layers.

  Args:
    config: The whole config.
    mesh: Where it will run; None for one device of the default platform.
    dtype: The type of the layers' arithmetic.

  Raises:
    UserError: `moe.exchange` names what cannot run there.
  """
  if mesh is None or mesh.size == 1:
    return _on_one_device(config)
  device = first_device(mesh)
  return across(config, mesh, exchange_name(config, mesh.shape, dtype, device))


def across(
  config: ConfigDict,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  exchange: str,
) -> ExpertParallel:
  """Returns the dispatch on a mesh, by the exchange of that name."""
  moe = config.moe
  layout = Layout(
    token_axes=mesh_lib.TOKEN_AXES,
    expert_axis=mesh_lib.MESH_AXIS[parameter.EXPERT],
    tensor_axis=mesh_lib.MESH_AXIS[parameter.MLP],
    fsdp_axis=mesh_lib.MESH_AXIS[parameter.EMBED],
  )
  inner = _on_one_device(config)
  if mesh.shape[layout.expert_axis] > 1:
    inner = EXCHANGES[exchange].make(moe, inner, layout)
  return ExpertParallel(mesh, inner, layout)


def _on_one_device(config: ConfigDict) -> Dispatch:
  """Returns the dispatch among the experts of one device."""
  moe, model = config.moe, config.model
  made = DISPATCHES[moe.dispatch](moe)
  wide = moe.expert_width > model.hidden_size
  # With another `model.remat` the outputs would be computed twice.
  if made is dropless and wide and model.remat == 'none':
    return dropless_weighing_outputs
  return made


def exchange_name(
  config: ConfigDict,
  mesh: Mapping[str, int],
  dtype: jnp.dtype,
  device: jax.Device,
) -> str:
  """Returns the name of what `moe.exchange` means.

  `auto` is the exchange that sends the fewest bytes on such devices.

  Args:
    config: The whole config.
    mesh: The number of devices along every axis.
    dtype: The type of hidden states.
    device: One of the devices; it need not be here.

  Raises:
    UserError: It is not known, or does not compile for so many devices.
  """
  count, sent = math.prod(mesh.values()), exchange_bytes(config, mesh, dtype)
  best = min(
    (name for name in sent if EXCHANGES[name].suits(device, count)),
    key=lambda name: sent[name],
  )

  def obstacle(name: str) -> str | None:
    if mesh[mesh_lib.EXPERT] == 1:
      return None  # nothing is exchanged
    return EXCHANGES[name].obstacle(device, count)

  key, asked = 'moe.exchange', config.moe.exchange
  return _asked_or_best(key, asked, best, sent, obstacle)


def exchange_bytes(
  config: ConfigDict, mesh: Mapping[str, int], dtype: jnp.dtype
) -> dict[str, int]:
  """Returns what one device sends in a MoE layer's forward pass, by exchange.

  It is that of one micro-batch; backward sends as much again. Where assignments
  travel on their own, experts are taken to be balanced. A few numbers per
  expert are not counted.

  Args:
    config: A validated config.
    mesh: The number of devices along every axis.
    dtype: The type of hidden states.
  """
  moe, shards = config.moe, math.prod(mesh[axis] for axis in BATCH_AXES)
  rows = config.train.batch_size // config.train.accumulation // shards
  used = config.router.selection == 'top_k'
  sizes = ExchangeSizes(
    tokens=rows * config.data.seq_len // mesh[mesh_lib.CONTEXT],
    top_k=moe.top_k if used else moe.num_experts,
    num_experts=moe.num_experts,
    devices=mesh[mesh_lib.EXPERT],
  )
  row_bytes = config.model.hidden_size * jnp.dtype(dtype).itemsize
  return {
    name: round(EXCHANGES[name].num_bytes(moe, sizes, row_bytes))
    for name in exchanges_for(moe.dispatch)
  }
