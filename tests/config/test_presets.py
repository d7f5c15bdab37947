"""Presets and variants: all valid, and of the sizes their papers publish."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import cartesian_moe, quickstart, rmoe
from moe_jax import config as config_lib
from moe_jax.config import loading, presets, schema
from moe_jax.data import sources, tokenizers
from moe_jax.errors import UserError
from tests.helpers import published

CONFIGS = Path(__file__).parents[2] / 'configs'
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
  return loading.load(argument)


@pytest.mark.parametrize('name', every_name())
def test_every_preset_is_valid(name: str) -> None:
  config = load(name)
  for num_devices in (1, 8):
    config_lib.validate(config, num_devices)
  keys = config_lib.flatten(config.to_dict()).keys()
  assert keys == config_lib.flatten(config_lib.get_config().to_dict()).keys()


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
  if config.router.score == 'hash':
    return sub_layers * mixing
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


@pytest.mark.parametrize('names', published.CARTESIAN)
def test_cartesian_sizes(names: str) -> None:
  config = cartesian_moe.get_config(names)
  total, active = published.CARTESIAN[names]
  assert parameters(config) == pytest.approx(total, abs=0.15)
  if active:
    assert parameters(config, active=True) == pytest.approx(active, abs=0.15)


def test_seven_billion() -> None:
  for names in ('7b', '7b,smoe_share', '7b,fine_grained'):
    config = cartesian_moe.get_config(names)
    total, active = published.SEVEN_B
    assert round(parameters(config) / 1e3, 2) == total
    assert round(parameters(config, active=True) / 1e3, 2) == active


def span_decoder_parameters(config: ConfigDict) -> int:
  """RMoE's small models, by what their released code makes.

  With h the hidden size, N experts, p the state size: a linear map from a to b
  with a bias has a b + b parameters. Each block has four maps of attention, N
  ReLU experts of width h and four norms, one of them never applied.
  """
  h, n, p = (
    config.model.hidden_size,
    config.moe.num_experts,
    config.router.state_size,
  )
  width, e = config.router.mlp_width, config.router.reduced_size

  def linear(a: int, b: int) -> int:
    return a * b + b

  layers, v = config.model.num_layers, published.ENWIK8_SYMBOLS
  block = 4 * h * h + n * (linear(h, h) + linear(h, h)) + 4 * 2 * h
  rest = v * h + linear(h, v) + h // config.model.num_heads * config.model.span
  if config.router.recurrent != 'none':
    gates = {'rnn': 1, 'gru': 3, 'lstm': 4}[config.router.recurrent]
    if config.router.projector == 'shared':
      rest += gates * (linear(h, p) + linear(p, p))
      return layers * (block + linear(p, n)) + rest
    rest += gates * 2 * linear(p, p)
    return layers * (block + h * p + linear(p, n)) + rest
  block += {
    'linear': linear(h, n),
    'random': h * n,
    'cosine': h * n + 1,
    'mlp': linear(h, width) + linear(width, n),
    # An embedding of size h and the network that makes N x h weights and N
    # biases of it, beside the linear gate that it does not use.
    'hyper': h + linear(h, width) + linear(width, h * n + n) + linear(h, n),
    # The reduction, two sets of embeddings, the temperature and the gate.
    'xmoe': h * e + 2 * n * e + 1 + linear(h, n),
  }[config.router.score]
  return layers * block + rest


@pytest.mark.parametrize('names', published.RMOE)
def test_rmoe_sizes(names: str) -> None:
  total = span_decoder_parameters(rmoe.get_config(names))
  assert f'{total / 1e6:.2f}' == published.RMOE[names]


def test_idle_parameters_follow_the_router() -> None:
  """Whatever the order of the variants that led there."""

  def idle(names: str) -> int:
    return rmoe.get_config(names).model.idle_parameters

  norms, gates = 2 * 352, 352 * 16 + 16  # of a layer
  assert idle('enwik8_medium') == idle('enwik8_medium,xmoe,smoe') == norms
  assert idle('enwik8_medium,hyper') == norms + gates
  assert idle('enwik8_medium,xmoe') == norms + gates + 16 * 16
  assert idle('enwik8_medium,xmoe8') == norms + gates + 8 * 16
  assert idle('enwik8_medium,xmoe,xmoe_gru') == norms
  assert idle('pretrain_0.9b,hyper') == 0


def test_xmoe_with_and_without_recurrence() -> None:
  for names, recurrent, size in (
    ('xmoe8', 'none', 8),
    ('xmoe_gru', 'gru', 16),
    ('xmoe8,xmoe_gru', 'gru', 8),
    ('xmoe_gru,xmoe32', 'none', 32),
  ):
    router = rmoe.get_config(f'enwik8_medium,{names}').router
    assert router.score == 'xmoe'
    assert (router.recurrent, router.reduced_size) == (recurrent, size)


def test_ablations_compose() -> None:
  router = rmoe.get_config('enwik8_medium,np,r0.5,detach_r').router
  assert (router.recurrent, router.passing) == ('gru', 'none')
  assert (router.residual, router.residual_detached) == (0.5, True)
  router = rmoe.get_config('enwik8_medium,detach_r,r1.0').router
  assert (router.residual, router.residual_detached) == (1.0, True)
  assert not rmoe.get_config('enwik8_medium,xmoe').router.bias
  assert rmoe.get_config('enwik8_medium,xmoe,smoe_mlp').router.bias


def test_balance_weight_is_the_release_s() -> None:
  """0.01 of shares of assignments times such shares, with any counts."""
  config = rmoe.get_config('enwik8_medium')
  tokens, k, n = 10, config.moe.top_k, 3
  counts, sums = (
    (9, 7, 4),
    (5.0, 3.0, 2.0),
  )  # assignments; probabilities
  theirs = n * sum(
    (c / (tokens * k)) * (p / (tokens * k))
    for c, p in zip(counts, sums, strict=True)
  )
  ours = n * sum(
    (c / tokens) * (p / tokens) for c, p in zip(counts, sums, strict=True)
  )
  assert config.loss.balance_weight * ours == pytest.approx(0.01 * theirs)


def test_top3_has_the_parameters_of_a_shared_expert() -> None:
  for names, width in (('base', 3264), ('large', 4352)):
    config = cartesian_moe.get_config(f'{names},smoe_top3')
    assert config.moe.expert_width == width
    assert (config.moe.top_k, config.moe.shared.width) == (3, 0)
    assert config.model.ffn_width == width * 16 // 17


def test_sft_is_three_epochs() -> None:
  config = rmoe.get_config('sft,freeze_router')
  assert config.train.steps == 3 * (52_002 // config.train.batch_size)
  assert config.optimizer.warmup_steps == round(0.03 * config.train.steps)
  assert config.optimizer.freeze == 'router'
  assert config.train.init_from == schema.REQUIRED
  pretrain = rmoe.get_config('pretrain_0.9b')
  assert config.moe == pretrain.moe and config.router == pretrain.router


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


def test_variants_of_the_quickstart_go_together() -> None:
  """A gate leaves the layers as they are, and the other way around."""
  config = load('quickstart:linear,xmoe')
  assert (config.moe.factors, config.router.score) == (1, 'xmoe')
  config = load('quickstart:cartesian,xmoe,top_p')
  assert (config.moe.factors, config.router.selection) == (2, 'top_p')
  assert config.router.recurrent == 'none'
  assert load('quickstart:both') == load('quickstart')


@pytest.mark.parametrize(
  'name, fragments',
  [
    (
      'cartesian_moe:larg',
      ["did you mean 'large'?", 'presets: base, large, 7b'],
    ),
    ('cartesian_moe:large,dens', ["did you mean 'dense'?", 'smoe_share']),
    ('cartesian_moe:dense,large', ["preset 'large' must come first"]),
    ('quickstart:gru', ["variant 'gru'", 'linear, rmoe, cartesian']),
    ('rmoe:smo', ["did you mean 'smoe'?"]),
    ('rmoe:np,moe.topk=2', ["no config key 'moe.topk'", "'moe.top_k'"]),
    ('quickstart:moe.top_k=two', ['moe.top_k', "'two'", 'a whole number']),
  ],
)
def test_unknown_names_are_refused(name: str, fragments: list[str]) -> None:
  with pytest.raises(UserError) as error:
    load(name)
  for fragment in fragments:
    assert fragment in str(error.value)


def test_a_variant_may_be_an_assignment() -> None:
  config = load('cartesian_moe:large,router.score=xmoe,moe.top_k=1,dense')
  assert config.router.score == 'xmoe'
  assert config.moe.top_k == 1
  assert config.moe.num_experts == 0  # the variant behind it
  # Without a preset's name the first one is meant.
  assert load('rmoe:moe.top_k=1').model == load('rmoe').model


def test_empty_names_mean_the_default() -> None:
  assert (
    presets.build('', config_lib.get_config(), {}, {})
    == config_lib.get_config()
  )
  assert cartesian_moe.get_config('').model.num_layers == 12


@pytest.mark.parametrize('preset', rmoe.PRESETS)
def test_the_vocabulary_is_known_without_the_data(
  preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  """A plan reads no corpus; `enwik8` has 204 bytes and <eos>."""

  def refuse(*_: object) -> None:
    raise AssertionError('the data was opened')

  monkeypatch.setattr(sources, 'open_splits', refuse)
  config = rmoe.get_config(preset)
  size = tokenizers.vocab_size(config.data, config.model.vocab_size)
  vocab_size = config_lib.vocab_size(config, size)
  expected = {'enwik8': 205, 'words': 267_735, 'bytes': 96_512}
  assert vocab_size == expected[config.data.tokenizer]
