"""Which causal attention a model runs: what is asked for, or the best."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe_jax.config import head_dim
from moe_jax.errors import UserError, choose
from moe_jax.model import causal, kernels
from moe_jax.model.attention import Attend, Causal, RotaryAttend
from moe_jax.model.span import SpanAttend


class Case(NamedTuple):
  """What decides which implementations are possible.

  Attributes:
    device: of the kind that the program is for; it need not be here.
    mesh: None for one device.
    dtype: of queries, keys and values.
    head_dim: A.
  """

  device: jax.Device
  mesh: jax.sharding.Mesh | None
  dtype: jnp.dtype
  head_dim: int


class Implementation(NamedTuple):
  """One way to compute causal attention.

  Attributes:
    make: from a case that it fits.
    obstacle: why it does not fit a case: 'runs on ..., not on ...'; or None.
  """

  make: Callable[[Case], Causal]
  obstacle: Callable[[Case], str | None]


def attend(
  config: ConfigDict, mesh: jax.sharding.Mesh | None, dtype: jnp.dtype
) -> Attend:
  """The attention of a validated config.

  Args:
    config: the whole config.
    mesh: where it will run; None for one device of the default platform.
    dtype: of the arithmetic.

  Raises:
    UserError: `model.attention` names what cannot run there.
  """
  model = config.model
  if model.positions == 'span':
    return SpanAttend(model.dropout)
  case = case_of(config, mesh, dtype)
  chosen = IMPLEMENTATIONS[name(model.attention, case)]
  return RotaryAttend(model.rope_theta, model.dropout, chosen.make(case))


def case_of(
  config: ConfigDict, mesh: jax.sharding.Mesh | None, dtype: jnp.dtype
) -> Case:
  """What `attend` chooses by."""
  devices = jax.devices() if mesh is None else mesh.devices.flat
  return Case(next(iter(devices)), mesh, dtype, head_dim(config))


def name(asked: str, case: Case) -> str:
  """The implementation that `model.attention` means; see `attend`."""
  if asked == 'auto':
    return next(n for n in _PREFERRED if not IMPLEMENTATIONS[n].obstacle(case))
  chosen = IMPLEMENTATIONS[choose('model.attention', asked, IMPLEMENTATIONS)]
  obstacle = chosen.obstacle(case)
  if obstacle:
    raise UserError(
      f"model.attention = {asked!r} {obstacle}; 'auto' is what fits here,"
      f' {name("auto", case)!r}'
    )
  return asked


def _square(
  query_BLHA: jax.Array, key_BLGA: jax.Array, value_BLGA: jax.Array
) -> jax.Array:
  return jax.nn.dot_product_attention(
    query_BLHA, key_BLGA, value_BLGA, is_causal=True, implementation='xla'
  )


def _cudnn_obstacle(case: Case) -> str | None:
  if case.device.platform != 'gpu':
    return f'runs on NVIDIA GPUs, not on {case.device.platform}'
  version = kernels.capability(case.device)
  if version < (8, 0):
    has = getattr(case.device, 'compute_capability', 'none')
    return f'needs compute capability 8.0, and the device has {has}'
  if case.dtype not in (jnp.bfloat16, jnp.float16):
    return f'computes in 16 bits, and model.dtype comes to {case.dtype}'
  largest = 256 if version >= (9, 0) else 128
  if case.head_dim % 8 or case.head_dim > largest:
    return (
      f'takes head sizes that are multiples of 8 up to {largest}, not'
      f' {case.head_dim}'
    )
  return None


def _splash_obstacle(case: Case) -> str | None:
  if case.device.platform != 'tpu':
    return f'runs on TPUs, not on {case.device.platform}'
  return None


IMPLEMENTATIONS = {
  'xla': Implementation(lambda case: _square, lambda case: None),
  'blocks': Implementation(lambda case: causal.blocks, lambda case: None),
  'cudnn': Implementation(
    lambda case: kernels.sharded(kernels.cudnn, case.mesh), _cudnn_obstacle
  ),
  'splash': Implementation(
    lambda case: kernels.sharded(kernels.splash, case.mesh), _splash_obstacle
  ),
}
# Of those that are possible the first is taken.
_PREFERRED = ('cudnn', 'splash', 'blocks')
