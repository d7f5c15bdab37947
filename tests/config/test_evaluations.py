"""`eval.evaluations`: names, and options that override the section's keys."""

import pytest

from moe_jax.config import evaluations
from moe_jax.config.evaluations import Asked
from moe_jax.errors import UserError
from moe_jax.registry import EVALUATIONS
from tests.helpers import registries, tiny


@pytest.fixture(autouse=True)
def mine(monkeypatch: pytest.MonkeyPatch) -> None:
  registries.forget(monkeypatch, EVALUATIONS)
  EVALUATIONS.register('mine')(object)


def asked(text: str, **keys: object) -> list[Asked]:
  """What is asked for beside eval.every = 200, split validation, batches 4."""
  config = tiny.config(eval__evaluations=text, eval__batches=4, **keys)
  return evaluations.asked(config)


USUAL = Asked('perplexity', 200, 'validation', 4)


@pytest.mark.parametrize(
  'text, expected',
  [
    ('perplexity', [USUAL]),
    ('mine, perplexity', [USUAL._replace(name='mine'), USUAL]),
    (
      'perplexity,mine:every=1000:split=test:batches=8',
      [USUAL, Asked('mine', 1000, 'test', 8)],
    ),
    (
      ' perplexity : batches = 0 , perplexity:split=test',
      [USUAL._replace(batches=0), USUAL._replace(split='test')],
    ),
    # A split with colons, and what may follow it.
    ('mine:split=train[:3%]', [Asked('mine', 200, 'train[:3%]', 4)]),
    (
      'mine:split=train[5:9]+test[:3%]:every=5',
      [Asked('mine', 5, 'train[5:9]+test[:3%]', 4)],
    ),
  ],
)
def test_options_override_the_section(text: str, expected: list[Asked]) -> None:
  assert asked(text) == expected


def test_an_interval_of_zero_is_no_evaluation_during_training() -> None:
  both = tiny.config(eval__evaluations='perplexity, mine:every=7')
  both.eval.every = 0
  [left] = evaluations.during_training(both)
  assert left.name == 'mine' and len(evaluations.asked(both)) == 2


def test_a_split_that_is_named_is_that_of_all() -> None:
  wanted = asked('perplexity, perplexity:split=test, mine:batches=1')
  found = evaluations.of_split(wanted, 'train[:1%]')
  assert [(each.name, each.split) for each in found] == [
    ('perplexity', 'train[:1%]'),
    ('mine', 'train[:1%]'),
  ]
  assert evaluations.of_split(wanted, None) == wanted


@pytest.mark.parametrize(
  'text, parts',
  [
    ('mine:evry=5', ["option of mine in eval.evaluations = 'evry'", "'every'"]),
    (
      'mine:every=x',
      ["every of mine = 'x' must be a whole number"],
    ),
    ('mine:every=-1', ['every of mine = -1 must be at least 0']),
    ('mine:split=', ["split of mine = '' must be a name, not empty"]),
    ('mine:batches=1:batches=2', ['gives batches twice']),
    ('mine:1000', ["'mine:1000' must be a name", 'mine:every=...:split=...']),
    ('tasks:split=test', ['tasks have splits of their own']),
    ('mine,mine:every=5', ['asks twice for mine', "split 'validation'"]),
  ],
)
def test_what_cannot_be_meant_is_one_line(text: str, parts: list[str]) -> None:
  with pytest.raises(UserError) as error:
    asked(text)
  for part in ('eval.evaluations', *parts):
    assert part in str(error.value)
