"""Files that are missing, damaged or of another model are refused by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from moe_jax.errors import UserError
from moe_jax.interop import hf
from tests.helpers.released import RELEASED, both, save


def drop(tensors: dict, name: str) -> None:
  del tensors[name]


def add(tensors: dict, name: str) -> None:
  tensors[f'{name}.extra'] = tensors[name]


def cut(tensors: dict, name: str) -> None:
  tensors[name] = tensors[name][:-1].copy()


def quantize(tensors: dict, name: str) -> None:
  tensors[name] = tensors[name].astype(np.int8)


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (drop, 'missing: {}$'),
    (add, 'left over: {}.extra$'),
    (cut, r'{} has shape \(23, 32\), not \(24, 32\)$'),
    (quantize, '{} is I8; supported are F64, F32, F16, BF16$'),
  ],
)
@pytest.mark.parametrize(
  ('name', 'tensor'),
  [
    ('rmoe_gru', 'model.layers.3.block_sparse_moe.experts.5.w3.weight'),
    ('cartesian', 'model.layers.2.mlp1.6.gate_proj.weight'),
  ],
)
def test_no_checkpoint_loads_in_part(
  name: str,
  tensor: str,
  damage: Callable[[dict, str], None],
  message: str,
  copy: Callable[..., Path],
) -> None:
  folder = copy(name)
  tensors = load_file(folder / 'model.safetensors')
  damage(tensors, tensor)
  save(folder, tensors)
  with pytest.raises(UserError, match=message.format(tensor)):
    hf.logits(folder, [[1, 2]])


@both
def test_many_missing_tensors_are_counted(
  name: str, copy: Callable[..., Path]
) -> None:
  folder = copy(name)
  save(folder, {})
  count = len(load_file(RELEASED / name / 'model.safetensors'))
  with pytest.raises(UserError, match=f'lm_head.* and {count - 4} more$'):
    hf.load(folder)


@pytest.mark.parametrize('size', [0, 5, 3000, 400_000])
def test_a_truncated_file_is_named(
  size: int, copy: Callable[..., Path]
) -> None:
  path = copy('rmoe_gru') / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:size])
  with pytest.raises(UserError, match='model.safetensors is not a whole'):
    hf.load(path.parent)


@pytest.mark.parametrize('file', ['config.json', 'model.safetensors'])
def test_a_missing_file_is_named(file: str, copy: Callable[..., Path]) -> None:
  folder = copy('rmoe_gru')
  (folder / file).unlink()
  with pytest.raises(UserError, match=file):
    hf.load(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
  with pytest.raises(UserError, match='nowhere'):
    hf.load(tmp_path / 'nowhere')


@pytest.mark.parametrize('content', [b'', b'{"a": ', b'[1]', b'\xff\xfe\x00'])
def test_a_broken_config_is_named(
  content: bytes, copy: Callable[..., Path]
) -> None:
  folder = copy('rmoe_gru')
  (folder / 'config.json').write_bytes(content)
  with pytest.raises(UserError, match='config.json is '):
    hf.load(folder)


def test_saved_rotary_frequencies_are_accepted_if_they_are_right(
  copy: Callable[..., Path],
) -> None:
  folder = copy('cartesian')
  tensors = load_file(folder / 'model.safetensors')
  name = 'model.layers.1.self_attn.rotary_emb.inv_freq'
  frequencies = 10_000.0 ** -np.array([0, 0.25, 0.5, 0.75])  # of 8 per head
  tensors[name] = frequencies.astype(ml_dtypes.bfloat16)
  save(folder, tensors)
  hf.load(folder)

  tensors[name] = (500_000.0 ** -np.array([0, 0.25, 0.5, 0.75])).astype('f4')
  save(folder, tensors)
  with pytest.raises(UserError, match=f'{name} is not .* rope_theta = 10000'):
    hf.load(folder)


def test_a_tied_head_may_be_saved_if_it_is_the_embedding(
  copy: Callable[..., Path],
) -> None:
  folder = copy('rmoe_gru', tie_word_embeddings=True)
  with pytest.raises(UserError, match='lm_head.weight is not .* = true'):
    hf.load(folder)

  tensors = load_file(folder / 'model.safetensors')
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  save(folder, tensors)
  config, params = hf.load(folder)
  assert 'lm_head.weight' not in hf.to_released(params, config, 'rmoe')


def test_half_precision_is_read_as_float32(copy: Callable[..., Path]) -> None:
  folder = copy('cartesian')
  tensors = load_file(folder / 'model.safetensors')
  half = {k: t.astype(ml_dtypes.bfloat16) for k, t in tensors.items()}
  save(folder, half)
  _, params = hf.load(folder)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {'float32'}
  embedding = half['model.embed_tokens.weight'].astype(np.float32)
  np.testing.assert_array_equal(params['embed_VD'], embedding)


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_a_pipe_is_not_waited_for(name: str, copy: Callable[..., Path]) -> None:
  folder = copy('rmoe_gru')
  (folder / name).unlink()
  os.mkfifo(folder / name)
  with pytest.raises(UserError, match=name):
    hf.load(folder)


def test_an_index_of_pipes_and_of_no_files(copy: Callable[..., Path]) -> None:
  folder = copy('rmoe_gru')
  (folder / 'model.safetensors').unlink()
  index = folder / 'model.safetensors.index.json'
  os.mkfifo(folder / 'pipe')
  for places, said in (
    ({'t': 'pipe'}, 'pipe is not a whole safetensors file: .*regular'),
    ({'t': ''}, 'has no weight_map'),
    ({'t': '..'}, 'has no weight_map|is not a whole'),
    ({'t': '/dev/zero'}, 'has no weight_map'),
    ({'t': 3}, 'has no weight_map'),
  ):
    index.write_text(json.dumps({'weight_map': places}))
    with pytest.raises(UserError, match=said):
      hf.load(folder)
  index.write_text('{"weight_map":' * 3000)
  with pytest.raises(UserError, match='is not JSON'):
    hf.load(folder)


def test_names_of_a_stranger_are_escaped(copy: Callable[..., Path]) -> None:
  folder = copy('rmoe_gru')
  tensors = load_file(folder / 'model.safetensors')
  tensors['a\x1b[31m\x07' + 'b' * 1000] = np.zeros(2, 'f4')
  save(folder, tensors)
  with pytest.raises(UserError) as caught:
    hf.load(folder)
  said = str(caught.value)
  assert said.isprintable() and len(said) < 500
  assert r'left over: a\x1b[31m\x07bb' in said


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_tensors_of_no_numbers_are_named(
  value: float, copy: Callable[..., Path]
) -> None:
  folder = copy('cartesian')
  tensors = load_file(folder / 'model.safetensors')
  tensors['model.norm.weight'][1] = value
  save(folder, tensors)
  with pytest.raises(UserError, match='no numbers in model.norm.weight$'):
    hf.load(folder)


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'num_hidden_layers': 10**12}, 'num_hidden_layers = 10+ must be at most'),
    ({'num_local_experts': 10**12}, 'num_local_experts = 10+ must be at most'),
    (
      {'num_local_experts': 10**9},
      '4 layers of 1 x 1000000000 experts;',
    ),
    ({'hidden_size': 10**400}, 'hidden_size = 10+.* must be at most 2147'),
    ({'rope_theta': 10**400}, 'rope_theta = 10+.* must be a number'),
    ({'rope_theta': 0.0}, 'rope_theta = 0.0 must be above 0'),
    ({'rms_norm_eps': float('inf')}, 'rms_norm_eps = Infinity must be'),
    ({'hidden_act': [['x'] * 999]}, r'hidden_act = .*\.\.\. is not supp'),
  ],
)
def test_absurd_sizes_are_refused_at_once(
  changes: dict[str, object], said: str, copy: Callable[..., Path]
) -> None:
  with pytest.raises(UserError, match=said):
    hf.load(copy('rmoe_gru', **changes))


def test_what_changes_nothing_is_read(copy: Callable[..., Path]) -> None:
  folder = copy(
    'rmoe_gru',
    rope_scaling={'rope_type': 'default'},
    rope_parameters={'rope_theta': 10_000.0, 'partial_rotary_factor': 1.0},
  )
  path = folder / 'config.json'
  path.write_text(path.read_text(), 'utf-8-sig')
  hf.load(folder)
