"""From a config to a `Decoder`: here, once, strings become objects.

The blocks are made in `build_block`, the routers in `build_router`, and how
tokens meet experts on other devices in `build_exchange`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from moe_jax.config import head_dim, layer_kinds
from moe_jax.model import (
  build_attention,
  build_block,
  build_exchange,
  build_matmul,
  build_router,
  embedding,
)
from moe_jax.model.block import Period
from moe_jax.model.build_block import Parts
from moe_jax.model.decoder import Decoder
from moe_jax.parallel import mesh as mesh_lib


def build(
  config: ConfigDict,
  vocab_size: int,
  mesh: jax.sharding.Mesh | None,
  *,
  rngs: nnx.Rngs,
  disable_top: int = 0,
) -> Decoder:
  """Makes the model that a config describes.

  Args:
    config: validated by `moe_jax.config.validate`.
    vocab_size: V.
    mesh: where it will run; None for one device of the default platform.
    rngs: with the stream `params`.
    disable_top: experts left out of every choice; see `Select`.

  Returns:
    A `Decoder`; call under `jax.jit` or `jax.eval_shape`, as every parameter
    is made where this runs.
  """
  model = config.model
  kinds = layer_kinds(config)
  first, period = repetition(kinds, config.moe.every)
  dtype = compute_dtype(config, mesh)
  parts = Parts(
    config,
    vocab_size,
    build_exchange.dispatch(config, mesh, dtype),
    build_attention.attend(config, mesh, dtype),
    build_matmul.matmul(config, mesh),
    disable_top,
  )
  make_block = functools.partial(build_block.block, parts)

  def make_period(rngs: nnx.Rngs) -> Period:
    pattern = kinds[first : first + period]
    return Period([make_block(kind, rngs) for kind in pattern])

  periods, repeats = None, (len(kinds) - first) // period
  if repeats:
    stacked = nnx.vmap(make_period, in_axes=0, out_axes=0)
    periods = stacked(rngs.split(repeats))
  init = nnx.initializers.normal(model.init_std)
  embed_VD = nnx.Param(init(rngs.params(), (vocab_size, model.hidden_size)))
  head_DV = None
  if not model.tie_embeddings:
    head_DV = nnx.Param(init(rngs.params(), (model.hidden_size, vocab_size)))
  return Decoder(
    embed_VD,
    build_router.cell(config, rngs),
    Period([make_block(kind, rngs) for kind in kinds[:first]]),
    periods,
    build_block.norm(config) if model.norm_place == 'pre' else None,
    head_DV,
    head_bias_V=nnx.Param(jnp.zeros(vocab_size)) if model.head_bias else None,
    key_pe_AW=_key_pe(config, rngs),
    repeats=repeats,
    num_residual_logits=build_router.num_residual_logits(config),
    dtype=dtype,
    remat=model.remat,
    unroll=model.unroll,
    shard_tokens=functools.partial(mesh_lib.shard_tokens, mesh=mesh),
    look_up=functools.partial(embedding.look_up, mesh=mesh),
  )


def repetition(kinds: Sequence[str], every: int) -> tuple[int, int]:
  """Where a pattern of layers begins to repeat, and its period.

  Args:
    kinds: of every layer.
    every: the period, unless all layers are alike.

  Returns:
    The fewest leading layers without which the rest is whole repetitions.
  """
  period = every if len(set(kinds)) > 1 else 1

  def repeats(first: int) -> bool:
    rest = kinds[first:]
    return len(rest) % period == 0 and rest[period:] == rest[:-period]

  return next(f for f in range(len(kinds) + 1) if repeats(f)), period


def compute_dtype(
  config: ConfigDict, mesh: jax.sharding.Mesh | None
) -> jnp.dtype:
  """`model.dtype`; auto is bfloat16 where the device is good at it."""
  if config.model.dtype != 'auto':
    return jnp.dtype(config.model.dtype)
  devices = jax.devices() if mesh is None else mesh.devices.flat
  slow = next(iter(devices)).platform == 'cpu'
  return jnp.dtype(jnp.float32 if slow else jnp.bfloat16)


def _key_pe(config: ConfigDict, rngs: nnx.Rngs) -> nnx.Param | None:
  if config.model.positions != 'span':
    return None
  shape = head_dim(config), config.model.span
  return nnx.Param(jax.random.normal(rngs.params(), shape))  # as released
