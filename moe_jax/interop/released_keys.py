"""The keys of a released `config.json`, each read with its check."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError


def is_file(path: Path) -> bool:
  """Whether there is a file.

  Raises:
    UserError: the folder it would be in cannot be read.
  """
  try:
    return path.is_file()
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from error


def read_json(path: Path) -> dict[str, Any]:
  """Reads a file that holds one JSON object.

  Raises:
    UserError: the file is not there or holds something else.
  """
  try:
    values = json.loads(path.read_text('utf-8'))
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from error
  except ValueError as error:
    raise UserError(f'{path} is not JSON: {error}') from error
  if not isinstance(values, dict):
    raise UserError(f'{path} is JSON, but not an object of keys and values')
  return values


@dataclasses.dataclass(frozen=True)
class Keys:
  """What a `config.json` says.

  Every method raises a `UserError` that names the file, the key and its value
  where the key is missing or not of the kind the method returns.

  Attributes:
    path: the file.
    values: its keys, with defaults for those it may leave out.
  """

  path: Path
  values: dict[str, Any]

  def fail(self, key: str, wanted: str) -> UserError:
    value = json.dumps(self.values[key])
    return UserError(f'{self.path}: {key} = {value} {wanted}')

  def __getitem__(self, key: str) -> Any:
    if key not in self.values:
      raise UserError(f'{self.path}: the key {key} is missing')
    return self.values[key]

  def integer(
    self, key: str, least: int | None = 1, most: int | None = None
  ) -> int:
    """An integer between `least` and `most`; None is no bound."""
    value = self[key]
    if type(value) is not int:
      raise self.fail(key, 'must be an integer')
    if least is not None and value < least:
      raise self.fail(key, f'is not supported; it must be at least {least}')
    if most is not None and value > most:
      raise self.fail(key, f'must be at most {most}')
    return value

  def size(self, key: str, otherwise: str) -> int:
    """`key`, or where that is null the key `otherwise`."""
    return self.integer(otherwise if self[key] is None else key)

  def number(self, key: str) -> float:
    value = self[key]
    if type(value) not in (int, float) or not 0 <= value < math.inf:
      raise self.fail(key, 'must be a number of at least 0')
    return float(value)

  def flag(self, key: str) -> bool:
    if not isinstance(self[key], bool):
      raise self.fail(key, 'must be true or false')
    return self[key]

  def only(self, key: str, *supported: Any) -> None:
    if self[key] not in supported:
      known = ', '.join(map(json.dumps, supported))
      raise self.fail(key, f'is not supported (supported: {known})')
