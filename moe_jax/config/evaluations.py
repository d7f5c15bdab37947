"""What `eval.evaluations` asks for: which evaluations, when and of what.

An entry is a name and, behind colons, options that override the keys of the
section: `perplexity, mine:every=1000:split=test:batches=8`.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from ml_collections import ConfigDict

from moe_jax.config.schema import KEYS
from moe_jax.errors import UserError, choose

_KEY = 'eval.evaluations'
_OPTIONS = ('every', 'split', 'batches')  # keys of the section, too


ROBUSTNESS = 'robustness'
TASKS = 'tasks'


class Asked(NamedTuple):
  """An evaluation that a config asks for.

  Attributes:
    name: Its name in the registry.
    every: Steps between two during training; 0 for none.
    split: The split of the data.
    batches: The batches of one during training; 0 is the whole split.
  """

  name: str
  every: int
  split: str
  batches: int


def asked(config: ConfigDict) -> list[Asked]:
  """Returns the evaluations that a config asks for, in their order.

  Raises:
    UserError: An option is not known or has a wrong value, or the same
      evaluation of the same split is asked for twice.
  """
  entries = config.eval.evaluations.split(',')
  found = [_asked(config, entry.strip()) for entry in entries]
  known: set[tuple[str, str]] = set()
  for each in found:
    if (each.name, each.split) in known:
      raise UserError(
        f'{_KEY} = {config.eval.evaluations!r} asks twice for {each.name} of'
        f' split {each.split!r}, and their results would have one name; leave'
        ' one out, or give one another split'
      )
    known.add((each.name, each.split))
  return found


def disabled(config: ConfigDict) -> tuple[int, ...]:
  """Returns how many experts `robustness` disables, one after the other.

  Raises:
    UserError: `eval.robustness` does not say that.
  """
  return counts('eval.robustness', config.eval.robustness, least=1)


def asks_for_robustness(config: ConfigDict) -> bool:
  """Returns whether a config asks for the evaluation `robustness`."""
  return any(each.name == ROBUSTNESS for each in asked(config))


def counts(said: str, text: str, least: int) -> tuple[int, ...]:
  """Returns the whole numbers of a text with commas between.

  Args:
    said: What has the text, for the message.
    text: The text.
    least: The least that a number may be.

  Raises:
    UserError: It is no such text, or names a number twice.
  """
  words = [word.strip() for word in text.split(',')]
  numbers = [int(word) for word in words if word.isdecimal()]
  distinct = len(set(numbers)) == len(words)
  if not distinct or min(numbers) < least:
    raise UserError(
      f'{said} = {text!r} must be whole numbers, at least {least}, each once'
      f' and with commas between, such as {least},{least + 1}'
    )
  return tuple(numbers)


def during_training(config: ConfigDict) -> list[Asked]:
  """Returns those that are run while a model trains."""
  return [each for each in asked(config) if each.every]


def of_split(wanted: Iterable[Asked], split: str | None) -> list[Asked]:
  """Returns the same evaluations, each once, of a split.

  Args:
    wanted: What a config asks for.
    split: The split; None for those that are asked for.
  """
  if split is None:
    return list(wanted)
  by_name = {each.name: each._replace(split=split) for each in wanted}
  return list(by_name.values())


def _asked(config: ConfigDict, entry: str) -> Asked:
  # A split may have colons of its own, as 'validation[:3%]'.
  name, *options = re.split(r':(?=\s*\w+\s*=)', entry)
  values = {key: config.eval[key] for key in _OPTIONS}
  given: set[str] = set()
  for option in options:
    key, _, text = (part.strip() for part in option.partition('='))
    choose(f'an option of {name} in {_KEY}', key, _OPTIONS)
    if key in given:
      raise UserError(f'{_KEY} = {entry!r} gives {key} twice; give it once')
    given.add(key)
    said, schema = f'{_KEY}: {key} of {name}', KEYS[f'eval.{key}']
    values[key] = schema.parse(said, text)
    schema.check(said, values[key])
  if ':' in name:
    form = ''.join(f':{key}=...' for key in _OPTIONS)
    raise UserError(
      f'{_KEY} = {entry!r} must be a name, or one with options, as'
      f' {name.partition(":")[0]}{form}'
    )
  if name.strip() == TASKS and 'split' in given:
    raise UserError(
      f'{_KEY} = {entry!r} gives a split of the data of the run, and tasks have'
      ' splits of their own: leave it out'
    )
  return Asked(name.strip(), **values)
