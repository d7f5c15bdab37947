"""Settings of routers that contradict each other are refused, both named."""

from typing import Any

import pytest

from moe_jax import config as config_lib
from moe_jax.config import conflicts
from moe_jax.errors import UserError
from tests.helpers import tiny

# What breaks each rule, in the order of `conflicts.RULES`.
BROKEN = (
  {'router.score': 'hash', 'router.recurrent': 'gru'},
  {'router.bias': True, 'router.score': 'cosine'},
  {'router.passing': 'detached'},
  {'router.projector': 'shared'},
  {'router.residual_detached': True},
  {'moe.quantization': 'int8', 'moe.dispatch': 'capacity'},
  {'router.score': 'hash', 'router.jitter': 0.1},
  {'router.score': 'hash', 'router.residual': 0.5},
  {'router.score': 'hash', 'loss.z_weight': 0.1},
  {'router.score': 'hash', 'optimizer.freeze': 'router'},
  {'router.selection': 'top_p', 'moe.dispatch': 'capacity'},
  {'router.selection': 'top_p', 'router.weights': 'sigmoid'},
  {'router.weights': 'chosen', 'moe.renormalize': False},
  {'router.weights': 'chosen', 'moe.top_k': 1},
  {'router.groups': 2, 'router.top_groups': 3},
  {'loss.bias_rate': 0.001, 'router.score': 'random'},
  {'loss.bias_rate': 0.001, 'optimizer.freeze': 'router'},
  {'loss.balance_scope': 'sequence', 'loss.balance_layers': 'joined'},
  {'eval.disable_top': 1, 'eval.evaluations': 'perplexity,robustness'},
  {'optimizer.freeze': 'router_and_cell'},
)
NUMBERS = {
  'no layer before': (
    {'router.residual': 0.5, 'model.num_layers': 1},
    ['router.residual = 0.5', 'only one', 'router.residual = 0'],
  ),
  'too few groups': (
    {'router.groups': 4, 'moe.top_k': 3},
    ['moe.top_k = 3', 'the 2 experts', 'router.top_groups = 1'],
  ),
  'too many disabled': (
    {'eval.disable_top': 7},
    ['eval.disable_top = 7', '1 of 8 experts', 'moe.top_k = 2', '6 is the'],
  ),
  'all disabled': (
    {'eval.disable_top': 8, 'router.selection': 'top_p'},
    ['0 of 8 experts', "router.selection = 'top_p'", '7 is the most'],
  ),
  'too many of several': (
    {'eval.robustness': '1,7', 'eval.evaluations': 'robustness'},
    ['eval.robustness = 7', '1 of 8 experts', 'moe.top_k = 2', '6 is the'],
  ),
  'no numbers': (
    {'eval.robustness': '1,-2'},
    ["eval.robustness = '1,-2'", 'at least 1', 'such as 1,2'],
  ),
  'a number twice': (
    {'eval.robustness': '1,1'},
    ["eval.robustness = '1,1'", 'each once'],
  ),
  'robustness of nothing': (
    {'moe.num_experts': 0, 'eval.evaluations': 'robustness'},
    ["eval.evaluations = 'robustness'", 'moe.num_experts = 0', 'leave'],
  ),
  'recurrence of nothing': (
    {'moe.num_experts': 0, 'router.recurrent': 'gru'},
    ["router.recurrent = 'gru'", 'moe.num_experts = 0', "= 'none'"],
  ),
  'nothing to quantize': (
    {'moe.num_experts': 0, 'moe.quantization': 'int8'},
    ["moe.quantization = 'int8'", 'moe.num_experts = 0', "= ''"],
  ),
  'nothing to disable': (
    {'moe.num_experts': 0, 'eval.disable_top': 1},
    ['eval.disable_top = 1', 'moe.num_experts = 0', '= 0'],
  ),
  'groups of unequal size': (
    {'router.groups': 3},
    ['moe.num_experts = 8', 'router.groups = 3', '6 or 9'],
  ),
  'shared parts': (
    {'moe.shared.width': 6, 'moe.shared.parts': 4, 'moe.factors': 2},
    ['moe.shared.width = 6', 'moe.shared.parts = 2 x 4 = 8'],
  ),
}


def message(values: dict[str, Any]) -> str:
  with pytest.raises(UserError) as error:
    config_lib.validate(tiny.config(**values), num_devices=1)
  assert '\n' not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize('place', range(len(conflicts.RULES)))
def test_a_conflict_names_both_keys_and_the_remedy(place: int) -> None:
  rule, said = conflicts.RULES[place], message(BROKEN[place])
  for key in rule.keys:
    assert f'{key} = ' in said
  assert said.endswith(rule.why)


def test_every_rule_has_its_case() -> None:
  assert len(BROKEN) == len(conflicts.RULES)


@pytest.mark.parametrize('name', NUMBERS)
def test_numbers_that_do_not_fit_are_named(name: str) -> None:
  values, fragments = NUMBERS[name]
  said = message(values)
  for fragment in fragments:
    assert fragment in said


def test_of_a_dense_model_only_what_would_have_an_effect_is_refused() -> None:
  values = {'moe.num_experts': 0, 'router.passing': 'none'}
  config_lib.validate(tiny.config(**values), num_devices=1)


def test_a_cartesian_layer_has_a_sub_layer_before() -> None:
  values = {'router.residual': 0.5, 'model.num_layers': 1, 'moe.factors': 2}
  config_lib.validate(tiny.config(**values), num_devices=1)
