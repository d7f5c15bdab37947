"""What is refused of a data set's name, and of what was prepared earlier."""

import contextlib
import errno
import os
import pathlib
import sys
import textwrap
from collections.abc import Iterator

from ml_collections import ConfigDict
from tensorflow_datasets.core import naming
from tensorflow_datasets.core.utils import file_utils

from moe_jax import errors, files

# What a file system answers where a file is not there, or is something else.
_ABSENT = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def check_name(data: ConfigDict, data_dir: str | None) -> None:
  """Refuses names by which TFDS would run code that is not its own.

  A namespace makes it download a package and import it, and the features.json
  of prepared data may name any module to be imported.

  Args:
    data: The section `config.data`.
    data_dir: The folder of prepared data; None for TFDS's own.

  Raises:
    UserError: It is such a name, or sets more than a config and a version.
    ValueError: It is not TFDS's notation.
  """
  name, given = naming.parse_builder_name_kwargs(data.name)
  where = f'data.name = {data.name!r}'
  if given.keys() - {'config', 'version'}:
    raise errors.UserError(
      f'{where} sets {", ".join(given)}: a name may have a config and a'
      " version, as 'NAME/CONFIG:1.0.0', and no more"
    )
  if name.namespace and not data.get('allow_community', False):
    raise errors.UserError(
      f'{where} is of the community {name.namespace!r}, of which TensorFlow'
      ' Datasets downloads a Python package and runs it; if you trust it, add'
      ' --config.data.allow_community=True'
    )
  for path in prepared_files(data.name, data_dir):
    check_features(path)


def prepared_files(name: str, data_dir: str | None) -> Iterator[pathlib.Path]:
  """Yields every features.json that was prepared of a data set.

  Args:
    name: The value of `data.name`.
    data_dir: The folder of prepared data; None for TFDS's own.
  """
  try:
    parsed, _ = naming.parse_builder_name_kwargs(name)
  except ValueError:  # nothing is prepared of what is no name
    return
  for root in file_utils.list_data_dirs(data_dir):
    # Not etils' paths, whose rglob takes the root for a part of the pattern.
    yield from pathlib.Path(root, parsed.name).rglob('features.json')


def check_features(path: pathlib.Path) -> None:
  """Refuses a features.json by which TFDS would import a module."""
  waiting = [files.read_json(path)]
  while waiting:
    value = waiting.pop()
    if isinstance(value, list):
      waiting += value
    elif isinstance(value, dict):
      waiting += value.values()
      for key in ('type', 'pythonClassName', 'python_class_name'):
        _check_class(path, value.get(key))


def _check_class(path: pathlib.Path, name: object) -> None:
  """Refuses a class that is neither TFDS's nor of a module already here."""
  module, dot, _ = str(name).rpartition('.')
  ours = module.split('.')[0] == 'tensorflow_datasets' or module in sys.modules
  if isinstance(name, str) and dot and not ours:
    raise errors.UserError(
      f'{path} names the class {name}, which TensorFlow Datasets does not have:'
      f' reading it would run the module {module}; remove that folder, or'
      ' import the module in your config if you trust it'
    )


@contextlib.contextmanager
def undamaged(folder: os.PathLike) -> Iterator[None]:
  """Reports prepared data that cannot be read, whatever a library says of it.

  Raises:
    UserError: The message names the folder, without which it is prepared anew.
    OSError: The file system refuses to read what may be sound.
  """
  try:
    yield
  except (errors.UserError, MemoryError):
    raise
  except Exception as error:
    if isinstance(error, OSError) and error.errno not in _ABSENT:
      raise
    raise one_line(
      f'the data set prepared in {folder} is damaged: remove that folder, and'
      ' it is prepared anew',
      error,
    ) from error


def one_line(where: str, error: Exception) -> errors.UserError:
  """Returns the error of a library as one line that says where it arose."""
  said = f'{type(error).__name__}: {error}'
  return errors.UserError(f'{where}: {textwrap.shorten(said, 400)}')
