"""What a config means for the function that its model computes.

Formats of other programs say a part of what a config of ours can: `NEUTRAL` is
the rest. The key sets are those of `configs/base.py`, and a test holds them so.
"""

from typing import Any

from ml_collections import ConfigDict

from moe_jax import config as config_lib

# Values with which a key changes nothing about a Llama-like model.
NEUTRAL = {
  'model': {
    'num_layers': 1,
    'hidden_size': 2,
    'num_heads': 1,
    'num_kv_heads': 1,
    'head_dim': 0,
    'ffn_width': 1,
    'vocab_size': 1,
    'rope_theta': 10_000.0,
    'norm': 'rms',
    'norm_place': 'pre',
    'norm_epsilon': 1e-6,
    'positions': 'rotary',
    'attention': 'auto',
    'span': 0,
    'activation': 'swiglu',
    'dropout': 0.0,
    'head_bias': False,
    'tie_embeddings': False,
    'init_std': 0.02,
    'dtype': 'float32',
    'remat': 'none',
    'unroll': 1,
    'idle_parameters': 0,
  },
  'moe': {
    'num_experts': 0,
    'factors': 1,
    'top_k': 1,
    'expert_width': 1,
    'every': 1,
    'offset': 0,
    'first_dense': 0,
    'renormalize': True,
    'dispatch': 'dropless',
    'capacity_factor': 1.0,
    'priority': 'position',
    'grouped_matmul': 'auto',
    'exchange': 'auto',
    'buffer_factor': 2.0,
    'bias': False,
    'shared': {
      'width': 0,
      'parts': 1,
      'mixing': 'sum',
      'routed_weight': 0.5,
      'shared_weight': 0.5,
    },
  },
  'router': {
    'score': 'linear',
    'bias': False,
    'mlp_width': 1,
    'reduced_size': 1,
    'recurrent': 'none',
    'state_size': 1,
    'projector': 'layerwise',
    'passing': 'state',
    'residual': 0.0,
    'residual_detached': False,
    'jitter': 0.0,
    'selection': 'top_k',
    'top_p': 0.4,
    'weights': 'softmax',
    'groups': 1,
    'top_groups': 1,
  },
  'loss': {
    'balance_weight': 0.0,
    'balance_layers': 'joined',  # as the released code computes it
    'balance_scope': 'micro_batch',
    'bias_rate': 0.0,
    'z_weight': 0.0,
  },
}

# How it is trained or computed, not what: free in every comparison.
_FREE = """model.attention model.dropout model.init_std model.dtype model.remat
model.unroll model.idle_parameters moe.dispatch moe.capacity_factor moe.priority
moe.grouped_matmul moe.exchange moe.buffer_factor moe.every moe.offset
moe.first_dense router.residual_detached router.jitter""".split()


def config_of(**sections: dict[str, Any]) -> ConfigDict:
  """A locked config: `NEUTRAL` with what the sections say instead."""
  config = ConfigDict(NEUTRAL)
  config.update(sections)
  return config.lock()


def meaning(config: ConfigDict) -> dict[str, Any]:
  """Dotted keys and values; equal for configs of the same function.

  A key that the model does not read, because another one says so, has its
  value of `NEUTRAL`. The places of the MoE layers are the key `layers`, and
  what `moe.renormalize` does is part of `router.weights`.
  """
  kinds = config_lib.layer_kinds(config)
  neutral = config_lib.flatten({name: NEUTRAL[name] for name in _SECTIONS})
  # In this order: a key that makes others idle comes before them.
  flat = {key: config_lib.get(config, key) for key in neutral}
  flat['model.head_dim'] = config_lib.head_dim(config)
  for key in _unread(config, kinds):
    flat[key] = neutral[key]
  flat['router.passing'] = flat['router.passing'].replace('detached', 'state')
  lone = flat['router.selection'] == 'top_k' and flat['moe.top_k'] == 1
  renormalize = flat.pop('moe.renormalize') and not lone
  if renormalize:
    weights = flat['router.weights']
    # e^a / sum e^a over the chosen, both.
    same = weights.replace('softmax', 'chosen')
    flat['router.weights'] = same if same == 'chosen' else f'{same}, to sum 1'
  return {'layers': ' '.join(kinds)} | flat


_SECTIONS = ('router', 'moe', 'model')


def _unread(config: ConfigDict, kinds: tuple[str, ...]) -> list[str]:
  """Keys of the sections that another key makes idle."""
  moe, router = config.moe, config.router
  of_shared = [f'moe.shared.{key}' for key in NEUTRAL['moe']['shared']]
  of_moe = config_lib.flatten(
    {'moe': NEUTRAL['moe'], 'router': NEUTRAL['router']}
  )
  rules = {
    'model.ffn_width': 'dense' not in kinds,
    'model.rope_theta': config.model.positions != 'rotary',
    'model.span': config.model.positions != 'span',
    'moe.top_k': router.selection != 'top_k',
    'moe.shared.routed_weight': moe.shared.mixing != 'fixed',
    'moe.shared.shared_weight': moe.shared.mixing != 'fixed',
    'router.top_p': router.selection != 'top_p',
    'router.bias': router.score not in ('linear', 'mlp', 'hyper'),
    'router.mlp_width': router.score not in ('mlp', 'hyper'),
    'router.reduced_size': router.score != 'xmoe',
    'router.state_size': router.recurrent == 'none',
    'router.projector': router.recurrent == 'none',
    'router.passing': router.recurrent == 'none',
    'router.groups': router.groups == router.top_groups,
    'router.top_groups': router.groups == router.top_groups,
  }
  unread = [key for key, idle in rules.items() if idle] + _FREE
  if not moe.shared.width:
    unread += of_shared
  if router.score == 'hash':  # reads token ids alone
    unread += ['router.recurrent', 'router.state_size', 'router.projector']
    unread += ['router.passing']
  if 'moe' not in kinds:
    unread += list(of_moe)
  return unread
