"""Runs Python files of users: their configs, and the classes they register."""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from moe_jax import registry
from moe_jax.errors import UserError, said

PACKAGE = Path(__file__).parents[1]


def shipped() -> Path:
  """Returns the folder of the presets that come with the library.

  In an installed package it lies inside, in a clone beside the package.
  """
  inside = PACKAGE / 'configs'
  return inside if inside.is_dir() else PACKAGE.parent / 'configs'


def import_file(path: str) -> ModuleType:
  """Runs a Python file as a module of its own and returns it.

  Modules beside the file can be imported by it, and the presets of the library
  as `configs`.

  Raises:
    UserError: The file is not a Python file. What it raises itself passes.
  """
  path = os.path.abspath(path)
  # Two files of one name are two modules; pickle and dataclasses find them.
  digest = hashlib.sha256(path.encode()).hexdigest()[:8]
  name = f'moe_jax_file_{Path(path).stem}_{digest}'
  spec = importlib.util.spec_from_file_location(name, path)
  if spec is None or spec.loader is None:
    raise UserError(f'{path} is not a Python file (.py)')
  _offer_presets()
  if os.path.dirname(path) not in sys.path:
    sys.path.append(os.path.dirname(path))
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[name]
    raise
  return module


def extensions() -> list[str]:
  """Returns the files that registered something of a user's, sorted."""
  files = {
    os.path.abspath(file)
    for each in vars(registry).values()
    if isinstance(each, registry.Registry)
    for file in each.added_by().values()
  }
  return sorted(files)


def load_extensions(paths: Iterable[str], source: str) -> None:
  """Runs files that register something, unless they have been run already.

  Args:
    paths: The files, as `extensions` returned them when the run was made.
    source: The file that names them, for the message.

  Raises:
    UserError: A file is gone, or fails.
  """
  for path in paths:
    if path in extensions():
      continue
    if not os.path.isfile(path):
      raise UserError(
        f'{source} says that {path} registers what the run is made of, and'
        ' there is no such file; put it back, or change its path there'
      )
    try:
      import_file(path)
    except (UserError, SystemExit, KeyboardInterrupt):
      raise
    except BaseException as error:  # of the user's program
      name = type(error).__name__
      raise UserError(f'{path}: {name}: {said(error)}') from error


def _offer_presets() -> None:
  """Makes `from configs import base` work outside of a clone, too."""
  if importlib.util.find_spec('configs') is not None:
    return
  folder = shipped()
  spec = importlib.util.spec_from_file_location(
    'configs',
    folder / '__init__.py',
    submodule_search_locations=[str(folder)],
  )
  if spec is not None and spec.loader is not None:
    module = importlib.util.module_from_spec(spec)
    sys.modules['configs'] = module
    spec.loader.exec_module(module)
