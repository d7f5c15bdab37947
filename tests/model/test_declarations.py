"""Every shipped model's parameters, against a table of names written apart.

The library decides by what parameters declare. This table says the same by
their names, as an oracle: nothing else reads it.
"""

import re
from typing import Any

import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs import cartesian_moe, quickstart, rmoe
from moe_jax import config as config_lib
from moe_jax import parameter
from moe_jax.errors import UserError
from moe_jax.model import sizes
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.planning import abstract_setup
from moe_jax.training import optimizer
from tests.helpers import tiny

# A parameter's name and its spec; the first that fits counts.
SPECS = (
  (r'embed_VD', ('tensor', 'fsdp')),
  (r'head_DV', ('fsdp', 'tensor')),
  (r'(query|key|value)_D[HG]A', ('fsdp', 'tensor', None)),
  (r'out_HAD', ('tensor', None, 'fsdp')),
  (r'gate_up_D2F', ('fsdp', None, 'tensor')),
  (r'down_FD', ('tensor', 'fsdp')),
  (r'gate_up_ND2F', ('expert', 'fsdp', None, 'tensor')),
  (r'up_DF', ('fsdp', 'tensor')),
  (r'up_NDF', ('expert', 'fsdp', 'tensor')),
  (r'down_NFD', ('expert', 'tensor', 'fsdp')),
  (r'up_bias_NF', ('expert', 'tensor')),
  (r'down_bias_ND', ('expert', 'fsdp')),
  (r'.*', ()),  # whole on every device
)
UNDECAYED = (
  r'(scale|shift|key_pe)_.*|.*bias_.*|log_temperature'
  r'|(input|hidden)_[XR][34]?R'
)
ELEMENTWISE = (
  r'(scale|shift)_.*|.*bias_.*|log_temperature|fixed_table_VN|key_pe_AW'
  r'|embedding_X|fixed_up_XF|fixed_weights_FXN'
)
MESH = dict.fromkeys(mesh_lib.MESH_AXES, 1) | {
  'fsdp': 2,
  'expert': 2,
  'tensor': 2,
}
FILES = {'quickstart': quickstart, 'rmoe': rmoe, 'cartesian_moe': cartesian_moe}
SHIPPED = [
  (file, names)
  for file, module in FILES.items()
  for names in ('', *getattr(module, 'PRESETS', ()), *module.VARIANTS)
]
FAST = [('quickstart', ''), ('rmoe', 'enwik8_small'), ('cartesian_moe', '')]
# What no shipped model has.
MORE: dict[str, dict[str, Any]] = {
  'a bias on the choice': {'loss.bias_rate': 0.1, 'router.bias': True},
  'ReLU and a dense layer': {'model.activation': 'relu', 'moe.every': 2},
  'a span': {'model.positions': 'span', 'model.span': 16},
  'a frozen cell': {
    'router.recurrent': 'lstm',
    'optimizer.freeze': 'router_and_cell',
  },
  'its own head': {'model.tie_embeddings': False, 'model.head_bias': True},
}


def spec(name: str, ndim: int) -> P:
  axes = next(axes for pattern, axes in SPECS if re.fullmatch(pattern, name))
  return P(*(None,) * (ndim - len(axes)), *axes)


def label(keys: tuple[str, ...], freeze: str) -> str:
  if keys[-1] == 'choice_bias_N':
    return 'bias_updated'
  frozen = {'none': [], 'router': ['router']}.get(freeze, ['router', 'cell'])
  still = keys[-1].startswith('fixed_') or set(frozen) & set(keys)
  return 'frozen' if still else 'trained'


def uses(config: ConfigDict, keys: tuple[str, ...]) -> float:
  """How many matmuls of a token each element of the parameter is part of."""
  name = keys[-1]
  if name == 'fixed_weights_bias_XN':
    return 1
  if re.fullmatch(ELEMENTWISE, name):
    return 0
  if name == 'embed_VD':
    return int(config.model.tie_embeddings)
  if keys[0] == 'cell':
    return config_lib.layer_kinds(config).count('moe') * config.moe.factors
  if config.model.positions == 'span' and name in ('key_DGA', 'value_DGA'):
    return 1 + config.model.span / config.data.seq_len
  return 1


def check(config: ConfigDict) -> None:
  """Holds what is declared for a model to the table."""
  setup = abstract_setup.on_one_device(config)
  freeze = config.optimizer.freeze
  mesh = mesh_lib.abstract_mesh(MESH)
  shapes = setup.abstract['params']
  found = mesh_lib.shardings(shapes, shapes, setup.declarations, mesh)
  specs = parameter.flatten(found)
  labels = parameter.flatten(optimizer.labels(setup.declarations, freeze))
  decayed = parameter.flatten(optimizer.decayed(setup.declarations))
  declarations = parameter.flatten(setup.declarations)
  for keys, leaf in parameter.flatten(shapes).items():
    vocabulary = keys[-1] in ('embed_VD', 'head_DV')
    expected = spec(keys[-1], leaf.ndim)
    if vocabulary and leaf.shape[expected.index('tensor')] % 2:
      expected = P(*(axis if axis == 'fsdp' else None for axis in expected))
    assert specs[keys].spec == expected, keys
    assert labels[keys] == label(keys, freeze), keys
    if labels[keys] == 'trained':
      assert decayed[keys] != bool(re.fullmatch(UNDECAYED, keys[-1])), keys
    declared = declarations[keys]
    assert sizes._uses(config, declared) == uses(config, keys), keys
    assert (declared.passes == 2) == (
      keys[-1].startswith('fixed_') and keys[-1] != 'fixed_weights_bias_XN'
    )
    is_router = 'router' in keys or keys[-1] == 'choice_bias_N'
    parts = 'router' if is_router else 'cell' if 'cell' in keys else 'model'
    assert declared.part == parts, keys
    assert (parameter.EXPERT in declared.axes) == ('experts' in keys), keys
    assert declared.counted == (keys[-1] != 'fixed_table_VN')


@pytest.mark.parametrize(
  ('file', 'names'),
  [
    pytest.param(*each, marks=[] if each in FAST else [pytest.mark.slow])
    for each in SHIPPED
  ],
)
def test_shipped_models_declare_what_their_names_say(
  file: str, names: str
) -> None:
  check(FILES[file].get_config(names).copy_and_resolve_references())


@pytest.mark.parametrize('name', MORE)
def test_other_models_too(name: str) -> None:
  check(tiny.config(**MORE[name]))


def test_an_axis_that_does_not_divide_is_named() -> None:
  mesh = mesh_lib.abstract_mesh(
    dict.fromkeys(mesh_lib.MESH_AXES, 1) | {'expert': 3}
  )
  setup = abstract_setup.on_one_device(tiny.config())
  shapes = setup.abstract['params']
  with pytest.raises(UserError, match='mesh.expert = 3 does not divide 8'):
    mesh_lib.shardings(shapes, shapes, setup.declarations, mesh)
