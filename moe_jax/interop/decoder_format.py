"""What every Llama-like format shares: the keys of a dense decoder."""

from typing import Any

from ml_collections import ConfigDict

from moe_jax.interop.released_keys import Keys

# What the released configuration classes fill in for an absent key.
DEFAULTS = {
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-6,
  'rope_theta': 10_000.0,
  'rope_scaling': None,
  'rope_parameters': None,
  'attention_bias': False,
  'mlp_bias': False,
  'tie_word_embeddings': False,
  'num_key_value_heads': None,
  'head_dim': None,
}


def read(keys: Keys) -> dict[str, Any]:
  """Our section `model`, what a format may not say left out."""
  keys.only('hidden_act', 'silu')
  keys.only('rope_scaling', None)
  keys.only('attention_bias', False)
  keys.only('mlp_bias', False)
  hidden_size = keys.integer('hidden_size')
  num_heads = keys.integer('num_attention_heads')
  num_kv_heads = keys.size('num_key_value_heads', 'num_attention_heads')
  head_dim = 0 if keys['head_dim'] is None else keys.integer('head_dim')
  if head_dim % 2:
    raise keys.fail('head_dim', 'must be even')
  if not head_dim and hidden_size % (2 * num_heads):
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
    'head_dim': head_dim,
    'ffn_width': keys.integer('intermediate_size'),
    'vocab_size': keys.integer('vocab_size'),
    'rope_theta': _rope_theta(keys),
    'norm_epsilon': keys.number('rms_norm_eps'),
    'tie_embeddings': keys.flag('tie_word_embeddings'),
  }


def _rope_theta(keys: Keys) -> float:
  """Its own key, or, as transformers 5 writes it, one of `rope_parameters`."""
  parameters = keys['rope_parameters']
  if parameters is None:
    return keys.number('rope_theta')
  plain = {'rope_type': 'default', 'rope_theta': None}
  theta = parameters.get('rope_theta') if isinstance(parameters, dict) else None
  if type(theta) not in (int, float) or plain | parameters != plain | {
    'rope_theta': theta
  }:
    raise keys.fail(
      'rope_parameters', 'is not supported (supported: null, rope_theta alone)'
    )
  return float(theta)


def write(config: ConfigDict) -> dict[str, Any]:
  """The keys of a decoder, for every format."""
  model = config.model
  return {
    'vocab_size': model.vocab_size,
    'hidden_size': model.hidden_size,
    'num_hidden_layers': model.num_layers,
    'num_attention_heads': model.num_heads,
    'num_key_value_heads': model.num_kv_heads,
    'hidden_act': 'silu',
    'rms_norm_eps': model.norm_epsilon,
    'rope_theta': model.rope_theta,
    'tie_word_embeddings': model.tie_embeddings,
    'initializer_range': model.init_std,
  }
