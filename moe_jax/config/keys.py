"""What one key of a config may be: its type, its choices and its bounds."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from moe_jax.errors import UserError, choose
from moe_jax.registry import Registry

Value: TypeAlias = bool | int | float | str
# Names, and registries of names; a user's own code may add to the latter.
Choices: TypeAlias = Sequence[str | Registry[Any]]

# Whole numbers reach jax as int32.
LARGEST = 2**31 - 1
_TRUE, _FALSE = ('true', 't', '1', 'yes'), ('false', 'f', '0', 'no')


class Key(NamedTuple):
  """A key of the config; its type is that of its default.

  Attributes:
    default: The value where nothing is said.
    meaning: What the value means, in sentences.
    choices: The names that a text may be, beside '' if that is the default; any
      text if empty.
    several: Whether the value is a list of choices with commas between, each
      perhaps with options behind a colon.
    low: The least number.
    high: The largest number; of a whole number 2**31 - 1 if left out.
    above: A number that the value has to be larger than.
    below: A number that the value has to be smaller than.
    resume: Whether a run may go on with another value: the key says where
      things are, how fast they run or what is reported, or it mends a run that
      has diverged.
    function: Whether the value is part of the function that a model computes
      from its parameters, whatever it is trained on and computed with.
    path: Whether the value is a path of the user's, in which ~ is expanded.
    only: The only values of another key with which this one is read, such as
      'model.norm = rms', 'router.score = mlp, hyper' or 'router.score != hash';
      always if empty.
  """

  default: Value
  meaning: str
  choices: Choices = ()
  several: bool = False
  low: float = 0
  high: float | None = None
  above: float | None = None
  below: float | None = None
  resume: bool = False
  function: bool = False
  path: bool = False
  only: str = ''

  def names(self) -> tuple[str, ...]:
    """Returns the names that the value may be, those of users included."""
    names: list[str] = []
    for choice in self.choices:
      names += [choice] if isinstance(choice, str) else choice.names()
    return tuple(names)

  def wanted(self) -> str:
    """Returns what the value has to be, in words: 'a whole number, ...'."""
    if isinstance(self.default, bool):
      return 'True or False'
    if isinstance(self.default, str):
      return self._wanted_text()
    kind = 'a whole number' if isinstance(self.default, int) else 'a number'
    return f'{kind}, {self.range()}'

  def range(self) -> str:
    """Returns the bounds of a number, in words: 'at least 1'."""
    least = (
      f'at least {self.low}' if self.above is None else f'above {self.above}'
    )
    if self.below is not None:
      return f'{least} and below {self.below}'
    if self.high is not None:
      return f'between {self.low} and {self.high}'
    return least

  def check(self, name: str, value: Value) -> None:
    """Refuses a value out of range; NaN is outside every range.

    Args:
      name: The dotted key, for the message.
      value: A value of the default's type.

    Raises:
      UserError: The message has the key, its value and the range.
    """
    if isinstance(self.default, bool):
      return
    if isinstance(self.default, str):
      self._check_text(name, str(value))
    elif not self._inside(value):
      high = f' and at most {LARGEST}' if self._is_too_large(value) else ''
      raise UserError(f'{name} = {value!r} must be {self.range()}{high}')

  def parse(self, name: str, text: str) -> Value:
    """Returns the value that `text` says, of the default's type.

    Raises:
      UserError: The text does not say such a value.
    """
    if isinstance(self.default, str):
      return text
    try:
      if isinstance(self.default, bool):
        return _boolean(text)
      return int(text) if isinstance(self.default, int) else float(text)
    except ValueError as error:
      raise UserError(f'{name} = {text!r} must be {self.wanted()}') from error

  def _inside(self, value: Any) -> bool:
    least = value >= self.low if self.above is None else value > self.above
    most = value < math.inf if self.below is None else value < self.below
    return least and most and value <= self._most()

  def _most(self) -> float:
    if self.high is not None:
      return self.high
    return LARGEST if isinstance(self.default, int) else math.inf

  def _is_too_large(self, value: Value) -> bool:
    """Returns whether the value breaks the bound that goes without saying."""
    unsaid = self.high is None and self.below is None
    return unsaid and isinstance(self.default, int) and int(value) > LARGEST

  def _wanted_text(self) -> str:
    if self.choices:
      kind = 'some of' if self.several else 'one of'
      optional = '' if self.default else "'' or "
      return f'{optional}{kind} {", ".join(self.names())}'
    if self.path and self.default:
      return 'a name or a path'
    kind = 'a path' if self.path else 'a text'
    return f'{kind}, not empty' if self.default else kind

  def _check_text(self, name: str, value: str) -> None:
    if self.default and not value:
      raise UserError(f'{name} = {value!r} must be a name, not empty')
    if not self.choices or not value:
      return
    if not self.several:
      choose(name, value, self.names())
      return
    for each in value.split(','):
      choose(name, each.partition(':')[0].strip(), self.names())


def _boolean(text: str) -> bool:
  """Returns what 'true' or 'False' says."""
  if text.lower() not in _TRUE + _FALSE:
    raise ValueError(text)
  return text.lower() in _TRUE
