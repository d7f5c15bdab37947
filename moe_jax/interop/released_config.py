"""From the `config.json` of a released checkpoint to a config of ours.

Whatever would make the model compute something else than the released code is
refused; keys that its forward pass does not read are ignored.
"""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moe_jax.errors import UserError
from moe_jax.interop import released_moe
from moe_jax.interop.released_keys import Keys, read_json

# What the released configuration classes fill in for an absent key.
_DEFAULTS = {
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-6,
  'rope_theta': 10_000.0,
  'rope_scaling': None,
  'rope_parameters': None,
  'attention_bias': False,
  'tie_word_embeddings': False,
  'num_key_value_heads': None,
}
_CARTESIAN_SIGNS = ('c2_fine_grain', 'moe_grained', 'grain_level')


def read(path: Path) -> tuple[str, ConfigDict]:
  """Reads a released `config.json`.

  Returns:
    The layout of the file's tensors, a key of `layouts.LAYOUTS`, and a config
    with the sections `model`, `moe`, `router` and `loss`: what
    `moe_jax.model.build` and the balance loss read, in float32.

  Raises:
    UserError: the file is not there or not a JSON object, or a key is missing
      or has a value that is not supported.
  """
  values = read_json(path)
  if values.get('model_type') == 'llama_moe_rnn':
    keys = Keys(path, _DEFAULTS | released_moe.RMOE_DEFAULTS | values)
    return 'rmoe', _config(keys, *released_moe.rmoe(keys))
  cartesian = any(key in values for key in _CARTESIAN_SIGNS)
  if values.get('model_type') == 'llama' and cartesian:
    keys = Keys(path, _DEFAULTS | released_moe.CARTESIAN_DEFAULTS | values)
    return 'cartesian', _config(keys, *released_moe.cartesian(keys))
  raise UserError(
    f'{path}: model_type = {json.dumps(values.get("model_type"))} is not a'
    ' released format that can be read (supported: "llama_moe_rnn", which is'
    ' RMoE; "llama" with the key c2_fine_grain, which is CartesianMoE)'
  )


def _config(
  keys: Keys, moe: dict[str, Any], router: dict[str, Any]
) -> ConfigDict:
  keys.only('hidden_act', 'silu')
  keys.only('rope_scaling', None)
  keys.only('rope_parameters', None)
  keys.only('attention_bias', False)
  config = ConfigDict()
  config.model = _model(keys)
  config.moe = {
    'renormalize': True,
    'dispatch': 'dropless',
    'capacity_factor': 1.0,
    'offset': 0,
  } | moe
  config.router = {'score': 'linear'} | router
  # The balance loss as the released code computes it.
  config.loss = {'balance_layers': 'joined', 'bias_rate': 0.0}
  return config.lock()


def _model(keys: Keys) -> dict[str, Any]:
  hidden_size = keys.integer('hidden_size')
  num_heads = keys.integer('num_attention_heads')
  num_kv_heads = keys.size('num_key_value_heads', 'num_attention_heads')
  if hidden_size % (2 * num_heads):
    raise keys.fail(
      'hidden_size',
      f'must be a multiple of 2 x num_attention_heads ({num_heads})',
    )
  if num_heads % num_kv_heads:
    raise keys.fail(
      'num_key_value_heads', f'must divide num_attention_heads = {num_heads}'
    )
  return {
    'num_layers': keys.integer('num_hidden_layers'),
    'hidden_size': hidden_size,
    'num_heads': num_heads,
    'num_kv_heads': num_kv_heads,
    'head_dim': 0,
    'ffn_width': keys.integer('intermediate_size'),
    'vocab_size': keys.integer('vocab_size'),
    'rope_theta': keys.number('rope_theta'),
    'norm': 'rms',
    'norm_place': 'pre',
    'norm_epsilon': keys.number('rms_norm_eps'),
    'positions': 'rotary',
    'span': 0,
    'activation': 'swiglu',
    'dropout': 0.0,
    'head_bias': False,
    'tie_embeddings': keys.flag('tie_word_embeddings'),
    'init_std': 0.02,
    'dtype': 'float32',
    'remat': 'none',
    'unroll': 1,
  }
