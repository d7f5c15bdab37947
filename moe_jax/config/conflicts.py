"""Which settings of routers, selection and balance contradict each other."""

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from moe_jax.config import evaluations
from moe_jax.config.derived import get, is_read
from moe_jax.config.schema import KEYS
from moe_jax.errors import UserError


class Rule(NamedTuple):
  """A conflict between keys.

  Attributes:
    broken: Tells whether a config has the conflict.
    keys: The keys that contradict each other; the message has their values.
    why: Says what is wrong, and what would be right.
  """

  broken: Callable[[ConfigDict], bool]
  keys: tuple[str, ...]
  why: str


def _unread(key: str) -> Rule:
  """Returns the rule that a key keeps its default where nothing reads it."""
  default, only = KEYS[key].default, KEYS[key].only
  return Rule(
    lambda c: get(c, key) != default and not is_read(c, key),
    (key, only.split()[0]),
    f'{key} is read only with {only}: set {default!r}',
  )


def _recurrent(config: ConfigDict) -> bool:
  return config.router.recurrent != 'none'


def _static(config: ConfigDict) -> bool:
  return config.router.score in ('random', 'hash')


RULES = (
  # These say what a router does or how experts are multiplied, so where unread
  # they are mistakes; a width or a size may be left from another router.
  _unread('router.recurrent'),
  _unread('router.bias'),
  _unread('router.passing'),
  _unread('router.projector'),
  _unread('router.residual_detached'),
  _unread('moe.quantization'),
  Rule(
    lambda c: c.router.score == 'hash' and c.router.jitter > 0,
    ('router.score', 'router.jitter'),
    'a hash reads no input that could be jittered: set 0',
  ),
  Rule(
    lambda c: c.router.score == 'hash' and c.router.residual > 0,
    ('router.score', 'router.residual'),
    'a hash is the same table in every layer, so adding one changes no choice:'
    ' set 0',
  ),
  Rule(
    lambda c: c.router.score == 'hash' and c.loss.z_weight > 0,
    ('router.score', 'loss.z_weight'),
    'the logits of a hash are fixed, so nothing can make them smaller: set 0',
  ),
  Rule(
    lambda c: c.router.score == 'hash' and c.optimizer.freeze != 'none',
    ('router.score', 'optimizer.freeze'),
    "a hash is never trained, so there is no router to freeze: set 'none'",
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
    lambda c: c.router.weights == 'chosen' and not c.moe.renormalize,
    ('router.weights', 'moe.renormalize'),
    "a softmax over the chosen sums to 1: set True, or weights = 'softmax'",
  ),
  Rule(
    lambda c: (
      c.router.weights == 'chosen'
      and c.router.selection == 'top_k'
      and c.moe.top_k == 1
    ),
    ('router.weights', 'moe.top_k'),
    'the only weight is 1 whatever its logit, so the router would learn nothing'
    " of the model: set weights = 'softmax'",
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
    lambda c: c.loss.bias_rate > 0 and c.optimizer.freeze != 'none',
    ('loss.bias_rate', 'optimizer.freeze'),
    'a bias would go on moving the choices of a frozen router: set'
    ' loss.bias_rate = 0',
  ),
  Rule(
    lambda c: (
      c.loss.balance_scope == 'sequence' and c.loss.balance_layers == 'joined'
    ),
    ('loss.balance_scope', 'loss.balance_layers'),
    "sequences are balanced layer by layer: set 'separate'",
  ),
  Rule(
    lambda c: c.eval.disable_top > 0 and evaluations.asks_for_robustness(c),
    ('eval.disable_top', 'eval.evaluations'),
    'results of both would have one name: set eval.disable_top = 0 and name the'
    ' numbers in eval.robustness',
  ),
  Rule(
    lambda c: c.optimizer.freeze == 'router_and_cell' and not _recurrent(c),
    ('optimizer.freeze', 'router.recurrent'),
    "there is no cell to freeze: set 'router'",
  ),
)


# What a model without experts has to leave as it is: key and value.
_DENSE = {
  'moe.quantization': '',
  'router.recurrent': 'none',
  'router.residual': 0.0,
  'router.jitter': 0.0,
  'loss.bias_rate': 0.0,
  'optimizer.freeze': 'none',
  'train.router_gradients_every': 0,
  'eval.disable_top': 0,
}


def check_dense(config: ConfigDict) -> None:
  """Refuses settings of experts and routers in a model without.

  Raises:
    UserError: The message has the key and what would be right.
  """
  for key, value in _DENSE.items():
    if get(config, key) != value:
      raise UserError(
        f'{key} = {get(config, key)!r} is about experts or their routers, and'
        f' moe.num_experts = 0 is a dense model: set {key} = {value!r}'
      )
  if evaluations.asks_for_robustness(config):
    raise UserError(
      f'eval.evaluations = {config.eval.evaluations!r} asks for robustness,'
      ' which disables experts, and moe.num_experts = 0 is a dense model: leave'
      ' it out'
    )


def check(config: ConfigDict, sub_layers: int) -> None:
  """Refuses the first conflict.

  Args:
    config: The config of a model with experts, every key in its range.
    sub_layers: The number of MoE sub-layers in all of its layers.

  Raises:
    UserError: The message has the keys, their values and what would be right.
  """
  for rule in RULES:
    if rule.broken(config):
      values = ' and '.join(
        f'{key} = {get(config, key)!r}' for key in rule.keys
      )
      raise UserError(f'{values} contradict each other: {rule.why}')
  _check_residual(config, sub_layers)
  _check_choice(config)
  check_disabled(config, 'eval.disable_top', config.eval.disable_top)
  counts = evaluations.disabled(config)  # or they are refused, asked for or not
  if evaluations.asks_for_robustness(config):
    for count in counts:
      check_disabled(config, 'eval.robustness', count)


def check_disabled(config: ConfigDict, said: str, count: int) -> None:
  """Refuses to disable so many experts that a token has too few left.

  Args:
    config: The config of a model.
    said: What asks for it, for the message.
    count: How many experts every token is to do without.

  Raises:
    UserError: There are too few, and the message has the most.
  """
  if not config.moe.num_experts:
    raise UserError(
      f'{said} = {count} disables experts, and moe.num_experts = 0 is a dense'
      ' model: there are none'
    )
  wanted, left = _choice(config)
  if left - count < wanted:
    top_k = config.router.selection == 'top_k'
    of = 'moe.top_k' if top_k else 'router.selection'
    raise UserError(
      f'{said} = {count} leaves {max(left - count, 0)} of {left} experts to'
      f' choose from, too few for {of} = {get(config, of)!r}; {left - wanted}'
      ' is the most'
    )


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
  """Refuses settings that leave a token too few experts to choose from."""
  moe, router = config.moe, config.router
  wanted, left = _choice(config)
  if router.top_groups < router.groups and left < wanted:
    raise UserError(
      f'moe.top_k = {wanted} is above the {left} experts that'
      f' router.top_groups = {router.top_groups} of router.groups ='
      f' {router.groups} leave of moe.num_experts = {moe.num_experts}'
    )


def _choice(config: ConfigDict) -> tuple[int, int]:
  """Returns how many experts a token chooses at least, and of how many."""
  moe, router = config.moe, config.router
  wanted = moe.top_k if router.selection == 'top_k' else 1
  return wanted, moe.num_experts * router.top_groups // router.groups
