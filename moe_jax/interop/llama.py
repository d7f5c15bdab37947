"""The format of an ordinary Llama: dense, the start of an upcycled model."""

from typing import Any

from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.interop import decoder_format
from moe_jax.interop.layouts import Rules
from moe_jax.interop.released_keys import Keys

DEFAULTS = decoder_format.DEFAULTS


def recognises(values: dict[str, Any]) -> bool:
  """Whether a `config.json` is of this format."""
  return values.get('model_type') == 'llama'


def read(keys: Keys) -> dict[str, dict[str, Any]]:
  """Our section `model`; there are no experts."""
  return {'model': decoder_format.read(keys)}


def write(config: ConfigDict) -> dict[str, Any]:
  """A `config.json`; what it cannot say is for the caller to find."""
  return decoder_format.write(config) | {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'head_dim': config_lib.head_dim(config),
    'intermediate_size': config.model.ffn_width,
  }


def rules(config: ConfigDict) -> Rules:
  """Nothing beside the decoder's own; see `layouts`."""
  del config
  return {}
