"""The format of transformers' MixtralForCausalLM: its keys and its tensors.

Its router is linear with a softmax over all experts, the k best of which are
renormalised, and every layer has experts: RMoE's linear baseline.
"""

from typing import Any

from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.interop.formats import base, rmoe
from moe_jax.interop.formats.base import Keys
from moe_jax.interop.mapping import Rules

# What MixtralConfig fills in.
DEFAULTS = base.DEFAULTS | {
  'rms_norm_eps': 1e-5,
  'rope_theta': 1e6,
  'num_key_value_heads': 8,
  'num_local_experts': 8,
  'num_experts_per_tok': 2,
  'sliding_window': None,
}


def recognises(values: dict[str, Any]) -> bool:
  """Returns whether the values of a `config.json` are of this format."""
  return values.get('model_type') == 'mixtral'


def read(keys: Keys) -> dict[str, dict[str, Any]]:
  """Returns our sections `model`, `moe` and `router`."""
  keys.only('sliding_window', None)
  num_experts = keys.integer('num_local_experts')
  top_k = keys.integer('num_experts_per_tok', 1, num_experts)
  moe = {
    'num_experts': num_experts,
    'top_k': top_k,
    'expert_width': keys.integer('intermediate_size'),
  }
  # A single weight is divided by itself too.
  router = {'weights': 'chosen' if top_k == 1 else 'softmax'}
  return {'model': base.read(keys), 'moe': moe, 'router': router}


def write(config: ConfigDict) -> dict[str, Any]:
  """Returns a `config.json`; what it cannot say, the caller finds.

  Raises:
    UserError: A layer has no experts.
  """
  kinds = config_lib.layer_kinds(config)
  if 'dense' in kinds:
    raise UserError(
      f'layers {", ".join(kinds)}: Mixtral has experts in every layer; see'
      ' moe.num_experts, moe.every, moe.offset and moe.first_dense'
    )
  return base.write(config) | {
    'architectures': ['MixtralForCausalLM'],
    'model_type': 'mixtral',
    'head_dim': config_lib.head_dim(config),
    'intermediate_size': config.moe.expert_width,
    'num_local_experts': config.moe.num_experts,
    'num_experts_per_tok': config.moe.top_k,
    'router_aux_loss_coef': config.loss.balance_weight,
    'sliding_window': None,
  }


def rules(config: ConfigDict) -> Rules:
  """Returns RMoE's rules, whose code took Mixtral's names."""
  return rmoe.rules(config)


def runs(config: ConfigDict) -> str:
  """Returns who runs an export, in words."""
  del config
  return 'transformers and vLLM run it, as a Mixtral'


FORMAT = base.Format(recognises, DEFAULTS, read, write, rules, runs)
