"""Mixture-of-experts language models with recurrent and Cartesian routers.

Shapes are part of every name: `x_TD` is an array of shape [T, D]. The whole
project uses one legend of letters:

  B  sequences in a batch          T  tokens, B * L flattened
  L  sequence length               V  vocabulary
  D  hidden size                   F  feed-forward width
  H  query heads                   G  key/value heads
  A  head dimension                R  state size of the recurrent router
  N  experts (of one sub-layer)    K  experts chosen per token
  M  rows sorted by expert         C  rows of one expert (its capacity)
  X  what a gate or a cell reads   E  size of an expert embedding
  S  sub-layers of a layer         P  repetitions of the layer pattern's period
  J  groups of experts             O  outputs, where a layer has several kinds
  W  positions that a token sees   Q  queries computed together
     before it (`model.span`)
  U  devices that share the experts

A digit is that size itself: `gate_up_ND2F` is [N, D, 2, F]. Within
`shard_map` letters mean a device's own part: T its tokens, N the
experts that live there.

In these files a letter stands for something else:

  C  tokens whose logits are made together     `model.loss`
  C  slots of a cache of keys and values       `model.attention_cached`,
                                               `generation`
  J  blocks, segments of rows                  `experts.grouped_matmul`,
                                               `experts.permute`
  M  query heads of a group, times queries     `model.attention_blocks`
  N  after U, the experts of each device       `experts.row_exchange`,
                                               `experts.ragged_exchange`
  X  parts that a device's rows arrive in      the same
  P  points of a curve, W  MoE layers          `analysis.plots`, `.runs`,
                                               `training.metrics`
  W  routers, I  bins, C  classes of tokens    `analysis` else

As a library: `from moe_jax import layers, load`.
"""

import importlib
from typing import Any

__all__ = ['layers', 'load']


def __getattr__(name: str) -> Any:
  """Imports the library's names when they are used: `moe_jax` needs no jax."""
  if name == 'layers':
    return importlib.import_module('moe_jax.layers')
  if name == 'load':
    return importlib.import_module('moe_jax.pretrained').load
  raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
