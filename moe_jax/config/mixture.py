"""The sources of a mixture, as `data.mixture` says them.

{"code": {"name": "python_stdlib", "weight": 2},
 "news": {"path": "news/*.jsonl.zst", "text_key": "body", "weight": 1}}
"""

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from moe_jax import files, strict_json
from moe_jax.config.keys import Key
from moe_jax.config.schema import KEYS
from moe_jax.errors import UserError, choose

_KEY = 'data.mixture'
# What a source has of its own; of the other keys of `data` there is one.
_OF_SOURCE = ('name', 'path', 'text_key', 'format', 'train_split')
_SIZES = {
  'weight': Key(1.0, 'The share of the rows.', above=0),
  'epochs': Key(1.0, 'How often it is read while others are once.', above=0),
}


class Source(NamedTuple):
  """A data set that is trained on.

  Attributes:
    name: That of the source in the mixture; '' of the only one of a run.
    data: The section `data` of a run that reads nothing else.
    weight: What its share of the rows is proportional to, before temperature;
      None where that is the number of its own rows times `epochs`.
    epochs: That factor.
  """

  name: str
  data: ConfigDict
  weight: float | None
  epochs: float


def sources(data: ConfigDict) -> list[Source]:
  """Returns what a run trains on: the sources of the mixture, or one.

  A source that has a path and no name is read as `files`; any other key that
  it does not have is that of `data`.

  Args:
    data: The section `config.data`.

  Raises:
    UserError: `data.mixture` says no mixture; the message says where.
  """
  if not data.mixture:
    return [Source('', data, None, 1.0)]
  given = _parsed(_KEY, data.mixture)
  sizes = {name for source in given.values() for name in source} & {*_SIZES}
  if len(sizes) > 1:
    raise UserError(
      f'{_KEY} has weights and epochs: the shares of a mixture follow from'
      ' either of them; give every source the same'
    )
  lacking = [name for name, source in given.items() if 'weight' not in source]
  if 'weight' in sizes and lacking:
    raise UserError(
      f'{_KEY}: {", ".join(lacking)} lacks a weight, which other sources have:'
      ' give all of them one, or none'
    )
  return [_source(name, values, data) for name, values in given.items()]


def names(data: ConfigDict) -> list[str]:
  """Returns the names of the sources of a mixture; none of a single one."""
  return [source.name for source in sources(data) if source.name]


def of_source(name: str, error: UserError) -> UserError:
  """Returns a mistake in the data of a source, which it names."""
  return UserError(f'{_KEY}: {name}: {error}') if name else error


def as_flags(source: Source) -> str:
  """Returns the flags with which a program reads a source alone."""
  flags = [
    f'--config.{_KEY}=',
    *(
      f'--config.data.{key}={source.data[key]}'
      for key in _OF_SOURCE
      if key == 'name' or source.data[key] != KEYS[f'data.{key}'].default
    ),
  ]
  return ' '.join(flags)


def formats(data: ConfigDict) -> set[str]:
  """Returns what the rows of all sources are, as `data.format` says it."""
  return {source.data.format for source in sources(data)}


def inlined(text: str) -> str:
  """Returns the value of `data.mixture` with what a file of it holds.

  A run's config has the mixture itself: the file may change.

  Args:
    text: JSON, or the path of a file of it whose name ends with .json.

  Raises:
    UserError: The file is not there, or neither it nor `text` is a mixture.
  """
  if not text:
    return text
  where = _KEY
  if not text.lstrip().startswith('{'):
    where, path = f'{_KEY} = {text!r}', files.expand(text)
    if os.path.splitext(path)[1] != '.json':
      raise UserError(f'{where} must be JSON, {{...}}, or the path of a .json')
    try:
      text = files.read_text(path)
    except (OSError, ValueError) as error:
      raise UserError(f'{where} cannot be read: {error}') from error
  return strict_json.dumps(_parsed(where, text))


def without_paths(text: object) -> object:
  """Returns a mixture without where its files lie, for a comparison."""
  try:
    given = _parsed(_KEY, str(text))
  except UserError:
    return text
  return {
    name: {key: value for key, value in source.items() if key != 'path'}
    for name, source in given.items()
  }


def _parsed(where: str, text: str) -> dict[str, dict[str, Any]]:
  """Returns the keys of every source, each a key there is of its type."""
  try:
    given = files.parse_json(text)
  except ValueError as error:
    raise UserError(f'{where} is not JSON: {error}') from error
  if not isinstance(given, dict) or not given:
    raise UserError(
      f'{where} must map the names of sources to their keys, as'
      ' {"code": {"name": "python_stdlib"}}'
    )
  for name, source in given.items():
    if not re.fullmatch(r'[\w.-]+', name):
      raise UserError(
        f'{where}: a source is named {name!r}; its metrics are, too, so take'
        ' letters, digits and . _ -'
      )
    if not isinstance(source, Mapping):
      raise UserError(
        f'{where}: {name} is {source!r} and not the keys of a source, as'
        ' {"name": "python_stdlib"}'
      )
    for key, value in source.items():
      _check(f'{where}: {name}', key, value)
    if not {'name', 'path'} & {*source}:
      raise UserError(
        f'{where}: {name} has neither a name, as data.name, nor a path'
      )
  return given


def _check(where: str, name: str, value: Any) -> None:
  """Refuses what is no key of a source, or no value of that key."""
  keys = {each: KEYS[f'data.{each}'] for each in _OF_SOURCE} | _SIZES
  key: Key = keys[choose(f'{where}: key', name, keys)]
  kind = str if isinstance(key.default, str) else int | float
  if not isinstance(value, kind) or isinstance(value, bool):
    raise UserError(f'{where}: {name} = {value!r} must be {key.wanted()}')
  key.check(f'{where}: {name}', value)


def _source(name: str, values: Mapping[str, Any], data: ConfigDict) -> Source:
  """Returns a source of some keys."""
  section = ConfigDict(data.to_dict())
  section.mixture = ''
  section.path = ''
  if 'name' not in values:
    section.name = 'files'
  for key in _OF_SOURCE:
    if key in values:
      section[key] = values[key]
  section.path = files.expand(section.path)
  weight = values.get('weight')
  return Source(name, section.lock(), weight, values.get('epochs', 1.0))
