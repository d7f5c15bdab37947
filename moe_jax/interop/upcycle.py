"""Mixture-of-Experts parameters that begin as a trained dense model.

Every expert gets the dense feed-forward network, or where it is narrower one of
the G parts into which the network's hidden units are cut; an expert that is
wider keeps its own random units, whose down projection starts at 0. This is
sparse upcycling (arXiv 2212.05055) with the virtual groups of arXiv 2410.07524:
experts stand in groups of G that hold the parts of one copy, and start with
equal scores, so a token chooses whole copies.

In a layer of several MoE sub-layers the first is the dense network and the
others start with an output of 0: `x + A(norm x) + B(...)` equals the dense
`x + FFN(norm x)` for no other B, as B reads what A has changed.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.interop import canonical, mapping

Layers = dict[mapping.LayerPath, np.ndarray]


class Shares(NamedTuple):
  """How the networks of a sub-layer add up to the dense one.

  Attributes:
    parts: G, the number of parts of a copy.
    routed_F: The factors of the hidden units of routed experts.
    shared_F: The factors of those of the shared expert; 0 beyond its width.
    routed_bias: The factor of the routed experts' output bias.
    shared_bias: The factor of the shared expert's output bias.
  """

  parts: int
  routed_F: np.ndarray
  shared_F: np.ndarray
  routed_bias: float
  shared_bias: float


def upcycle(
  dense_config: ConfigDict,
  dense_params: Mapping[mapping.Path, np.ndarray],
  config: ConfigDict,
  fresh_params: Mapping[mapping.Path, np.ndarray],
) -> dict[mapping.Path, np.ndarray]:
  """Returns parameters of `config` that compute what the dense model does.

  Args:
    dense_config: The config of a model without experts.
    dense_params: The parameters of that model, flat as in `mapping`.
    config: The config of the model to make; with experts, else alike.
    fresh_params: The parameters of that model as they are initialised, flat;
      what is new keeps them.

  Raises:
    UserError: The two models differ in more than their experts.
  """
  _check_alike(dense_config, config)
  shares = _shares(config, dense_config.model.ffn_width)
  dense = mapping.by_layer(dense_params)
  layers = {
    path: _parameter(path, array, dense, config, shares)
    for path, array in mapping.by_layer(fresh_params).items()
  }
  shapes = {path: array.shape for path, array in fresh_params.items()}
  return mapping.stack_layers(layers, shapes)


def inexact(config: ConfigDict, ffn_width: int) -> list[str]:
  """Returns why `config` does not start as exactly the dense model, if so.

  Args:
    config: The config of the model with experts.
    ffn_width: The width F of the dense model's networks.
  """
  moe, router = config.moe, config.router
  parts, total = _parts(config, ffn_width), _weights_total(config)
  reasons = []
  if total is not None:
    reasons.append(
      f'the weights of the chosen experts do not sum to 1 (router.weights ='
      f' {router.weights!r}, moe.renormalize = {moe.renormalize}, moe.top_k ='
      f' {moe.top_k}); outputs are scaled as if they summed to {total:g}'
    )
  if parts > 1 and not _in_groups(config, parts):
    reasons.append(
      f'a copy of the dense network is {parts} experts, and moe.top_k ='
      f' {moe.top_k} of moe.num_experts = {moe.num_experts} are not whole'
      ' copies for every token'
    )
  if moe.factors > 1 and config.model.norm_place == 'post':
    reasons.append(
      "with model.norm_place = 'post' a second sub-layer normalises what the"
      ' first has, even if it adds nothing'
    )
  if moe.dispatch == 'capacity':
    reasons.append("moe.dispatch = 'capacity' may drop rows of full experts")
  return reasons


def _check_alike(dense_config: ConfigDict, config: ConfigDict) -> None:
  """Refuses two models that differ in more than their experts."""
  ours, theirs = canonical.meaning(config), canonical.meaning(dense_config)
  if 'moe' in theirs['layers']:
    raise UserError('--dense has experts already; give a model without')
  kinds = config_lib.layer_kinds(config)
  if 'moe' not in kinds:
    raise UserError('moe.num_experts = 0: --config describes a dense model too')
  if 'dense' not in kinds:
    ours['model.ffn_width'] = theirs['model.ffn_width']
  for key in theirs:
    if key.startswith('model.') and ours[key] != theirs[key]:
      raise UserError(
        f'{key} = {ours[key]!r}, but the dense model has {theirs[key]!r};'
        f' --config.{key}={theirs[key]} takes its value'
      )


def _parts(config: ConfigDict, ffn_width: int) -> int:
  """Returns G, how many experts together are as wide as the network."""
  return math.ceil(ffn_width / (config.moe.expert_width // config.moe.factors))


def _in_groups(config: ConfigDict, parts: int) -> bool:
  """Returns whether every token can choose nothing but whole groups."""
  moe, router = config.moe, config.router
  counts = [moe.num_experts // router.groups, moe.top_k]
  whole = all(count % parts == 0 for count in counts)
  return router.selection == 'top_k' and whole


def _weights_total(config: ConfigDict) -> float | None:
  """Returns what a token's weights sum to with equal scores; None for 1."""
  moe, router = config.moe, config.router
  top_k = router.selection == 'top_k'
  lone = top_k and moe.top_k == 1
  if router.weights == 'chosen' or (moe.renormalize and not lone):
    return None
  if router.weights == 'sigmoid':
    return moe.top_k / 2
  needed = math.floor(router.top_p * moe.num_experts) + 1
  return (moe.top_k if top_k else needed) / moe.num_experts


def _shares(config: ConfigDict, ffn_width: int) -> Shares:
  """Returns shares in which units that both kinds have come from both alike."""
  a, b = _mixing_weights(config)
  shared = config.moe.shared
  covered_F = np.arange(ffn_width) < shared.width // config.moe.factors
  if a + b == 0 or (a == 0 and not covered_F.all()):
    raise UserError(
      f'moe.shared.routed_weight = {a} and moe.shared.shared_weight = {b}'
      f' leave no way for the {ffn_width} hidden units of the dense model'
    )
  parts, total = _parts(config, ffn_width), _weights_total(config) or 1.0
  alone = 1 / a if a else 0.0
  routed_F = np.where(covered_F, 1 / (a + b), alone)
  bias = 1 / (a + b) if shared.width else alone
  return Shares(
    parts,
    routed_F * parts / total,
    np.where(covered_F, shared.parts / (a + b), 0.0),
    bias / total,
    bias * shared.parts,
  )


def _mixing_weights(config: ConfigDict) -> tuple[float, float]:
  """Returns the weights of the routed and the shared output, at the start."""
  shared = config.moe.shared
  if not shared.width:
    return 1.0, 0.0
  return {
    'sum': (1.0, 1.0),
    'fixed': (shared.routed_weight, shared.shared_weight),
    'coefficient': (0.5, 0.5),  # of zero logits; any, if both are the whole
  }[shared.mixing]


def _parameter(
  path: mapping.LayerPath,
  fresh: np.ndarray,
  dense: Layers,
  config: ConfigDict,
  shares: Shares,
) -> np.ndarray:
  """Returns what one parameter starts as."""
  if path[0] == 'cell':
    return fresh
  if path[2:4] == ('chain', 'norms') and path[4] != 0:
    if config.model.norm_place == 'post':
      return fresh
    return dense[(*path[:4], 0, *path[5:])]
  if path[2:4] != ('chain', 'sub_layers') or path[5] == 'feed_forward':
    return dense[path]
  network = {
    str(leaf[-1]): array
    for leaf, array in dense.items()
    if leaf[:2] == path[:2] and leaf[-2] == 'feed_forward'
  }
  kind, name = str(path[5]), str(path[-1])
  make = {
    'experts': _experts,
    'shared': _shared,
    'router': _scores,
    'select': _scores,
    'mixing': _mixing,
    'bias_D': lambda *_: np.zeros_like(fresh),
  }[kind]
  parameter = make(name, fresh, network, shares)
  silent = path[4] != 0 and name.startswith('down')
  return parameter * 0 if silent else parameter


def _experts(
  name: str, fresh: np.ndarray, network: Mapping[str, np.ndarray], s: Shares
) -> np.ndarray:
  """Returns experts of which number n has part n mod G of the network."""
  stem, axes = name.rsplit('_', 1)
  ours = f'{stem}_{axes.replace("N", "")}'
  part = [n % s.parts for n in range(len(fresh))]
  return np.stack(
    [
      _cut(ours, new, network[ours], g, s.routed_F, s.routed_bias)
      for new, g in zip(fresh, part, strict=True)
    ]
  )


def _shared(
  name: str, fresh: np.ndarray, network: Mapping[str, np.ndarray], s: Shares
) -> np.ndarray:
  """Returns the network's first hidden units, as many as there is room for."""
  return _cut(name, fresh, network[name], 0, s.shared_F, s.shared_bias)


def _cut(
  name: str,
  fresh: np.ndarray,
  whole: np.ndarray,
  part: int,
  scale_F: np.ndarray,
  bias_scale: float,
) -> np.ndarray:
  """Returns one part of a network's parameter, as wide as `fresh`."""
  axes = name.rsplit('_', 1)[1]
  if 'F' not in axes:
    return (whole * bias_scale).astype(fresh.dtype)
  cut = np.moveaxis(np.array(fresh), axes.index('F'), 0)
  units = np.moveaxis(whole, axes.index('F'), 0)
  if name.startswith('down'):
    cut[:] = 0  # so that units beyond the network add nothing
    units = units * scale_F.reshape(-1, *[1] * (units.ndim - 1))
  taken = units[part * len(cut) : (part + 1) * len(cut)]
  cut[: len(taken)] = taken
  return np.moveaxis(cut, 0, axes.index('F'))


def _scores(
  name: str, fresh: np.ndarray, network: Mapping[str, np.ndarray], s: Shares
) -> np.ndarray:
  """Returns scores by which the experts of a group are alike: as its first."""
  del network
  axis = name.rsplit('_', 1)[1].find('N')
  if axis < 0:
    return fresh
  firsts = np.arange(fresh.shape[axis]) // s.parts * s.parts
  return fresh.take(firsts, axis)


def _mixing(
  name: str, fresh: np.ndarray, network: Mapping[str, np.ndarray], s: Shares
) -> np.ndarray:
  """Returns one half each, unless both are the whole network: any will do."""
  del name, network
  return fresh if s.shared_F.all() else np.zeros_like(fresh)
