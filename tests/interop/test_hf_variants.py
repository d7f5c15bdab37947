"""Every variant of the released configs computes what the release computes.

The checkpoints are random, the numbers those of `released_oracle`. Written out
again, they are the same files.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from moe_jax.interop import formats, hf
from tests.helpers import released_oracle as oracle
from tests.helpers.marks import fast_only
from tests.helpers.released import export, save

SIZES = {
  'vocab_size': 23,
  'hidden_size': 16,
  'num_hidden_layers': 4,
  'num_attention_heads': 4,
  'rms_norm_eps': 1e-5,
}
RMOE = SIZES | {
  'model_type': 'llama_moe_rnn',
  'intermediate_size': 20,
  'num_experts_per_tok': 2,
  'num_local_experts': 5,
  'moe_num_layers': 4,
  'moe_expert_intermediate_size': 12,
  'add_moe_share_expert': False,
  'moe_share_expert_intermediate_size': None,
  'moe_weight': 0.5,
  'share_weight': 0.5,
  'add_moe_bias': False,
  'moe_router_type': 'gru',
  'moe_router_rnn_hidden_size': 6,
}
CARTESIAN = SIZES | {
  'model_type': 'llama',
  'intermediate_size': 24,
  'use_moe': True,
  'num_experts': 5,
  'moe_top_k': 2,
  'initial_moe_layer': -1,
  'interleave_moe_layer': True,
  'expert_interval': 2,
  'c2_fine_grain': True,
  'fine_grain': False,
  'use_residual': True,
  'grain_level': 2,
  'moe_grained': 'full',
  'moe_scale': None,
}
ONE = {'c2_fine_grain': False}
FINE = ONE | {'fine_grain': True, 'moe_top_k': 4}
EVERY_LAYER = {'initial_moe_layer': 0, 'interleave_moe_layer': False}
VARIANTS = {
  'gru': RMOE,
  'rnn': RMOE | {'moe_router_type': 'rnn'},
  'linear': RMOE | {'moe_router_type': 'linear'},
  'gru, top-1': RMOE | {'num_experts_per_tok': 1},
  'rnn, grouped queries, theta': RMOE
  | {'moe_router_type': 'rnn', 'num_key_value_heads': 2, 'rope_theta': 300.0},
  'gru, fixed weights of a shared expert, bias': RMOE
  | {
    'add_moe_share_expert': True,
    'moe_share_expert_intermediate_size': 8,
    'moe_weight': 0.75,
    'share_weight': 0.5,
    'add_moe_bias': True,
  },
  'gru, dense layers first, default widths': RMOE
  | {
    'moe_num_layers': 2,
    'moe_expert_intermediate_size': None,
    'add_moe_share_expert': True,
    'tie_word_embeddings': True,
  },
  'Cartesian': CARTESIAN,
  'Cartesian, top-3, alone, finer': CARTESIAN
  | {'moe_top_k': 3, 'use_residual': False, 'grain_level': 3},
  'Cartesian, top-1, every layer': CARTESIAN | EVERY_LAYER | {'moe_top_k': 1},
  'Cartesian, from layer 1 on': CARTESIAN
  | {'initial_moe_layer': 1, 'interleave_moe_layer': False},
  'Cartesian, every third': CARTESIAN | {'expert_interval': 3},
  'SMoE-Share': CARTESIAN | ONE,
  'SMoE-Top3': CARTESIAN | ONE | {'moe_top_k': 3, 'use_residual': False},
  'fine-grained': CARTESIAN | FINE,
  'fine-grained, alone': CARTESIAN | FINE | {'use_residual': False},
  'fine-grained, every layer': CARTESIAN | FINE | EVERY_LAYER,
  'TopP': CARTESIAN | ONE | {'moe_top_k': 0},
  'TopP, alone': CARTESIAN | ONE | {'moe_top_k': -1, 'use_residual': False},
  'Hash': CARTESIAN | ONE | {'moe_top_k': -2},
  'Hash, from layer 1 on': CARTESIAN
  | ONE
  | {'moe_top_k': -2, 'initial_moe_layer': 1, 'interleave_moe_layer': False},
  'dense': CARTESIAN | {'use_moe': False},
  'dense by one expert': CARTESIAN | {'num_experts': 1},
}


def make(keys: dict, folder: Path) -> oracle.Model:
  """Writes a random checkpoint of the release."""
  rmoe = keys['model_type'] == 'llama_moe_rnn'
  shapes = oracle.rmoe_shapes if rmoe else oracle.cartesian_shapes
  tensors = oracle.tensors(keys, shapes)
  if keys.get('moe_top_k') == -2:  # kept by the release, and never read
    for name in tensors:
      if '.wg.' in name:
        tensors[name][:] = 0
  folder.mkdir(exist_ok=True)
  save(folder, tensors)
  (folder / 'config.json').write_text(json.dumps(keys))
  return (oracle.RMoE if rmoe else oracle.CartesianMoE)(keys, tensors)


# Every way through the formats once; the rest of the settings is slow.
FAST = [
  'gru, fixed weights of a shared expert, bias',
  'Cartesian',
  'Hash',
  'dense',
]


@pytest.mark.parametrize('name', fast_only(FAST, VARIANTS))
def test_the_release_computes_the_same(name: str, tmp_path: Path) -> None:
  model = make(VARIANTS[name], tmp_path)
  ids = np.random.default_rng(1).integers(23, size=(2, 9))
  ours, theirs = hf.logits(tmp_path, ids), model.logits(ids)
  assert abs(ours - theirs).max() < 2e-5 * abs(theirs).max()


@pytest.mark.parametrize('name', fast_only(FAST, VARIANTS))
def test_written_out_again_it_is_the_same(name: str, tmp_path: Path) -> None:
  keys = VARIANTS[name]
  tensors = make(keys, tmp_path / 'a').tensors
  layout, config = formats.read(tmp_path / 'a')
  _, params = hf.load(tmp_path / 'a')
  (tmp_path / 'b').mkdir()
  export(tmp_path / 'b', config, params, layout)

  written = load_file(tmp_path / 'b' / 'model.safetensors')
  assert written.keys() == tensors.keys()
  for tensor in tensors:
    np.testing.assert_array_equal(written[tensor], tensors[tensor], tensor)
  again = json.loads((tmp_path / 'b' / 'config.json').read_text())
  assert again.keys() >= keys.keys() - {'num_key_value_heads', 'rope_theta'}
  # The released code builds the same modules from it, and reads the same.
  rmoe = layout == 'rmoe'
  shapes = oracle.rmoe_shapes if rmoe else oracle.cartesian_shapes
  assert shapes(again) == {key: t.shape for key, t in tensors.items()}
  ids = np.random.default_rng(2).integers(23, size=(1, 5))
  code = oracle.RMoE if rmoe else oracle.CartesianMoE
  np.testing.assert_array_equal(
    code(again, written).logits(ids), code(keys, tensors).logits(ids)
  )


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('name', fast_only(['rnn'], ['rnn', 'Hash']))
def test_shards_of_a_small_dtype(name: str, dtype: str, tmp_path: Path) -> None:
  make(VARIANTS[name], tmp_path / 'a')
  layout, config = formats.read(tmp_path / 'a')
  _, params = hf.load(tmp_path / 'a')
  for folder, most in (('whole', 0), ('shards', 9_000)):
    (tmp_path / folder).mkdir()
    export(
      tmp_path / folder,
      config,
      params,
      layout,
      dtype=dtype,
      max_shard_bytes=most,
    )
  files = sorted((tmp_path / 'shards').glob('*.safetensors'))
  assert len(files) > 1
  for file in files:
    tensors = load_file(file)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {dtype}
    assert sum(t.nbytes for t in tensors.values()) <= 9_000 or len(tensors) == 1
  ids = np.random.default_rng(1).integers(23, size=(2, 5))
  np.testing.assert_array_equal(
    hf.logits(tmp_path / 'shards', ids), hf.logits(tmp_path / 'whole', ids)
  )
