"""Sizes and costs: published ones, and others counted by hand."""

import pytest
from ml_collections import ConfigDict

from configs import cartesian_moe, rmoe
from moe_jax.model import sizes
from moe_jax.planning import abstract_setup
from tests.helpers import published, tiny

BYTES = 257  # V of the byte tokenizer


def count(config: ConfigDict) -> sizes.Parameters:
  setup = abstract_setup.on_one_device(config)
  params = setup.abstract['params']
  return sizes.count_parameters(config, params, setup.declarations)


def flops(config: ConfigDict) -> tuple[int, int]:
  """Of a token forward, and in training."""
  setup = abstract_setup.on_one_device(config)
  counted = config, setup.abstract['params'], setup.declarations
  forward = sizes.flops_per_token_forward(*counted)
  return forward, sizes.flops_per_token(*counted)


@pytest.mark.parametrize('names', published.CARTESIAN)
def test_published_sizes_of_cartesian_moe(names: str) -> None:
  config = cartesian_moe.get_config(names)
  total, active = published.CARTESIAN[names]
  counted = count(config)
  assert counted.total / 1e6 == pytest.approx(total, abs=0.1)
  if active:
    assert counted.active / 1e6 == pytest.approx(active, abs=0.1)


@pytest.mark.parametrize('names', published.RMOE)
def test_published_sizes_of_rmoe(names: str) -> None:
  config = rmoe.get_config(names)
  config.model.vocab_size = published.ENWIK8_SYMBOLS
  assert f'{count(config).total / 1e6:.2f}' == published.RMOE[names]


def test_published_sizes_in_billions() -> None:
  counted = count(cartesian_moe.get_config('7b'))
  found = round(counted.total / 1e9, 2), round(counted.active / 1e9, 2)
  assert found == published.SEVEN_B
  counted = count(rmoe.get_config('pretrain_15b'))
  assert (round(counted.total / 1e9), f'{counted.active / 1e9:.1f}') == (
    15,
    '2.7',
  )


def test_flops_of_the_recurrent_cartesian_model() -> None:
  config = tiny.config(**tiny.MODELS['cartesian rmoe'])
  attention = 4 * 32 * 32  # query, key, value and output, 4 heads of 8
  experts = 2 * 3 * 32 * 12  # top-2 of half of width 24, three matrices
  router = 32 * 16 + 16 * 8  # projector and score
  cell = 2 * 3 * 16 * 16  # input and state, three gates: once a sub-layer
  weights = 2 * (attention + 2 * (experts + router + cell)) + 32 * BYTES
  # 16 positions see 1 to 16 of them, 8.5 on average; twice in each layer a
  # vector of 32 meets each. A multiplication and an addition, and twice as
  # much backward.
  positions = 2 * 2 * 32 * 8.5
  once = weights + positions
  assert flops(config) == (2 * once, 6 * once)


def test_flops_of_a_dense_model() -> None:
  for tied in (False, True):  # a tied embedding is still the head
    config = tiny.config(moe__num_experts=0, model__tie_embeddings=tied)
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 48) + 32 * BYTES
    assert flops(config)[1] == 6 * (weights + 2 * 2 * 32 * 8.5)


def test_parameters_of_the_router() -> None:
  config = tiny.config(**tiny.MODELS['rmoe'])
  cell = 2 * (3 * 16 * 16 + 3 * 16)
  expected = cell + 2 * (32 * 16 + 16 * 8)
  assert count(config).router == expected


# Hidden size 32, state size 16, 8 experts, two layers: of each layer's router
# the parameters, and the multiplications of one token.
ROUTERS = {
  'mlp': (32 * 6 + 6 + 6 * 8 + 8, 32 * 6 + 6 * 8),
  'cosine': (8 * 32 + 1, 8 * 32),
  'xmoe': (32 * 4 + 8 * 4 + 1, 32 * 4 + 8 * 4),
  # The network works once a step; a token meets only the weights it makes.
  'hyper': (32 + 32 * 6 + 6 + (6 + 1) * (32 * 8 + 8), 32 * 8),
  'random': (32 * 8, 32 * 8),
  'hash': (0, 0),  # the table is no parameter, and looked up
}


@pytest.mark.parametrize('score', ROUTERS)
def test_routers_are_counted_by_hand(score: str) -> None:
  config = tiny.config(
    **{
      'router.score': score,
      'router.mlp_width': 6,
      'router.reduced_size': 4,
      'router.bias': score in ('mlp', 'hyper'),
    }
  )
  parameters, products = ROUTERS[score]
  linear = count(tiny.config())
  assert count(config).router == 2 * parameters
  assert count(config).total - linear.total == 2 * (parameters - 32 * 8)

  (forward, training), (linear, linear_training) = (
    flops(config),
    flops(tiny.config()),
  )
  assert forward - linear == 2 * 2 * (products - 32 * 8)
  # A fixed matrix has no gradient of its own, only passes one on.
  times = 2 * 2 if score == 'random' else 3 * 2
  assert training - linear_training == 2 * (times * products - 6 * 32 * 8)


@pytest.mark.parametrize('cell, gates', [('rnn', 1), ('gru', 3), ('lstm', 4)])
@pytest.mark.parametrize('projector', ['layerwise', 'shared'])
def test_cells_are_counted_by_hand(
  cell: str, gates: int, projector: str
) -> None:
  config = tiny.config(
    **{'router.recurrent': cell, 'router.projector': projector}
  )
  width, projectors = {'layerwise': (16, 2 * 32 * 16), 'shared': (32, 0)}[
    projector
  ]
  weights = gates * (width * 16 + 16 * 16)
  scores = 2 * 16 * 8
  expected = weights + gates * 2 * 16 + projectors + scores
  assert count(config).router == expected
  more = flops(config)[0] - flops(tiny.config())[0]
  # One cell, used in both layers.
  assert more == 2 * (2 * weights + projectors + scores - 2 * 32 * 8)


def test_idle_parameters_are_added_to_the_total() -> None:
  built, counted = (
    count(tiny.config(model__idle_parameters=idle)) for idle in (0, 1000)
  )
  assert counted.idle == 2 * 1000  # in each of two layers
  assert counted.total == built.total + 2 * 1000
  assert (counted.active, counted.router) == (built.active, built.router)


def test_top_p_counts_every_expert_as_active() -> None:
  counted = count(tiny.config(**{'router.selection': 'top_p'}))
  assert counted.active == counted.total
