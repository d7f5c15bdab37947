"""The format of CartesianMoE's released code: its keys and its tensors.

Source: transformers/models/llama/ of suu990901/CartesianMoE. Beside the
Cartesian layer it has every baseline of the paper: dense, conventional with
and without a shared expert, fine-grained, TopP and Hash.
"""

from typing import Any

from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.interop.formats import base
from moe_jax.interop.formats.base import Keys
from moe_jax.interop.mapping import Rules, feed_forward

# Any of these in a config.json of model_type llama says that it is this format.
SIGNS = ('c2_fine_grain', 'moe_grained', 'grain_level')
DEFAULTS = base.DEFAULTS | {
  'use_moe': True,
  'initial_moe_layer': 1,
  'interleave_moe_layer': False,
  'expert_interval': 2,
  'moe_top_k': 1,
  'num_experts': 8,
  'c2_fine_grain': False,
  'fine_grain': False,
  'use_residual': False,
  'moe_grained': 'full',
  'moe_scale': None,
}
# Values of moe_top_k that stand for another routing; 0 and below is TopP.
_HASH, _TOP_P = -2, 0
_HASH_TOP_K, _TOP_P_PROBABILITY = 2, 0.4  # constants of the released code
_ROPE_THETA = 10_000.0  # the released code knows no other


def recognises(values: dict[str, Any]) -> bool:
  """Returns whether the values of a `config.json` are of this format."""
  signs = any(key in values for key in SIGNS)
  return values.get('model_type') == 'llama' and signs


def read(keys: Keys) -> dict[str, dict[str, Any]]:
  """Returns our sections `model`, `moe` and `router`."""
  keys.only('rope_theta', _ROPE_THETA)
  keys.only('num_key_value_heads', None, keys['num_attention_heads'])
  keys.only('head_dim', None)
  keys.only('moe_grained', 'full')
  keys.only('moe_scale', None)
  num_experts = keys.integer('num_experts')
  if num_experts == 1 or not keys.flag('use_moe'):
    num_experts = 0  # both are dense in the released code
  # Whatever the grain level, its Cartesian layer has two sub-layers.
  factors = 2 if keys.flag('c2_fine_grain') else 1
  parts = 2 if keys.flag('fine_grain') and factors == 1 else 1
  width = factors * _sub_layer_width(keys)
  moe = {
    'num_experts': num_experts,
    'expert_width': width,
    'factors': factors,
    'shared': {
      'width': width * parts if keys.flag('use_residual') else 0,
      'parts': parts,
      'mixing': 'coefficient',
    },
  }
  top_k, router = _routing(keys, num_experts, factors)
  return {
    'model': base.read(keys),
    'moe': moe | _placement(keys) | top_k,
    'router': router,
  }


def _routing(
  keys: Keys, num_experts: int, factors: int
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the keys of `moe` and of `router` that `moe_top_k` means."""
  top_k = keys.integer('moe_top_k', None, num_experts or None)
  if top_k > 0 or not num_experts:
    return {'top_k': max(top_k, 1)}, {}
  if factors > 1:
    raise keys.fail('moe_top_k', 'must be at least 1 with c2_fine_grain = true')
  if top_k == _HASH:
    return {'top_k': _HASH_TOP_K}, {'score': 'hash'}
  # The probabilities that it keeps are the weights as they are.
  return {'renormalize': False}, {
    'selection': 'top_p',
    'top_p': _TOP_P_PROBABILITY,
  }


def _sub_layer_width(keys: Keys) -> int:
  """Returns the width of one network of a layer or sub-layer."""
  width = keys.integer('intermediate_size')
  if not keys.flag('fine_grain') and not keys['c2_fine_grain']:
    return width
  return width // keys.integer('grain_level', 1, width)


def _placement(keys: Keys) -> dict[str, int]:
  """Returns which layers have experts: all from one on, or every n-th.

  Every n-th counts from the first layer on. A first layer that is not
  negative goes before the interval.
  """
  first = keys.integer('initial_moe_layer', least=None)
  if first >= 0:
    return {'first_dense': first, 'every': 1}
  if keys.flag('use_moe'):
    keys.only('interleave_moe_layer', True)
  return {'first_dense': 0, 'every': keys.integer('expert_interval')}


def write(config: ConfigDict) -> dict[str, Any]:
  """Returns a `config.json`; what it cannot say, the caller finds.

  Raises:
    UserError: The released code has no such widths or places of MoE layers.
  """
  moe, kinds = config.moe, config_lib.layer_kinds(config)
  routed = 'moe' in kinds
  values = base.write(config) | {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'use_moe': routed,
    'num_experts': moe.num_experts if routed else 1,
    'moe_top_k': _written_top_k(config),
    'moe_grained': 'full',
    'moe_scale': None,
    'c2_fine_grain': routed and moe.factors > 1,
    'use_residual': routed and moe.shared.width > 0,
  }
  for key in ('rope_theta', 'num_key_value_heads'):
    del values[key]
  return values | _written_places(kinds) | _written_widths(config, kinds)


def _written_top_k(config: ConfigDict) -> int:
  if config.router.score == 'hash':
    return _HASH
  return _TOP_P if config.router.selection == 'top_p' else config.moe.top_k


def _written_places(kinds: tuple[str, ...]) -> dict[str, Any]:
  """Returns the keys for which `_placement` gives these kinds."""
  layers = [layer for layer, kind in enumerate(kinds) if kind == 'moe']
  first = layers[0] if layers else len(kinds)
  interval = layers[1] - first if len(layers) > 1 else len(kinds)
  if first == 0 and layers == list(range(0, len(kinds), interval)):
    places = {'initial_moe_layer': -1, 'interleave_moe_layer': True}
    return places | {'expert_interval': interval}
  if layers == list(range(first, len(kinds))):
    places = {'initial_moe_layer': first, 'interleave_moe_layer': False}
    return places | {'expert_interval': 1}
  raise UserError(
    f'MoE in layers {", ".join(map(str, layers))} of {len(kinds)}: the format'
    " 'cartesian' has it in every n-th layer from the first or in all from"
    ' one on; see moe.every, moe.offset and moe.first_dense'
  )


def _written_widths(
  config: ConfigDict, kinds: tuple[str, ...]
) -> dict[str, Any]:
  """Returns the keys for which the widths of all networks are ours."""
  moe = config.moe
  fine = {'fine_grain': False, 'grain_level': 2}
  if 'moe' not in kinds:
    return {'intermediate_size': config.model.ffn_width} | fine
  width = moe.expert_width // moe.factors
  divided = moe.factors > 1 or moe.shared.parts > 1
  # Without a dense layer model.ffn_width is free.
  dense = config.model.ffn_width if 'dense' in kinds else width
  if divided and 'dense' not in kinds:
    dense = 2 * width
  grain_level = max(dense // width, 1)
  if dense // grain_level != width:
    raise UserError(
      f'model.ffn_width = {dense} and networks of width {width} in the MoE'
      " layers: the format 'cartesian' divides the one by a whole number to"
      ' get the other'
    )
  fine['fine_grain'] = moe.factors == 1 and (
    moe.shared.parts > 1 or dense != width
  )
  return {'intermediate_size': dense} | fine | {'grain_level': grain_level}


def rules(config: ConfigDict) -> Rules:
  """Returns where our parameters stand; see `mapping`."""
  table = {'block/chain/norms/1/scale_D': ('D->D', 'mlp_layernorm.weight')}
  # The release numbers its two sub-layers, and a conventional layer not at all.
  for s, suffix in enumerate(('',) if config.moe.factors == 1 else ('0', '1')):
    sub = f'block/chain/sub_layers/{s}'
    experts = f'mlp{suffix}.{{*}}.'
    table |= {
      f'{sub}/router/score/weight_XN': ('NX->XN', f'wg{suffix}.weight'),
      f'{sub}/experts/gate_up_ND2F': (
        'NgFD->NDgF',
        experts + '{gate_proj|up_proj}.weight',
      ),
      f'{sub}/experts/down_NFD': ('NDF->NFD', experts + 'down_proj.weight'),
      f'{sub}/mixing/coefficient_D2': (
        'cD->Dc',
        f'coefficient{suffix}.weight',
      ),
      f'{sub}/mixing/bias_2': ('c->c', f'coefficient{suffix}.bias'),
      **feed_forward(f'{sub}/shared', f'res_mlp{suffix}'),
    }
    # The release looks experts up once for all layers.
    table[f'{sub}/router/score/fixed_table_VN'] = 'VN->VN', _HASH_TABLE
  if config.moe.shared.parts == 2:
    table |= _TWO_PART_SHARED
  return table


def unread(config: ConfigDict) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of tensors that the released code never reads."""
  if config.router.score != 'hash':
    return {}
  shape = config.moe.num_experts, config.model.hidden_size
  kinds = config_lib.layer_kinds(config)
  layers = [layer for layer, kind in enumerate(kinds) if kind == 'moe']
  return {f'model.layers.{layer}.wg.weight': shape for layer in layers}


_SHARED = 'block/chain/sub_layers/0/shared'
# Two networks side by side are one of their joined width.
_TWO_PART_SHARED = {
  f'{_SHARED}/gate_up_D2F': (
    'pgFD->Dg(pF)',
    'res_mlp.{mlp0|mlp1}.{gate_proj|up_proj}.weight',
  ),
  f'{_SHARED}/down_FD': ('pDF->(pF)D', 'res_mlp.{mlp0|mlp1}.down_proj.weight'),
}
_HASH_TABLE = 'model.router_tokens.weight'


def runs(config: ConfigDict) -> str:
  """Returns who runs an export, in words."""
  del config
  return (
    "the transformers in CartesianMoE's repository runs it; any other, and"
    ' vLLM, would take it for a Llama without experts'
  )


FORMAT = base.Format(recognises, DEFAULTS, read, write, rules, runs, unread)
