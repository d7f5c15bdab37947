"""Finds and loads config files, and says where they are wrong."""

import difflib
import inspect
import os
import re
import traceback
from collections.abc import Sequence
from types import ModuleType

from ml_collections import ConfigDict

from moe_jax import files
from moe_jax.config import mixture, saved, schema
from moe_jax.config.derived import flatten, get
from moe_jax.config.user_code import (
  extensions,
  import_file,
  load_extensions,
  shipped,
)
from moe_jax.errors import UserError, nearest, said

__all__ = [
  'expand_paths',
  'extensions',
  'holds_run',
  'known_keys',
  'load',
  'load_extensions',
  'of_run',
  'preset_files',
  'unknown_key',
  'variants',
  'with_names',
]


def load(argument: str) -> ConfigDict:
  """Returns the config of `NAME` or `NAME:preset,variants`, locked.

  Args:
    argument: A file's path, or the name of a preset file that comes with the
      library, and after a colon what its `get_config` is called with. A file
      named .json is the config of a run, `config.json` of its workdir.

  Raises:
    UserError: There is no such file, preset or variant, or the file fails.
  """
  path, names = _find(files.expand(argument))
  if path.endswith('.json'):
    return of_run(os.path.dirname(path), path)
  try:
    config = _call(path, import_file(path), names)
  except (UserError, SystemExit, KeyboardInterrupt):
    raise
  except BaseException as error:  # of the user's program: all it does is input
    raise UserError(_blame(path, error)) from error
  return _checked(path, config)


def of_run(workdir: str, path: str = '') -> ConfigDict:
  """Returns the config of the run in `workdir`, locked.

  What users' files registered for the run is registered again.

  Args:
    workdir: The directory of the run.
    path: The file of the config, if it is not the run's own `config.json`.

  Raises:
    UserError: There is no such run, or its files cannot be read.
  """
  path = path or os.path.join(workdir, saved.CONFIG_FILE)
  try:
    config = saved.from_json(files.read_text(path))
  except (OSError, ValueError) as error:
    raise UserError(f'{path} is not the JSON of a config: {error}') from error
  record = os.path.join(workdir, saved.RECORD_FILE)
  if os.path.isfile(record):
    load_extensions(_extensions_in(record), record)
  config = _checked(path, config)
  if os.path.basename(path) == saved.CONFIG_FILE:
    named = config.data.tokenizer
    config.data.tokenizer = saved.own_tokenizer(workdir, named) or named
  # The workdir may be a stranger's: who runs code by its config says so anew.
  config.data.allow_community = False
  return config


def holds_run(workdir: str) -> bool:
  """Returns whether `workdir` has the config of a run."""
  return os.path.isfile(os.path.join(workdir, saved.CONFIG_FILE))


def variants(argument: str) -> dict[str, str]:
  """Returns the first lines of what a config file's VARIANTS say, by name.

  Args:
    argument: As in `load`; a file without VARIANTS has none.

  Raises:
    UserError: There is no such file, or it fails.
  """
  path, _ = _find(files.expand(argument))
  if path.endswith('.json'):
    return {}
  try:
    known = getattr(import_file(path), 'VARIANTS', {})
  except (UserError, SystemExit, KeyboardInterrupt):
    raise
  except BaseException as error:  # of the user's program
    raise UserError(_blame(path, error)) from error
  return {
    str(name): (change.__doc__ or '').strip().split('\n')[0]
    for name, change in known.items()
  }


def with_names(argument: str, names: Sequence[str]) -> str:
  """Returns `argument` with these variants behind what it names itself."""
  if not names:
    return argument
  _, given = _find(files.expand(argument))
  sign = ':' if not given else ',' if given[0] else ''
  return f'{argument}{sign}{",".join(names)}'


def preset_files() -> dict[str, str]:
  """Returns the paths of the preset files of the library, by name."""
  return {
    path.stem: str(path)
    for path in sorted(shipped().glob('*.py'))
    if path.stem != '__init__'
  }


def _find(argument: str) -> tuple[str, list[str]]:
  """Returns the path that `argument` begins with, and what follows it.

  A path may hold colons itself, so the whole is tried first.
  """
  if os.path.isfile(argument):
    return argument, []
  head, colon, names = argument.rpartition(':')
  path = head if colon else argument
  arguments = [names] if colon else []
  if os.path.isfile(path):
    return path, arguments
  # `configs/rmoe.py` is `rmoe` where there is no clone.
  name = re.sub(r'^configs[/\\]|\.py$', '', path)
  if name not in preset_files():
    raise UserError(
      f'--config: there is no file or preset {path}{_similar(path)}'
      f' (moe_jax comes with {", ".join(preset_files())})'
    )
  return preset_files()[name], arguments


def _extensions_in(record: str) -> list[str]:
  """Returns the files of users that a run's record names.

  None of them came with the workdir, which may be a stranger's: its owner
  would choose what runs here.
  """
  try:
    names = files.read_json(record).get('extensions', [])
    paths = [str(name) for name in names]
  except (OSError, ValueError, AttributeError, TypeError) as error:
    raise UserError(f'{record} cannot be read: {error}') from error
  folder = os.path.join(os.path.realpath(os.path.dirname(record)), '')
  for path in paths:
    if not os.path.isabs(path) or os.path.realpath(path).startswith(folder):
      raise UserError(
        f'{record} names {path}, a Python file that came with the workdir, and'
        ' it is not run unasked; if it is yours, keep it elsewhere and change'
        ' its path there'
      )
  return paths


def known_keys() -> list[str]:
  """Returns every key there is, dotted."""
  return list(schema.KEYS)


def unknown_key(key: str, known: Sequence[str]) -> str:
  """Returns the message for a dotted key that is not `known`."""
  inside = [name for name in known if name.startswith(f'{key}.')]
  if inside:
    return f"config key '{key}' is a section; name a key, as '{inside[0]}'"
  section, _, last = key.rpartition('.')
  alike = difflib.get_close_matches(last, map(_last, known), len(known), 0.6)
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
  """Returns the hint for a misspelt path: a file or preset of a like name."""
  folder = os.path.dirname(path)
  if not os.path.isdir(folder or '.'):
    return ''
  paths = [os.path.join(folder, name) for name in os.listdir(folder or '.')]
  hint = nearest(path, set(paths) - {path})
  return hint or nearest(path, preset_files())


def _call(path: str, module: ModuleType, names: list[str]) -> ConfigDict:
  """Returns `module.get_config(*names)`."""
  get_config = getattr(module, 'get_config', None)
  if not callable(get_config):
    raise UserError(f'{path} has no function get_config')
  try:
    inspect.signature(get_config).bind(*names)
  except TypeError as error:
    takes = 'needs a name' if not names else 'takes no names'
    raise UserError(f'{path} {takes} after a colon') from error
  return get_config(*names)


def _blame(path: str, error: BaseException) -> str:
  """Returns `FILE:LINE: what is wrong`, with the nearest to a misspelt key."""
  if isinstance(error, SyntaxError):
    return f'{error.filename}:{error.lineno}: {error.msg}'
  file = os.path.abspath(path)
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == file]
  where = f'{path}:{lines[-1]}' if lines else path
  if 'ml_collections' in frames[-1].filename:
    # Its messages begin: Key "topk" does not exist / 'topk'.
    name = re.match(r"""['"\\]*(?:Key ")?(\w+)['"\\]""", said(error))
    if name and isinstance(error, AttributeError | KeyError):
      return f"{where}: there is no config key '{name[1]}'{_nearest(name[1])}"
  return f'{where}: {type(error).__name__}: {said(error)}'


def _nearest(name: str) -> str:
  """Returns the hint for the last name of a key, or that of a section."""
  keys: dict[str, list[str]] = {}
  for key in known_keys():
    keys.setdefault(_last(key), []).append(key)
    keys.setdefault(key.split('.')[0], [key.split('.')[0]])
  matches = difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
  if not matches:
    return ''
  real = ' or '.join(f"'{key}'" for key in keys[matches[0]])
  return f'; did you mean {real}?'


def _checked(path: str, config: ConfigDict) -> ConfigDict:
  """Returns `config`, locked, if it is the defaults with other values."""
  if not isinstance(config, ConfigDict):
    raise UserError(
      f'{path}: get_config returned a {type(config).__name__}, not the'
      ' ConfigDict of moe_jax.config.get_config() with other values'
    )
  given = flatten(config.to_dict())
  for name in given:
    if name not in schema.KEYS:
      raise UserError(f'{path}: {unknown_key(name, known_keys())}')
  for name, key in schema.KEYS.items():
    if name not in given:
      raise UserError(
        f'{path}: key {name} is missing; start from moe_jax.config.get_config()'
      )
    if type(given[name]) is not type(key.default):
      raise UserError(
        f'{path}: {name} = {given[name]!r} must be {key.wanted()}'
      )
  return expand_paths(config.lock())


def expand_paths(config: ConfigDict) -> ConfigDict:
  """Returns `config` with ~ expanded in its paths, and its mixture read.

  Raises:
    UserError: A path names a user who is not there, or no mixture.
  """
  for name, key in schema.KEYS.items():
    if key.path:
      path = files.expand(get(config, name))
      config.update_from_flattened_dict({name: path})
  config.data.mixture = mixture.inlined(config.data.mixture)
  return config
