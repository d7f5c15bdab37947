"""The format of RMoE's released code: its keys and its tensors.

Source: llama_moe_rnn/ of qiuzh20/RMoE.
"""

from typing import Any

from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.interop.formats import base
from moe_jax.interop.formats.base import Keys
from moe_jax.interop.mapping import Rules, feed_forward

DEFAULTS = base.DEFAULTS | {
  'num_experts_per_tok': 2,
  'num_local_experts': 8,
  'moe_num_layers': 32,
  'moe_expert_intermediate_size': None,
  'add_moe_share_expert': False,
  'moe_share_expert_intermediate_size': None,
  'moe_weight': 0.5,
  'share_weight': 0.5,
  'add_moe_bias': False,
  'moe_router_type': 'gru',
  'moe_router_rnn_hidden_size': 256,
}
_CELLS = ('gru', 'rnn')  # any other moe_router_type is a linear router


def recognises(values: dict[str, Any]) -> bool:
  """Returns whether the values of a `config.json` are of this format."""
  return values.get('model_type') == 'llama_moe_rnn'


def read(keys: Keys) -> dict[str, dict[str, Any]]:
  """Returns our sections `model`, `moe` and `router`.

  With dense layers first the released code has these tensors and fails when
  run: such a layer hands on a router's state that it has not set.
  """
  keys.only('head_dim', None)
  layers = keys.integer('num_hidden_layers')
  moe_layers = keys.integer('moe_num_layers')
  if moe_layers > layers:
    raise keys.fail(
      'moe_num_layers', f'must be at most num_hidden_layers = {layers}'
    )
  num_experts = keys.integer('num_local_experts')
  shared = keys.size('moe_share_expert_intermediate_size', 'intermediate_size')
  moe = {
    'num_experts': num_experts,
    'top_k': keys.integer('num_experts_per_tok', 1, num_experts),
    'expert_width': keys.size(
      'moe_expert_intermediate_size', 'intermediate_size'
    ),
    'first_dense': layers - moe_layers,
    'bias': keys.flag('add_moe_bias'),
    'shared': {
      'width': shared if keys.flag('add_moe_share_expert') else 0,
      'mixing': 'fixed',
      'routed_weight': keys.number('moe_weight'),
      'shared_weight': keys.number('share_weight'),
    },
  }
  # The released code divides even a single weight by itself: 1, always.
  router: dict[str, Any] = {
    'weights': 'chosen' if moe['top_k'] == 1 else 'softmax'
  }
  if keys['moe_router_type'] in _CELLS:
    router['recurrent'] = keys['moe_router_type']
    router['state_size'] = keys.integer('moe_router_rnn_hidden_size')
  return {'model': base.read(keys), 'moe': moe, 'router': router}


def write(config: ConfigDict) -> dict[str, Any]:
  """Returns a `config.json`; what it cannot say, the caller finds.

  Raises:
    UserError: The released code has no such places of MoE layers.
  """
  moe, router = config.moe, config.router
  kinds = config_lib.layer_kinds(config)
  count = kinds.count('moe')
  if not count or kinds[len(kinds) - count :] != ('moe',) * count:
    raise UserError(
      f"layers {', '.join(kinds)}: the format 'rmoe' has MoE in all layers"
      ' from one on; see moe.num_experts, moe.every, moe.offset'
    )
  shared = moe.shared
  return base.write(config) | {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama_moe_rnn',
    'intermediate_size': config.model.ffn_width,
    'num_local_experts': moe.num_experts,
    'num_experts_per_tok': moe.top_k,
    'moe_num_layers': count,
    'moe_expert_intermediate_size': moe.expert_width,
    'add_moe_share_expert': shared.width > 0,
    'moe_share_expert_intermediate_size': shared.width or None,
    'moe_weight': shared.routed_weight,
    'share_weight': shared.shared_weight,
    'add_moe_bias': moe.bias,
    'moe_router_type': 'linear'
    if router.recurrent == 'none'
    else router.recurrent,
    'moe_router_rnn_hidden_size': router.state_size,
    'router_aux_loss_coef': config.loss.balance_weight,
  }


def runs(config: ConfigDict) -> str:
  """Returns who runs an export, in words."""
  if 'dense' in config_lib.layer_kinds(config):
    return (
      'nothing but moe_jax runs it: moe_num_layers < num_hidden_layers, the'
      ' tensors only, as the released code builds them; its forward pass fails'
      ' in a layer without experts'
    )
  repaired = config.router.recurrent != 'none'
  return (
    f"RMoE's released code runs it{', its cell repaired' if repaired else ''};"
    ' transformers and vLLM alone do not'
  )


def rules(config: ConfigDict) -> Rules:
  """Returns where our parameters stand; see `mapping`."""
  sub = 'block/chain/sub_layers/0'
  recurrent = config.router.recurrent != 'none'
  score = 'weight2' if recurrent else 'gate.weight'
  experts = 'block_sparse_moe.experts.{*}.'
  cell = {
    'cell/input_X3R': ('goi->igo', 'model.rnn_router.weight_i{r|z|n}'),
    'cell/hidden_R3R': ('goi->igo', 'model.rnn_router.weight_h{r|z|n}'),
    'cell/input_bias_3R': ('gR->gR', 'model.rnn_router.bias_i{r|z|n}'),
    'cell/hidden_bias_3R': ('gR->gR', 'model.rnn_router.bias_h{r|z|n}'),
    'cell/input_XR': ('oi->io', 'model.rnn_router.weight_in'),
    'cell/hidden_RR': ('oi->io', 'model.rnn_router.weight_hn'),
    'cell/input_bias_R': ('R->R', 'model.rnn_router.bias_in'),
    'cell/hidden_bias_R': ('R->R', 'model.rnn_router.bias_hn'),
  }
  return cell | {
    f'{sub}/router/features/project/projector_DR': (
      'RD->DR',
      'block_sparse_moe.weight1',
    ),
    f'{sub}/router/score/weight_XN': ('NX->XN', f'block_sparse_moe.{score}'),
    f'{sub}/experts/gate_up_ND2F': ('NgFD->NDgF', experts + '{w1|w3}.weight'),
    f'{sub}/experts/down_NFD': ('NDF->NFD', experts + 'w2.weight'),
    f'{sub}/bias_D': ('D->D', 'block_sparse_moe.bias'),
    **feed_forward(f'{sub}/shared', 'mlp_share'),
  }


FORMAT = base.Format(recognises, DEFAULTS, read, write, rules, runs)
