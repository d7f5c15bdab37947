"""Folders of the wrong kind are named, and models that a format has not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from configs import cartesian_moe
from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.interop import canonical, formats, hf, released
from tests.helpers import tiny
from tests.helpers.released import random_params

LINEAR = {'model.vocab_size': tiny.VOCAB, 'moe.expert_width': 24}
GRU = LINEAR | {'router.recurrent': 'gru'}
TWO = LINEAR | {
  'moe.factors': 2,
  'moe.expert_width': 48,
  'moe.every': 2,
  'moe.shared.mixing': 'coefficient',
}


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ({'config.json': {'model_type': 'llama'}}, 'ordinary Llama, .*upcycle'),
    ({'config.json': {'model_type': 'qwen2_moe'}}, '"qwen2_moe" is not a'),
    ({'config.json': {'a': 1}}, 'model_type = null is not a released'),
    (
      {'config.json': tiny.config().to_dict()},
      'of a workdir of moe_jax, .*moe_jax convert export',
    ),
    (
      {'config.json': {'model_type': 'llama'}, 'pytorch_model.bin': {}},
      r'a PyTorch checkpoint \(pytorch_model.bin\), .*safetensors first',
    ),
    ({'_CHECKPOINT_METADATA': {}}, 'is an Orbax checkpoint, not a released'),
    ({'12/_CHECKPOINT_METADATA': {}}, 'is an Orbax checkpoint'),
    ({'checkpoints/0/x': {}}, 'is an Orbax checkpoint'),
    ({}, 'config.json cannot be read'),
  ],
)
def test_a_folder_of_another_kind_is_named(
  files: dict, message: str, tmp_path: Path
) -> None:
  for name, values in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(json.dumps(values))
  with pytest.raises(UserError, match=message):
    hf.load(tmp_path)


def test_a_file_is_no_folder(copy: Callable[..., Path]) -> None:
  with pytest.raises(UserError, match='is a file; give the folder'):
    hf.load(copy('cartesian') / 'model.safetensors')


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    ({'weight_map': 3}, 'has no weight_map'),
    ({'weight_map': {'a': '../b'}}, 'has no weight_map'),
    ({'weight_map': {'a': 'gone.safetensors'}}, 'gone.* does not exist'),
    (
      {'weight_map': {'a': 'one.safetensors'}},
      'one.safetensors has lm_head.*one.safetensors lacks a',
    ),
  ],
)
def test_a_damaged_index_is_named(
  damage: dict, message: str, copy: Callable[..., Path]
) -> None:
  folder = copy('cartesian')
  (folder / 'model.safetensors').rename(folder / 'one.safetensors')
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps(damage))
  with pytest.raises(UserError, match=message):
    hf.load(folder)


@pytest.mark.parametrize(
  ('layout', 'model', 'changes', 'key'),
  [
    ('rmoe', GRU, {'router.recurrent': 'lstm'}, 'router.recurrent'),
    ('rmoe', GRU, {'router.projector': 'shared'}, 'router.projector'),
    ('rmoe', GRU, {'router.passing': 'none'}, 'router.passing'),
    ('rmoe', GRU, {'router.residual': 0.5}, 'router.residual'),
    ('rmoe', GRU, {'router.score': 'xmoe'}, 'router.score'),
    ('rmoe', GRU, {'router.bias': True}, 'router.bias'),
    ('rmoe', GRU, {'router.weights': 'sigmoid'}, 'router.weights'),
    ('rmoe', GRU, {'router.selection': 'top_p'}, 'router.selection'),
    ('rmoe', GRU, {'router.groups': 4}, 'router.groups'),
    ('rmoe', GRU, {'moe.renormalize': False}, 'router.weights'),
    ('rmoe', GRU, {'moe.top_k': 1}, 'router.weights'),
    ('rmoe', GRU, {'moe.factors': 2}, 'moe.factors'),
    ('rmoe', GRU, {'moe.every': 2}, 'moe.every'),
    ('rmoe', GRU, {'moe.shared.width': 8}, 'moe.shared.mixing'),
    ('rmoe', GRU, {'model.head_dim': 4}, 'model.head_dim'),
    ('rmoe', GRU, {'model.norm': 'layer'}, 'model.norm'),
    ('rmoe', GRU, {'model.activation': 'relu'}, 'model.activation'),
    ('rmoe', GRU, {'moe.num_experts': 0}, 'moe.num_experts'),
    ('cartesian', TWO, {'router.recurrent': 'gru'}, 'router.recurrent'),
    ('cartesian', TWO, {'moe.factors': 3}, 'moe.factors'),
    ('cartesian', TWO, {'moe.offset': 1, 'model.num_layers': 4}, 'moe.every'),
    ('cartesian', TWO, {'model.rope_theta': 5.0}, 'model.rope_theta'),
    ('cartesian', TWO, {'model.num_kv_heads': 2}, 'model.num_kv_heads'),
    ('cartesian', TWO, {'model.ffn_width': 65}, 'model.ffn_width'),
    ('cartesian', TWO, {'moe.shared.width': 46}, 'moe.shared.width'),
    (
      'cartesian',
      TWO,
      {'moe.shared.width': 48, 'moe.shared.mixing': 'sum'},
      'moe.shared.mixing',
    ),
    ('llama', LINEAR, {}, 'layers'),
  ],
)
def test_a_model_that_a_format_has_not_is_refused_by_its_key(
  layout: str, model: dict, changes: dict, key: str
) -> None:
  config = tiny.config(**(model | changes))
  with pytest.raises(UserError, match=key.replace('.', r'\.')):
    formats.write(config, layout)


def test_the_models_above_are_of_their_formats() -> None:
  assert formats.write(tiny.config(**GRU), 'rmoe')['moe_router_type'] == 'gru'
  assert formats.write(tiny.config(**TWO), 'cartesian')['c2_fine_grain']


def test_top3_beside_narrower_dense_layers_is_refused() -> None:
  config = cartesian_moe.get_config('base,smoe_top3')
  with pytest.raises(UserError, match='model.ffn_width = 3072 .* width 3264'):
    formats.write(config, 'cartesian')


def test_what_the_release_cannot_run_is_said() -> None:
  """Its layers without experts hand on a router's state they never set."""
  first = tiny.config(**(GRU | {'moe.first_dense': 1}))
  said = formats.FORMATS['rmoe'].runs(first)
  assert 'nothing but moe_jax' in said and 'the tensors only' in said
  for name, model in (('rmoe', GRU), ('cartesian', TWO)):
    said = formats.FORMATS[name].runs(tiny.config(**model))
    assert 'nothing' not in said and 'runs it' in said


def test_layers_that_differ_in_what_is_one_tensor_are_refused() -> None:
  config = tiny.config(**(LINEAR | {'router.score': 'hash'}))
  params = random_params(config)
  with pytest.raises(UserError, match='router_tokens.* one tensor for all'):
    released.to_released(params, config, 'cartesian')


def test_a_balancing_bias_has_no_tensor() -> None:
  config = tiny.config(**(LINEAR | {'loss.bias_rate': 0.1}))
  with pytest.raises(UserError, match="'mixtral' has no tensor for .*choice"):
    released.to_released(random_params(config), config, 'mixtral')


def test_idle_keys_do_not_change_the_meaning() -> None:
  config = tiny.config()
  idle = {
    'router.top_p': 0.9,
    'router.state_size': 9,
    'router.mlp_width': 9,
    'moe.shared.parts': 3,
    'model.ffn_width': 9,
    'model.dropout': 0.5,
    'moe.renormalize': True,
    'router.weights': 'chosen',
  }
  other = tiny.config(**idle)
  assert canonical.meaning(config) == canonical.meaning(other)


def test_every_key_is_part_of_the_meaning_or_named_as_free() -> None:
  keys = {
    key
    for section in ('model', 'moe', 'router')
    for key in config_lib.flatten({section: canonical.CANONICAL[section]})
  }
  meant = canonical.meaning(tiny.config()).keys() - {'layers'}
  assert meant == keys - {'moe.renormalize'}
