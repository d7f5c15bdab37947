"""The MoE keys of the two released formats, as our sections `moe` and `router`.

Sources: llama_moe_rnn/ of qiuzh20/RMoE, and transformers/models/llama/ of
suu990901/CartesianMoE.
"""

from typing import Any

from moe_jax.interop.released_keys import Keys

Sections = tuple[dict[str, Any], dict[str, Any]]

RMOE_DEFAULTS = {
  'moe_expert_intermediate_size': None,
  'add_moe_share_expert': False,
  'moe_share_expert_intermediate_size': None,
  'moe_weight': 0.5,
  'share_weight': 0.5,
  'add_moe_bias': False,
}
CARTESIAN_DEFAULTS = {
  'use_moe': True,
  'initial_moe_layer': 1,
  'interleave_moe_layer': False,
  'expert_interval': 2,
  'c2_fine_grain': False,
  'fine_grain': False,
  'use_residual': False,
  'moe_grained': 'full',
  'moe_scale': None,
}


def rmoe(keys: Keys) -> Sections:
  """The sections `moe` and `router` of an RMoE checkpoint."""
  layers = keys.integer('num_hidden_layers')
  moe_layers = keys.integer('moe_num_layers')
  if moe_layers > layers:
    raise keys.fail(
      'moe_num_layers', f'must be at most num_hidden_layers = {layers}'
    )
  if keys['moe_router_type'] == 'rnn':
    raise keys.fail(
      'moe_router_type', 'is not supported (supported: "gru" and linear)'
    )
  num_experts = keys.integer('num_local_experts')
  shared = keys.size('moe_share_expert_intermediate_size', 'intermediate_size')
  moe = {
    'num_experts': num_experts,
    # The released code divides even a single weight by itself: 1, always.
    'top_k': keys.integer('num_experts_per_tok', 2, num_experts),
    'expert_width': keys.size(
      'moe_expert_intermediate_size', 'intermediate_size'
    ),
    'factors': 1,
    'every': 1,
    'first_dense': layers - moe_layers,
    'bias': keys.flag('add_moe_bias'),
    'shared': {
      'width': shared if keys.flag('add_moe_share_expert') else 0,
      'mixing': 'fixed',
      'routed_weight': keys.number('moe_weight'),
      'shared_weight': keys.number('share_weight'),
    },
  }
  if keys['moe_router_type'] == 'gru':
    size = keys.integer('moe_router_rnn_hidden_size')
    return moe, {'recurrent': 'gru', 'state_size': size}
  return moe, {'recurrent': 'none', 'state_size': 1}


def cartesian(keys: Keys) -> Sections:
  """The sections `moe` and `router` of a checkpoint of CartesianMoE's code."""
  keys.only('rope_theta', 10_000.0)  # the released code knows no other
  keys.only('num_key_value_heads', None, keys['num_attention_heads'])
  keys.only('moe_grained', 'full')
  keys.only('moe_scale', None)
  num_experts = keys.integer('num_experts')
  if num_experts == 1 or not keys.flag('use_moe'):
    num_experts = 0  # both are dense in the released code
  # Whatever the grain level, its Cartesian layer has two sub-layers.
  factors = 2 if keys.flag('c2_fine_grain') else 1
  width = factors * _sub_layer_width(keys)
  moe = {
    'num_experts': num_experts,
    'top_k': keys.integer('moe_top_k', 1, num_experts or None),
    'expert_width': width,
    'factors': factors,
    'bias': False,
    'shared': {
      'width': width if keys.flag('use_residual') else 0,
      'mixing': 'coefficient',
      'routed_weight': 0.5,
      'shared_weight': 0.5,
    },
  }
  return moe | _placement(keys), {'recurrent': 'none', 'state_size': 1}


def _sub_layer_width(keys: Keys) -> int:
  """The width of one network of a layer or sub-layer."""
  width = keys.integer('intermediate_size')
  if not keys.flag('fine_grain') and not keys['c2_fine_grain']:
    return width
  if keys.flag('use_residual') and not keys['c2_fine_grain']:
    # There the shared expert is the mean of two networks.
    raise keys.fail(
      'use_residual', 'is not supported with fine_grain = true alone'
    )
  return width // keys.integer('grain_level', 1, width)


def _placement(keys: Keys) -> dict[str, int]:
  """Which layers have experts: all from one on, or every n-th from the first.

  A first layer that is not negative goes before the interval.
  """
  first = keys.integer('initial_moe_layer', least=None)
  if first >= 0:
    return {'first_dense': first, 'every': 1}
  if keys.flag('use_moe'):
    keys.only('interleave_moe_layer', True)
  return {'first_dense': 0, 'every': keys.integer('expert_interval')}
