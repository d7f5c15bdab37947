"""From a config to the blocks of a model, and to their norms."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from moe_jax.config import head_dim
from moe_jax.errors import choose
from moe_jax.experts.cartesian import (
  Chain,
  Norm,
  PostNormChain,
  SubLayer,
)
from moe_jax.experts.dispatch import Dispatch
from moe_jax.experts.grouped_matmul import GroupedMatmul
from moe_jax.experts.mlp import (
  DenseLayer,
  ReLUExperts,
  ReLUMLP,
  SwiGLU,
  SwiGLUExperts,
)
from moe_jax.experts.moe import (
  CoefficientMixing,
  FixedMixing,
  Mixing,
  MoELayer,
  SumMixing,
)
from moe_jax.model import build_router
from moe_jax.model.attention import Attend, Attention
from moe_jax.model.block import Block, PostNormBlock
from moe_jax.model.layers import LayerNorm, RMSNorm

NORMS = {'rms': RMSNorm, 'layer': LayerNorm}

# Of the dense and shared feed-forward, and of the bank of experts.
FEED_FORWARDS = {
  'swiglu': (SwiGLU, SwiGLUExperts),
  'relu': (ReLUMLP, ReLUExperts),
}

MIXINGS = {
  'sum': lambda config, rngs: SumMixing(),
  'fixed': lambda config, rngs: FixedMixing(
    config.moe.shared.routed_weight, config.moe.shared.shared_weight
  ),
  'coefficient': lambda config, rngs: CoefficientMixing(
    config.model.hidden_size, init_std=config.model.init_std, rngs=rngs
  ),
}


class Parts(NamedTuple):
  """What every block of a model is made of.

  Attributes:
    config: the whole config.
    vocab_size: V.
    dispatch: of all MoE layers.
    attend: of all layers.
    multiply: the grouped matmul of all banks of experts.
    disable_top: experts left out of every choice; see `Select`.
  """

  config: ConfigDict
  vocab_size: int
  dispatch: Dispatch
  attend: Attend
  multiply: GroupedMatmul
  disable_top: int


def block(parts: Parts, kind: str, rngs: nnx.Rngs) -> Block:
  """A layer of that kind, 'moe' or 'dense'."""
  config, model = parts.config, parts.config.model
  attention = Attention(
    model.hidden_size,
    model.num_heads,
    model.num_kv_heads,
    head_dim(config),
    attend=parts.attend,
    init_std=model.init_std,
    rngs=rngs,
  )
  make = {'moe': _moe_sub_layers, 'dense': _dense_sub_layers}[kind]
  sub_layers = make(parts, rngs)
  norms = [norm(config) for _ in sub_layers]
  place = {'pre': _pre_norm, 'post': _post_norm}[model.norm_place]
  return place(config, attention, norms, sub_layers)


def norm(config: ConfigDict) -> Norm:
  """Of the model's kind, over its hidden size."""
  return NORMS[config.model.norm](
    config.model.hidden_size, config.model.norm_epsilon
  )


def _pre_norm(
  config: ConfigDict,
  attention: Attention,
  norms: Sequence[Norm],
  sub_layers: Sequence[SubLayer],
) -> Block:
  return Block(norm(config), attention, Chain(norms, sub_layers))


def _post_norm(
  config: ConfigDict,
  attention: Attention,
  norms: Sequence[Norm],
  sub_layers: Sequence[SubLayer],
) -> Block:
  chain = PostNormChain(norms, sub_layers)
  return PostNormBlock(norm(config), attention, chain, norm(config))


def _dense_sub_layers(parts: Parts, rngs: nnx.Rngs) -> list[SubLayer]:
  model = parts.config.model
  feed_forward, _ = FEED_FORWARDS[model.activation]
  dense = feed_forward(
    model.hidden_size,
    model.ffn_width,
    init_std=model.init_std,
    rngs=rngs,
    dropout=model.dropout,
  )
  return [DenseLayer(dense, model.dropout)]


def _moe_sub_layers(parts: Parts, rngs: nnx.Rngs) -> list[SubLayer]:
  """One MoE sub-layer per factor; all together cost what one would."""
  config, moe, model = parts.config, parts.config.moe, parts.config.model

  def sub_layer(place: int) -> MoELayer:
    _, bank = FEED_FORWARDS[model.activation]
    experts = bank(
      moe.num_experts,
      model.hidden_size,
      moe.expert_width // moe.factors,
      init_std=model.init_std,
      rngs=rngs,
      dropout=model.dropout,
      multiply=parts.multiply,
    )
    shared, mixing = _shared(config, rngs)
    bias_D = nnx.Param(jnp.zeros((model.hidden_size,))) if moe.bias else None
    return MoELayer(
      build_router.router(config, parts.vocab_size, place, rngs=rngs),
      build_router.select(config, parts.disable_top),
      parts.dispatch,
      experts,
      shared=shared,
      shared_parts=moe.shared.parts,
      mixing=mixing,
      bias_D=bias_D,
      dropout=model.dropout,
    )

  return [sub_layer(place) for place in range(moe.factors)]


def _shared(
  config: ConfigDict, rngs: nnx.Rngs
) -> tuple[nnx.Module | None, Mixing | None]:
  shared = config.moe.shared
  if not shared.width:
    return None, None
  feed_forward, _ = FEED_FORWARDS[config.model.activation]
  expert = feed_forward(
    config.model.hidden_size,
    shared.width // config.moe.factors,
    init_std=config.model.init_std,
    rngs=rngs,
    dropout=config.model.dropout,
  )
  name = choose('moe.shared.mixing', shared.mixing, MIXINGS)
  return expert, MIXINGS[name](config, rngs)
