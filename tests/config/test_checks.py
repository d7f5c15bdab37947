"""Checks of configs, the sizes that follow from them, and their saved form."""

import json
import re

import pytest
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.config import saved
from moe_jax.errors import UserError


def make(**values: object) -> ConfigDict:
  """The base config with keys changed, written `moe__top_k=2`."""
  config = config_lib.get_config()
  config.update_from_flattened_dict(
    {key.replace('__', '.'): value for key, value in values.items()}
  )
  return config


def test_base_is_valid_on_any_number_of_devices_dividing_its_batch() -> None:
  for num_devices in (1, 2, 8, 16):
    config_lib.validate(config_lib.get_config(), num_devices)


# num_devices is 8 in all of them.
BAD = {
  'top_k above the experts': (
    {'moe__top_k': 9},
    ['moe.top_k = 9', 'moe.num_experts = 8'],
  ),
  'negative': ({'train__steps': -1}, ['train.steps = -1', 'at least 1']),
  'zero width': ({'model__ffn_width': 0}, ['model.ffn_width = 0']),
  'nan': (
    {'optimizer__learning_rate': float('nan')},
    ['optimizer.learning_rate = nan', 'above 0'],
  ),
  'infinite': ({'optimizer__clip_norm': float('inf')}, ['clip_norm = inf']),
  'more threads than there are': (
    {'data__threads': 10**12},
    ['data.threads = 1000000000000', 'between 1 and 1024'],
  ),
  'steps beyond int32': (
    {'optimizer__warmup_steps': 3_000_000_000},
    ['optimizer.warmup_steps = 3000000000', 'and 2147483646'],
  ),
  'a long sequence': ({'data__seq_len': 10**11}, ['between 1 and 16777216']),
  'tokens beyond int32': (
    {'data__seq_len': 2**24, 'train__batch_size': 128},
    ['train.batch_size x data.seq_len = 128 x 16777216', '2147483647'],
  ),
  'evaluated tokens beyond int32': (
    {'data__seq_len': 2**24, 'eval__batch_size': 1024},
    ['eval.batch_size x data.seq_len = 1024 x 16777216', '2147483647'],
  ),
  'a large batch': (
    {'eval__batch_size': 2**63},
    ['eval.batch_size = 9223372036854775808', 'between 0 and 1048576'],
  ),
  'more digits than a float has': (
    {'train__steps': 10**400},
    ['train.steps = 1000', 'at most 2147483647'],
  ),
  'evaluations': (
    {'eval__evaluations': 'perplexity, perplexit'},
    ["eval.evaluations = 'perplexit'", "did you mean 'perplexity'?"],
  ),
  'an option of an evaluation': (
    {'eval__evaluations': 'perplexity:spilt=test'},
    ["perplexity in eval.evaluations = 'spilt'", "did you mean 'split'?"],
  ),
  'a trace of no steps': ({'train__profile': '3:0'}, ['START:STEPS', '10:5']),
  'share': (
    {'optimizer__final_fraction': 1.5},
    ['optimizer.final_fraction = 1.5', 'between 0 and 1'],
  ),
  'beta of one': ({'optimizer__b2': 1.0}, ['optimizer.b2 = 1.0', 'below 1']),
  'empty name': ({'eval__split': ''}, ["eval.split = ''"]),
  'choice': (
    {'moe__dispatch': 'droples'},
    ["moe.dispatch = 'droples'", "did you mean 'dropless'?", 'capacity'],
  ),
  'score': ({'router__score': 'cosin'}, ["router.score = 'cosin'", 'linear']),
  'dtype': ({'model__dtype': 'float16'}, ['model.dtype', 'bfloat16']),
  'heads do not divide the width': (
    {'model__num_heads': 3, 'model__num_kv_heads': 3},
    ['model.hidden_size = 256', 'model.num_heads = 3', '255 or 258'],
  ),
  'key/value heads': (
    {'model__num_kv_heads': 3},
    ['model.num_heads = 4', 'model.num_kv_heads = 3'],
  ),
  'a span of nothing': (
    {'model__positions': 'span', 'data__order': 'contiguous'},
    ['model.span = 0', 'model.positions'],
  ),
  'a span for rotary positions': (
    {'model__span': 8},
    ['model.span = 8', "model.positions = 'rotary'"],
  ),
  'a memory of shuffled windows': (
    {'model__positions': 'span', 'model__span': 8},
    ["model.positions = 'span'", "data.order = 'shuffled'"],
  ),
  'odd heads': (
    {'model__head_dim': 5},
    ['head size 5', 'model.head_dim', 'odd'],
  ),
  'factors': (
    {'moe__factors': 3},
    ['moe.expert_width = 512', 'moe.factors = 3', '510 or 513'],
  ),
  'shared width': (
    {'moe__factors': 2, 'moe__shared__width': 7},
    ['moe.shared.width = 7', 'moe.factors = 2'],
  ),
  'no MoE layer': (
    {'moe__first_dense': 4},
    ['moe.first_dense = 4', 'model.num_layers = 4', 'moe.num_experts = 0'],
  ),
  'warm-up': (
    {'optimizer__decay_steps': 50},
    ['optimizer.warmup_steps = 50', 'optimizer.decay_steps = 50'],
  ),
  'text_folder': ({'data__name': 'text_folder'}, ["data.path = ''"]),
  'mesh product': (
    {'mesh__data': 2, 'mesh__expert': 3},
    [
      'mesh.data x mesh.fsdp x mesh.expert x mesh.context x mesh.tensor'
      ' = 2 x 1 x 3 x 1 x 1 = 6',
      'number of devices is 8',
      '-1',
    ],
  ),
  'mesh does not divide': (
    {'mesh__expert': 3},
    ['mesh.context x mesh.tensor = 1 x 3 x 1 x 1 = 3', 'devices, 8'],
  ),
  'two free axes': (
    {'mesh__fsdp': -1},
    ['mesh.data and mesh.fsdp are both -1'],
  ),
  'axis of nothing': ({'mesh__tensor': 0}, ['mesh.tensor = 0']),
  'batch': (
    {'train__batch_size': 12},
    ['train.batch_size = 12', '8 x 1 x 1 = 8', '8 or 16'],
  ),
  'batch with accumulation': (
    {'train__batch_size': 8, 'train__accumulation': 2},
    ['train.batch_size = 8', 'train.accumulation = 8 x 1 x 1 x 2 = 16'],
  ),
  'evaluation batch': ({'eval__batch_size': 4}, ['eval.batch_size = 4']),
  'experts on devices': (
    {'mesh__expert': 4, 'moe__num_experts': 6},
    ['moe.num_experts = 6', 'mesh.expert = 4', '1, 2, 3, 6 would'],
  ),
  'more devices than experts': (
    {'mesh__expert': 8, 'moe__num_experts': 4},
    [
      'mesh.expert = 8 does not divide moe.num_experts = 4',
      'mesh.expert = 4 would be right with mesh.tensor = 2',
      'or with mesh.data = 2',
    ],
  ),
  'exchange of another dispatch': (
    {'moe__exchange': 'ragged', 'moe__dispatch': 'capacity'},
    ["moe.exchange = 'ragged'", "moe.dispatch = 'capacity'", 'all_to_all'],
  ),
  'width on devices': (
    {'mesh__tensor': 4, 'moe__expert_width': 514},
    ['moe.expert_width = 514', 'mesh.tensor = 1 x 4 = 4'],
  ),
  'heads on devices': (
    {'mesh__tensor': 8},
    ['model.num_heads = 4', 'mesh.tensor = 8'],
  ),
  'positions on devices': (
    {'mesh__context': 8, 'data__seq_len': 100},
    ['data.seq_len = 100', 'mesh.context = 8', '96 or 104 would'],
  ),
  'heads in place of positions': (
    {'mesh__context': 4, 'mesh__tensor': 2},
    ['model.num_heads = 4', 'mesh.context x mesh.tensor = 4 x 2 = 8'],
  ),
  'positions and a span': (
    {
      'mesh__context': 2,
      'model__positions': 'span',
      'model__span': 8,
      'data__order': 'contiguous',
    },
    ["model.positions = 'span'", 'set mesh.context = 1'],
  ),
  'parameters on devices': (
    {
      'mesh__fsdp': 8,
      'mesh__data': 1,
      'model__hidden_size': 260,
      'model__head_dim': 64,
    },
    ['model.hidden_size = 260', 'mesh.fsdp = 8'],
  ),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_values_are_refused_with_both_numbers(name: str) -> None:
  values, fragments = BAD[name]
  with pytest.raises(UserError) as error:
    config_lib.validate(make(**values), num_devices=8)
  for fragment in fragments:
    assert fragment in str(error.value)
  assert '\n' not in str(error.value)


def test_experts_are_not_checked_in_a_dense_model() -> None:
  config_lib.validate(make(moe__num_experts=0, moe__expert_width=7), 1)


def test_mesh_shape_gives_the_free_axis_what_is_left() -> None:
  config = make(mesh__expert=4, mesh__tensor=2)
  shape = config_lib.mesh_shape(config, num_devices=16)
  sizes = {'data': 2, 'fsdp': 1, 'expert': 4, 'context': 1, 'tensor': 2}
  assert shape == sizes


@pytest.mark.parametrize(
  'values, kinds',
  [
    ({}, 'mmmm'),
    ({'moe__every': 2}, 'mdmd'),  # CartesianMoE: from the first
    ({'moe__every': 2, 'moe__offset': 1}, 'dmdm'),
    ({'moe__first_dense': 1}, 'dmmm'),
    ({'moe__every': 2, 'moe__first_dense': 1}, 'ddmd'),
    ({'moe__offset': 2}, 'ddmm'),  # counted from the third, not before it
    ({'moe__num_experts': 0}, 'dddd'),
  ],
)
def test_layer_kinds(values: dict[str, int], kinds: str) -> None:
  assert ''.join(
    kind[0] for kind in config_lib.layer_kinds(make(**values))
  ) == (kinds)


def test_a_trial_shorter_than_the_warm_up_still_has_a_schedule() -> None:
  config = make(train__steps=20, optimizer__warmup_steps=50)
  config_lib.validate(config, 1)
  assert config_lib.decay_end(config) == 51


def test_json_gives_back_an_equal_config() -> None:
  config = make(optimizer__learning_rate=0.1 + 0.2)
  again = saved.from_json(saved.to_json(config))
  assert again.to_dict() == config.to_dict()
  assert again.is_locked


@pytest.mark.parametrize(
  'values, changed',
  [
    ({}, []),
    ({'mesh__data': 2, 'eval__batches': 3, 'checkpoint__keep': 9}, []),
    ({'data__dir': '/x', 'data__threads': 9, 'train__log_every': 1}, []),
    ({'model__remat': 'full', 'model__unroll': 2, 'data__path': '/y'}, []),
    ({'moe__top_k': 1, 'seed': 1}, ['moe.top_k', 'seed']),
    ({'train__steps': 2000}, ['train.steps']),
    # The decay ended at train.steps = 1000 before and still does.
    ({'train__steps': 2000, 'optimizer__decay_steps': 1000}, []),
    ({'optimizer__decay_steps': 500}, ['optimizer.decay_steps']),
  ],
)
def test_changed_meaning(values: dict[str, object], changed: list[str]) -> None:
  old, new = config_lib.get_config().to_dict(), make(**values).to_dict()
  assert sorted(saved.changed_meaning(old, new)) == sorted(changed)


def test_longer_training_names_its_remedy() -> None:
  old, new = (
    config_lib.get_config().to_dict(),
    make(train__steps=2000).to_dict(),
  )
  message = saved.describe(['train.steps'], old, new)
  assert 'train.steps was 1000, now 2000' in message
  assert '--config.optimizer.decay_steps=1000' in message


def test_a_key_younger_than_the_run_has_its_default() -> None:
  old = make(moe__top_k=1).to_dict()
  del old['moe']['bias'], old['router'], old['seed']
  read = saved.from_json(json.dumps(old))
  assert read.to_dict() == make(moe__top_k=1).to_dict()
  old['moe']['forgotten'] = 3  # a key that exists no longer stays, to be seen
  read = saved.from_json(json.dumps(old)).to_dict()
  new = make(moe__top_k=1).to_dict()
  assert saved.changed_meaning(read, new) == ['moe.forgotten']


def test_a_key_of_another_version_counts_as_changed() -> None:
  old, new = (
    config_lib.get_config().to_dict(),
    config_lib.get_config().to_dict(),
  )
  del old['moe']['bias']
  assert saved.changed_meaning(old, new) == ['moe.bias']
  assert saved.changed_meaning(new, old) == ['moe.bias']
  message = saved.describe(['moe.bias'], old, new)
  assert re.search("moe.bias was 'absent', now False", message)
  del old['eval'], old['optimizer']['decay_steps']
  assert saved.changed_meaning(old, new) == [
    'moe.bias',
    'optimizer.decay_steps',
  ]


def test_evaluation_may_change_all_but_the_model() -> None:
  old = config_lib.get_config().to_dict()
  new = make(train__batch_size=3, data__name='c4', moe__dispatch='capacity')
  assert saved.changed_model(old, new.to_dict()) == []
  other = make(moe__top_k=1, seed=5, data__tokenizer='gpt2').to_dict()
  assert sorted(saved.changed_model(old, other)) == [
    'data.tokenizer',
    'moe.top_k',
  ]


def test_the_bias_on_the_choice_is_part_of_the_model() -> None:
  without, slow, fast = (
    make(loss__bias_rate=rate).to_dict() for rate in (0.0, 0.001, 0.1)
  )
  assert saved.changed_model(slow, fast) == []
  for old, new in ((without, slow), (slow, without)):
    assert saved.changed_model(old, new) == ['loss.bias_rate']
