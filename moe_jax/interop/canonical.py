"""What a config means for the function that its model computes.

Formats of other programs say a part of what a config of ours can: `CANONICAL`
has the rest, with values by which a model is like a Llama. Configs of the same
function have the same meaning.
"""

from typing import Any

from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.config.schema import KEYS

_SECTIONS = ('router', 'moe', 'model')

# Where a Llama-like model has other values than the defaults; sizes stand for
# those that a format says.
_LLAMA = {
  'model': {
    'num_layers': 1,
    'hidden_size': 2,
    'num_heads': 1,
    'num_kv_heads': 1,
    'ffn_width': 1,
    'vocab_size': 1,
    'dtype': 'float32',
  },
  'moe': {
    'num_experts': 0,
    'top_k': 1,
    'expert_width': 1,
    'capacity_factor': 1.0,
  },
  'router': {'mlp_width': 1, 'reduced_size': 1, 'state_size': 1},
  # As the released code computes it.
  'loss': {'balance_weight': 0.0, 'balance_layers': 'joined'},
}


def _canonical() -> dict[str, Any]:
  """Returns values with which no key changes a Llama-like model."""
  defaults = config_lib.get_config().to_dict()
  return {name: defaults[name] | values for name, values in _LLAMA.items()}


CANONICAL = _canonical()

# A key that makes others idle comes before them.
_COMPARED = [
  name
  for section in _SECTIONS
  for name in KEYS
  if name.split('.')[0] == section
]

# How a model is trained or computed, not what it computes: free in every
# comparison. The places of the MoE layers are compared as one key, `layers`.
_FREE = [name for name in _COMPARED if not KEYS[name].function] + [
  'moe.every',
  'moe.offset',
  'moe.first_dense',
]


def config_of(**sections: dict[str, Any]) -> ConfigDict:
  """Returns a locked config: `CANONICAL`, and what the sections say instead."""
  config = ConfigDict(CANONICAL)
  config.update(sections)
  return config.lock()


def meaning(config: ConfigDict) -> dict[str, Any]:
  """Returns values by dotted key, equal for configs of the same function.

  A key that the model does not read, because another one says so, has its
  value of `CANONICAL`. The places of the MoE layers are the key `layers`, and
  what `moe.renormalize` does is part of `router.weights`.
  """
  kinds = config_lib.layer_kinds(config)
  canonical = config_lib.flatten(CANONICAL)
  flat = {key: config_lib.get(config, key) for key in _COMPARED}
  flat['model.head_dim'] = config_lib.head_dim(config)
  for key in _unread(config, kinds):
    flat[key] = canonical[key]
  flat['router.passing'] = flat['router.passing'].replace('detached', 'state')
  lone = flat['router.selection'] == 'top_k' and flat['moe.top_k'] == 1
  renormalize = flat.pop('moe.renormalize') and not lone
  if renormalize:
    weights = flat['router.weights']
    # e^a / sum e^a over the chosen, both.
    same = weights.replace('softmax', 'chosen')
    flat['router.weights'] = same if same == 'chosen' else f'{same}, to sum 1'
  return {'layers': ' '.join(kinds)} | flat


def _unread(config: ConfigDict, kinds: tuple[str, ...]) -> list[str]:
  """Returns the keys that are idle for what other keys say."""
  unread = [key for key in _COMPARED if not config_lib.is_read(config, key)]
  if 'dense' not in kinds:
    unread.append('model.ffn_width')
  if 'moe' not in kinds:
    unread += [key for key in _COMPARED if not key.startswith('model.')]
  if config.router.groups == config.router.top_groups:
    unread += ['router.groups', 'router.top_groups']
  return unread + _FREE
