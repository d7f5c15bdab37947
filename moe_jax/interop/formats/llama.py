"""The format of an ordinary Llama: dense, the start of an upcycled model."""

from typing import Any

from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.interop.formats import base
from moe_jax.interop.formats.base import Keys
from moe_jax.interop.mapping import Rules

DEFAULTS = base.DEFAULTS


def recognises(values: dict[str, Any]) -> bool:
  """Returns whether the values of a `config.json` are of this format."""
  return values.get('model_type') == 'llama'


def read(keys: Keys) -> dict[str, dict[str, Any]]:
  """Returns our section `model`; there are no experts."""
  return {'model': base.read(keys)}


def write(config: ConfigDict) -> dict[str, Any]:
  """Returns a `config.json`; what it cannot say, the caller finds."""
  return base.write(config) | {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'head_dim': config_lib.head_dim(config),
    'intermediate_size': config.model.ffn_width,
  }


def rules(config: ConfigDict) -> Rules:
  """Returns nothing beside the rules of the decoder; see `mapping`."""
  del config
  return {}


def runs(config: ConfigDict) -> str:
  """Returns who runs an export, in words."""
  del config
  return 'transformers and vLLM run it, as a Llama'


FORMAT = base.Format(recognises, DEFAULTS, read, write, rules, runs)
