"""Presets and variants: all valid, and of the sizes their papers publish."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base, cartesian_moe, quickstart, rmoe, variants
from moe_jax import config as config_lib
from moe_jax import config_file, saved_config
from moe_jax.errors import UserError

CONFIGS = Path(__file__).parents[1] / 'configs'
FILES = {'quickstart': quickstart, 'rmoe': rmoe, 'cartesian_moe': cartesian_moe}


def every_name() -> list[str]:
  """`file:preset,variant` for all there are."""
  names = []
  for file, module in FILES.items():
    presets = list(getattr(module, 'PRESETS', {}))
    names += [file, *(f'{file}:{preset}' for preset in presets)]
    for variant in module.VARIANTS:
      names += [f'{file}:{preset},{variant}' for preset in presets]
      names.append(f'{file}:{variant}')
  return names


def load(name: str) -> ConfigDict:
  file, _, names = name.partition(':')
  argument = str(CONFIGS / f'{file}.py') + (f':{names}' if names else '')
  return config_file.load(argument)


@pytest.mark.parametrize('name', every_name())
def test_every_preset_is_valid(name: str) -> None:
  config = load(name)
  for num_devices in (1, 8):
    config_lib.validate(config, num_devices)
  keys = saved_config.flatten(config.to_dict()).keys()
  assert keys == saved_config.flatten(base.get_config().to_dict()).keys()


def ffn_parameters(config: ConfigDict, active: bool) -> int:
  """Parameters of all feed-forward networks, SwiGLU: three matrices each.

  A Cartesian layer has `factors` sub-layers of experts `factors` times
  narrower, so the factors cancel out.
  """
  model, moe = config.model, config.moe
  kinds = config_lib.layer_kinds(config)
  experts = moe.top_k if active else moe.num_experts
  width = kinds.count('dense') * model.ffn_width
  width += kinds.count('moe') * (experts * moe.expert_width + moe.shared.width)
  return 3 * model.hidden_size * width


def router_parameters(config: ConfigDict) -> int:
  """Routers, and the two-way mixing of every sub-layer with a shared expert."""
  sub_layers = config_lib.layer_kinds(config).count('moe') * config.moe.factors
  h, n, p = (
    config.model.hidden_size,
    config.moe.num_experts,
    config.router.state_size,
  )
  mixing = 2 * h + 2 if config.moe.shared.width else 0
  if config.router.recurrent == 'none':
    return sub_layers * (h * n + mixing)
  gru = 2 * (3 * p * p + 3 * p)
  return sub_layers * (h * p + p * n + mixing) + gru


def attention_parameters(config: ConfigDict) -> int:
  return config.model.num_layers * 4 * config.model.hidden_size**2


def parameters(config: ConfigDict, active: bool = False) -> float:
  """Millions of parameters, norms left out (0.1 M at most)."""
  embeddings = 2 * config.model.vocab_size * config.model.hidden_size
  parts = (
    embeddings,
    attention_parameters(config),
    ffn_parameters(config, active),
    router_parameters(config),
  )
  return sum(parts) / 1e6


@pytest.mark.parametrize(
  'names, total, active',
  [  # CartesianMoE, sizes as published
    ('base', 842.0, 247.5),
    ('base,smoe_share', 842.0, 247.4),
    ('base,no_shared', 799.6, 205.0),
    ('base,dense', 162.4, 162.4),
    ('large', 2884.6, 770.7),
    ('large,smoe_share', 2884.4, 770.5),
    ('large,no_shared', 2733.6, 619.6),
    ('large,dense', 468.2, 468.2),
  ],
)
def test_cartesian_sizes(names: str, total: float, active: float) -> None:
  config = cartesian_moe.get_config(names)
  assert parameters(config) == pytest.approx(total, abs=0.15)
  assert parameters(config, active=True) == pytest.approx(active, abs=0.15)


def test_three_factors_have_the_parameters_of_two() -> None:
  for names in ('base', 'large'):
    two = parameters(cartesian_moe.get_config(names))
    three = parameters(cartesian_moe.get_config(f'{names},three_factors'))
    assert three == pytest.approx(two, rel=0.003)


def test_rmoe_counts_as_the_docstring_tells_them() -> None:
  config = rmoe.get_config()
  without_attention = ffn_parameters(config, False) + router_parameters(config)
  embeddings = 2 * config.model.vocab_size * config.model.hidden_size
  attention = attention_parameters(config)
  assert round(without_attention / 1e6) == 665
  assert round((without_attention + embeddings) / 1e6) == 912
  assert round((without_attention + attention) / 1e6) == 822
  assert round(parameters(config)) == 1069


def test_variants_apply_in_order_after_the_preset() -> None:
  config = load('cartesian_moe:large,no_shared,recurrent')
  assert config.model.num_layers == 24
  assert config.moe.shared.width == 0
  assert config.router.recurrent == 'gru'
  assert load('quickstart:cartesian').router.recurrent == 'none'
  assert load('quickstart:rmoe').moe.factors == 1
  assert load('quickstart').moe.factors == 2


@pytest.mark.parametrize(
  'name, fragments',
  [
    ('cartesian_moe:larg', ["did you mean 'large'?", 'presets: base, large']),
    ('cartesian_moe:large,dens', ["did you mean 'dense'?", 'smoe_share']),
    ('cartesian_moe:dense,large', ["preset 'large' must come first"]),
    ('quickstart:lstm', ["variant 'lstm'", 'linear, rmoe, cartesian']),
    ('rmoe:smo', ["did you mean 'smoe'?"]),
  ],
)
def test_unknown_names_are_refused(name: str, fragments: list[str]) -> None:
  with pytest.raises(UserError) as error:
    load(name)
  for fragment in fragments:
    assert fragment in str(error.value)


def test_empty_names_mean_the_default() -> None:
  assert variants.build('', base.get_config(), {}, {}) == base.get_config()
  assert cartesian_moe.get_config('').model.num_layers == 12
