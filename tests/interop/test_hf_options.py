"""Every option of the released configs: read as released, or refused."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from moe_jax.errors import UserError
from moe_jax.interop import formats, hf
from tests.helpers.marks import fast_only
from tests.helpers.released import random_params, save

# The tensors of an option, as the released code names them: those of the
# checkpoint at hand that go and those that come, with their shapes.
OPTIONS = {
  'linear router': (
    'rmoe_gru',
    {'moe_router_type': 'linear'},
    ['weight1', 'weight2', 'rnn_router'],
    {'model.layers.3.block_sparse_moe.gate.weight': (8, 32)},
  ),
  'dense layers first': (
    'rmoe_gru',
    {'moe_num_layers': 3},
    ['layers.0.block_sparse_moe'],
    {
      'model.layers.0.mlp.gate_proj.weight': (64, 32),
      'model.layers.0.mlp.down_proj.weight': (32, 64),
    },
  ),
  'shared expert': (
    'rmoe_gru',
    {
      'add_moe_share_expert': True,
      'moe_share_expert_intermediate_size': 40,
      'moe_weight': 0.75,
    },
    [],
    {
      'model.layers.0.mlp_share.up_proj.weight': (40, 32),
      'model.layers.3.mlp_share.down_proj.weight': (32, 40),
    },
  ),
  'bias': (
    'rmoe_gru',
    {'add_moe_bias': True},
    [],
    {'model.layers.2.block_sparse_moe.bias': (32,)},
  ),
  'grouped-query attention': (
    'rmoe_gru',
    {'num_key_value_heads': 2},
    ['k_proj', 'v_proj'],
    {'model.layers.1.self_attn.k_proj.weight': (16, 32)},
  ),
  'tied embeddings': (
    'cartesian',
    {'tie_word_embeddings': True},
    ['lm_head'],
    {},
  ),
  'no shared expert': (
    'cartesian',
    {'use_residual': False},
    ['res_mlp', 'coefficient'],
    {},
  ),
  'MoE from one layer on': (
    'cartesian',
    {'initial_moe_layer': 1},
    ['layers.0.', 'layers.1.mlp.', 'layers.3.mlp.'],
    {
      'model.layers.0.mlp.up_proj.weight': (48, 32),
      'model.layers.1.mlp0.7.up_proj.weight': (24, 32),
      'model.layers.3.wg1.weight': (8, 32),
    },
  ),
  'finer grain': (
    'cartesian',
    {'grain_level': 4},
    ['mlp0', 'mlp1'],
    {'model.layers.2.mlp1.0.down_proj.weight': (32, 12)},
  ),
  'conventional MoE': (
    'cartesian',
    {'c2_fine_grain': False},
    ['mlp0', 'mlp1', 'wg', 'coefficient', 'mlp_layernorm'],
    {
      'model.layers.0.mlp.7.gate_proj.weight': (48, 32),
      'model.layers.0.wg.weight': (8, 32),
      'model.layers.0.coefficient.bias': (2,),
      'model.layers.2.res_mlp.down_proj.weight': (32, 48),
    },
  ),
  'dense': (
    'cartesian',
    {'use_moe': False},
    ['mlp0', 'mlp1', 'wg', 'coefficient', 'mlp_layernorm'],
    {'model.layers.2.mlp.down_proj.weight': (32, 48)},
  ),
}


FAST = [
  'linear router',
  'dense',
]


@pytest.mark.parametrize('option', fast_only(FAST, OPTIONS))
def test_options(option: str, copy: Callable[..., Path]) -> None:
  name, changes, gone, come = OPTIONS[option]
  folder = copy(name, **changes)
  layout, config = formats.read(folder)
  params = random_params(config)
  tensors = hf.to_released(params, config, layout)

  before = load_file(folder / 'model.safetensors')
  shapes = {key: tensor.shape for key, tensor in tensors.items()}
  assert come.items() <= shapes.items()
  for key in before.keys() - tensors.keys():
    assert any(part in key for part in gone), key
  for key in before.keys() & tensors.keys():
    same = before[key].shape == shapes[key]
    assert same or any(part in key for part in gone), key

  save(folder, tensors)
  _, loaded = hf.load(folder)
  jax.tree.map(np.testing.assert_array_equal, params, loaded)
  assert np.isfinite(hf.logits(folder, [[1, 2, 3]])).all()


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('rmoe_gru', {'num_experts_per_tok': 0}, 'num_experts_per_tok = 0 .*1'),
    ('rmoe_gru', {'num_experts_per_tok': 9}, 'num_experts_per_tok = 9 .*8'),
    ('rmoe_gru', {'moe_num_layers': 5}, 'moe_num_layers = 5 .*= 4'),
    ('rmoe_gru', {'hidden_act': 'gelu'}, 'hidden_act = "gelu" .*"silu"'),
    ('rmoe_gru', {'attention_bias': True}, 'attention_bias = true .*false'),
    (
      'rmoe_gru',
      {'rope_scaling': {'type': 'linear'}},
      'rope_scaling = {.*null',
    ),
    ('rmoe_gru', {'hidden_size': 30}, 'hidden_size = 30 .*heads .4.'),
    ('rmoe_gru', {'hidden_size': '32'}, 'hidden_size = "32" .*an integer'),
    ('rmoe_gru', {'num_key_value_heads': 3}, 'num_key_value_heads = 3 .*4'),
    ('rmoe_gru', {'add_moe_bias': 1}, 'add_moe_bias = 1 .*true or false'),
    ('rmoe_gru', {'rms_norm_eps': -1}, 'rms_norm_eps = -1 .*at least 0'),
    ('rmoe_gru', {'model_type': 'olmoe'}, 'model_type = "olmoe" .*RMoE'),
    ('rmoe_gru', {'head_dim': 16}, 'head_dim = 16 .*null'),
    ('rmoe_gru', {'mlp_bias': True}, 'mlp_bias = true .*false'),
    (
      'rmoe_gru',
      {'rope_parameters': {'rope_theta': 1e4, 'rope_type': 'yarn'}},
      'rope_parameters = {.*rope_theta alone',
    ),
    ('cartesian', {'moe_top_k': -2}, 'moe_top_k = -2 .*at least 1'),
    ('cartesian', {'moe_grained': 'half'}, 'moe_grained = "half" .*"full"'),
    ('cartesian', {'moe_scale': 2}, 'moe_scale = 2 .*null'),
    ('cartesian', {'rope_theta': 5e5}, 'rope_theta = 500000.0 .*10000'),
    (
      'cartesian',
      {'interleave_moe_layer': False},
      'interleave_moe_layer = false .*true',
    ),
  ],
)
def test_unsupported_options_are_named(
  name: str, changes: dict, message: str, copy: Callable[..., Path]
) -> None:
  with pytest.raises(UserError, match=message):
    hf.load(copy(name, **changes))


def test_a_missing_key_is_named(copy: Callable[..., Path]) -> None:
  folder = copy('cartesian')
  values = json.loads((folder / 'config.json').read_text())
  del values['grain_level']
  (folder / 'config.json').write_text(json.dumps(values))
  with pytest.raises(UserError, match='the key grain_level is missing'):
    hf.load(folder)
