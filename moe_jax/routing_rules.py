"""Which settings of routers, selection and balance contradict each other."""

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from moe_jax import ranges
from moe_jax.errors import UserError

_BIASED = ('linear', 'mlp', 'hyper')  # scores


class Rule(NamedTuple):
  """A conflict.

  Attributes:
    broken: whether a config has it.
    keys: those that contradict each other, with their values in the message.
    why: what is wrong, and what would be right.
  """

  broken: Callable[[ConfigDict], bool]
  keys: tuple[str, ...]
  why: str


def _recurrent(config: ConfigDict) -> bool:
  return config.router.recurrent != 'none'


def _static(config: ConfigDict) -> bool:
  return config.router.score in ('random', 'hash')


RULES = (
  Rule(
    lambda c: c.router.score == 'hash' and _recurrent(c),
    ('router.score', 'router.recurrent'),
    "a hash reads no features, so nothing is recurrent: set 'none'",
  ),
  Rule(
    lambda c: c.router.score == 'hash' and c.router.jitter > 0,
    ('router.score', 'router.jitter'),
    'a hash reads no input that could be jittered: set 0',
  ),
  Rule(
    lambda c: c.router.bias and c.router.score not in _BIASED,
    ('router.bias', 'router.score'),
    'only the scores linear, mlp and hyper have a bias: set False',
  ),
  Rule(
    lambda c: c.router.passing != 'state' and not _recurrent(c),
    ('router.passing', 'router.recurrent'),
    "a router without memory passes nothing on: set 'state', or a cell",
  ),
  Rule(
    lambda c: c.router.projector != 'layerwise' and not _recurrent(c),
    ('router.projector', 'router.recurrent'),
    "a router without memory projects nothing: set 'layerwise', or a cell",
  ),
  Rule(
    lambda c: c.router.residual_detached and not c.router.residual,
    ('router.residual_detached', 'router.residual'),
    'there are no residual scores to detach: set a weight above 0',
  ),
  Rule(
    lambda c: c.router.selection == 'top_p' and c.moe.dispatch == 'capacity',
    ('router.selection', 'moe.dispatch'),
    'a token may choose any number of experts, so there is no balanced share'
    " to multiply: set moe.dispatch = 'dropless'",
  ),
  Rule(
    lambda c: c.router.selection == 'top_p' and c.router.weights == 'sigmoid',
    ('router.selection', 'router.weights'),
    "sigmoid scores do not sum to 1, as top_p needs: set 'softmax' or 'chosen'",
  ),
  Rule(
    lambda c: c.router.top_groups > c.router.groups,
    ('router.top_groups', 'router.groups'),
    'a token cannot choose from more groups than there are',
  ),
  Rule(
    lambda c: c.loss.bias_rate > 0 and _static(c),
    ('loss.bias_rate', 'router.score'),
    'a bias would undo what is fixed on purpose: set loss.bias_rate = 0',
  ),
  Rule(
    lambda c: (
      c.loss.balance_scope == 'sequence' and c.loss.balance_layers == 'joined'
    ),
    ('loss.balance_scope', 'loss.balance_layers'),
    "sequences are balanced layer by layer: set 'separate'",
  ),
  Rule(
    lambda c: (
      c.optimizer.freeze == 'router_and_cell'
      and not (_recurrent(c) and c.moe.num_experts)
    ),
    ('optimizer.freeze', 'router.recurrent'),
    "there is no cell to freeze: set 'router'",
  ),
)


def check(config: ConfigDict, sub_layers: int) -> None:
  """Refuses the first conflict.

  Args:
    config: of a model with experts, every key in its range.
    sub_layers: MoE sub-layers in all of its layers.

  Raises:
    UserError: names the keys, their values and what would be right.
  """
  for rule in RULES:
    if rule.broken(config):
      said = ' and '.join(
        f'{key} = {ranges.get(config, key)!r}' for key in rule.keys
      )
      raise UserError(f'{said} contradict each other: {rule.why}')
  _check_residual(config, sub_layers)
  _check_choice(config)


def _check_residual(config: ConfigDict, sub_layers: int) -> None:
  residual = config.router.residual
  if residual and sub_layers < 2:
    raise UserError(
      f'router.residual = {residual} adds the scores of the MoE sub-layer'
      f' before, but there is only one (model.num_layers ='
      f' {config.model.num_layers}, moe.every = {config.moe.every},'
      f' moe.factors = {config.moe.factors}); set router.residual = 0'
    )


def _check_choice(config: ConfigDict) -> None:
  """Enough experts are left to choose from."""
  moe, router, disabled = config.moe, config.router, config.eval.disable_top
  wanted = moe.top_k if router.selection == 'top_k' else 1
  left = moe.num_experts * router.top_groups // router.groups
  if router.top_groups < router.groups and left < wanted:
    raise UserError(
      f'moe.top_k = {wanted} is above the {left} experts that'
      f' router.top_groups = {router.top_groups} of router.groups ='
      f' {router.groups} leave of moe.num_experts = {moe.num_experts}'
    )
  if left - disabled < wanted:
    raise UserError(
      f'eval.disable_top = {disabled} leaves {max(left - disabled, 0)} of'
      f' {left} experts to choose from, too few for {wanted} (moe.top_k);'
      f' {left - wanted} is the most'
    )
