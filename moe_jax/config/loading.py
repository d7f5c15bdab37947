"""Loads a config file and says where it is wrong."""

import difflib
import importlib.util
import inspect
import os
import re
import traceback
from collections.abc import Sequence
from types import ModuleType

from ml_collections import ConfigDict

from moe_jax.config import saved, schema
from moe_jax.config.derived import flatten
from moe_jax.errors import UserError, nearest


def load(argument: str) -> ConfigDict:
  """Returns the config of `FILE` or `FILE:preset,variants`, locked.

  A file named .json is the config of a run: `config.json` of its workdir.

  Raises:
    UserError: there is no such file, preset or variant, or the file fails.
  """
  path, colon, names = argument.partition(':')
  if not os.path.isfile(path):
    raise UserError(f'--config: there is no file {path}{_similar(path)}')
  if path.endswith('.json'):
    return _saved(path)
  try:
    config = _call(path, _import(path), [names] if colon else [])
  except UserError:
    raise
  except Exception as error:  # it is the user's program: all it does is input
    raise UserError(_blame(path, error)) from error
  _check_schema(path, config)
  return config.lock()


def _saved(path: str) -> ConfigDict:
  """The config that a run wrote."""
  try:
    with open(path, encoding='utf-8') as file:
      config = saved.from_json(file.read())
  except (OSError, ValueError) as error:
    raise UserError(f'{path} is not the JSON of a config: {error}') from error
  _check_schema(path, config)
  return config


def known_keys() -> list[str]:
  """Every key there is, dotted."""
  return list(flatten(schema.get_config().to_dict()))


def unknown_key(key: str, known: Sequence[str]) -> str:
  """The message for a dotted key that is not `known`."""
  inside = [name for name in known if name.startswith(f'{key}.')]
  if inside:
    return f"config key '{key}' is a section; name a key, as '{inside[0]}'"
  section, _, last = key.rpartition('.')
  alike = difflib.get_close_matches(last, map(_last, known), len(known), 0.5)
  hint = nearest(key, [name for name in known if _last(name) in alike])
  if not hint:
    prefix = f'{section}.' if section else ''
    rest = [name[len(prefix) :] for name in known if name.startswith(prefix)]
    names = dict.fromkeys(name.split('.')[0] for name in rest)
    hint = f' (known: {", ".join(names)})' if names else ''
  return f"there is no config key '{key}'{hint}"


def _last(key: str) -> str:
  return key.rpartition('.')[2]


def _similar(path: str) -> str:
  """The hint for a misspelt path: a file of nearly that name beside it."""
  folder = os.path.dirname(path)
  if not os.path.isdir(folder or '.'):
    return ''
  paths = [os.path.join(folder, name) for name in os.listdir(folder or '.')]
  return nearest(path, set(paths) - {path})


def _import(path: str) -> ModuleType:
  spec = importlib.util.spec_from_file_location('config_file', path)
  if spec is None or spec.loader is None:
    raise UserError(f'--config: {path} is not a Python file (.py)')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _call(path: str, module: ModuleType, names: list[str]) -> ConfigDict:
  """`module.get_config(*names)`."""
  get_config = getattr(module, 'get_config', None)
  if not callable(get_config):
    raise UserError(f'{path} has no function get_config')
  try:
    inspect.signature(get_config).bind(*names)
  except TypeError as error:
    takes = 'needs a name' if not names else 'takes no names'
    raise UserError(f'{path} {takes} after a colon') from error
  return get_config(*names)


def _blame(path: str, error: Exception) -> str:
  """`FILE:LINE: what is wrong`, a misspelt key with the nearest real one."""
  if isinstance(error, SyntaxError):
    return f'{error.filename}:{error.lineno}: {error.msg}'
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == path]
  where = f'{path}:{lines[-1]}' if lines else path
  if 'ml_collections' in frames[-1].filename:
    # Its messages begin: Key "topk" does not exist / 'topk'.
    name = re.match(r"""['"\\]*(?:Key ")?(\w+)['"\\]""", str(error))
    if name and isinstance(error, AttributeError | KeyError):
      return f"{where}: there is no config key '{name[1]}'{_nearest(name[1])}"
  return f'{where}: {type(error).__name__}: {error}'


def _nearest(name: str) -> str:
  """The hint for a key of which only the last name, or a section, is known."""
  keys = {}
  for key in known_keys():
    keys.setdefault(_last(key), []).append(key)
    keys.setdefault(key.split('.')[0], [key.split('.')[0]])
  matches = difflib.get_close_matches(name, keys, n=1, cutoff=0.5)
  if not matches:
    return ''
  real = ' or '.join(f"'{key}'" for key in keys[matches[0]])
  return f'; did you mean {real}?'


def _check_schema(path: str, config: ConfigDict) -> None:
  """Refuses a config made otherwise than by changing the base's."""
  if not isinstance(config, ConfigDict):
    raise UserError(
      f'{path}: get_config returned a {type(config).__name__}, not the'
      ' ConfigDict of configs/base.py with other values'
    )
  known = flatten(schema.get_config().to_dict())
  given = flatten(config.to_dict())
  for key in given | known:
    if key not in known:
      raise UserError(f'{path}: {unknown_key(key, list(known))}')
    if key not in given:
      raise UserError(f'{path}: key {key} is missing; start from configs/base')
    if type(given[key]) is not type(known[key]):
      raise UserError(
        f'{path}: {key} = {given[key]!r} is not of type'
        f' {type(known[key]).__name__}'
      )
