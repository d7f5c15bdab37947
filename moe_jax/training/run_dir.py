"""The directory of a run: whose it is, and whether it can be written.

It is a path of a mounted file system; on several hosts, of one they share.
"""

import contextlib
import os
import tempfile
import time
from typing import Any

from ml_collections import ConfigDict

from moe_jax.config import saved as saved_config
from moe_jax.errors import UserError
from moe_jax.parallel import multihost


def check_run(workdir: str, config: ConfigDict) -> None:
  """Makes sure of a directory for a run with `config`, new or to go on in.

  Args:
    workdir: the directory; made if it does not exist.
    config: differs from DIR/config.json, if there is one, in harmless keys.

  Raises:
    UserError: the directory belongs to another run, or is not writable.
  """
  refuse_url(workdir)
  saved = _saved_config(workdir)
  if saved is not None:
    new = config.to_dict()
    keys = saved_config.changed_meaning(saved, new)
    _refuse(workdir, keys, saved, new)
  _check_writable(workdir)


def write_config(workdir: str, config: ConfigDict) -> None:
  """Makes `workdir` that of a run with `config`; one process does it."""
  replace(config_path(workdir), saved_config.to_json(config))


def check_shared(workdir: str) -> None:
  """Makes sure that all processes see the same directory.

  Raises:
    UserError: what process 0 writes there, another one does not see.
  """
  if multihost.is_single_process():
    return
  # A new name each time: file systems remember for a while what was not there.
  name = multihost.broadcast_from_first(time.time_ns() % 2**31)
  path = os.path.join(workdir, f'.shared-{name}')

  def see() -> None:
    if multihost.is_main_process():
      with open(path, 'w', encoding='utf-8'):
        pass
    elif not os.path.exists(path):
      raise UserError(
        f'workdir {workdir} is not the same on all hosts; choose a --workdir on'
        ' a file system that they share'
      )

  try:
    multihost.first_process_first(see)
  finally:
    if multihost.is_main_process():
      with contextlib.suppress(OSError):
        os.remove(path)


def check_model(workdir: str, config: ConfigDict, remedy: str = '') -> None:
  """Refuses a `workdir` without a run, or with a run of another model.

  Args:
    workdir: the directory.
    config: of the model.
    remedy: what to do instead, where the usual advice would be wrong.

  Raises:
    UserError: as said, naming the keys that differ.
  """
  saved = config_of(workdir, remedy)
  new = config.to_dict()
  _refuse(workdir, saved_config.changed_model(saved, new), saved, new, remedy)


def config_of(workdir: str, remedy: str = '') -> dict[str, Any]:
  """The config of the run in `workdir`; arguments as in `check_model`.

  Raises:
    UserError: it holds no run.
  """
  refuse_url(workdir)
  saved = _saved_config(workdir)
  if saved is None:
    remedy = remedy or 'train first, with the same --config and --workdir'
    raise UserError(
      f'workdir {workdir} holds no run: there is no {config_path(workdir)};'
      f' {remedy}'
    )
  return saved


def refuse_url(workdir: str) -> None:
  """Raises a UserError unless `workdir` is a path."""
  if '://' in workdir:
    raise UserError(
      f'workdir {workdir} is a URL; mount the bucket and give its path'
    )


def config_path(workdir: str) -> str:
  """The file that holds the config of the run in `workdir`."""
  return os.path.join(workdir, 'config.json')


def replace(path: str, text: str) -> None:
  """Writes a file at once: a crash leaves the old text or the new one."""
  temporary = f'{path}.tmp'
  with open(temporary, 'w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _saved_config(workdir: str) -> dict | None:
  """The config that the run in `workdir` was made with, None without one."""
  path = config_path(workdir)
  try:
    with open(path, encoding='utf-8') as file:
      text = file.read()
    return saved_config.from_json(text).to_dict()
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise UserError(
      f'{path} is not the JSON of a config ({error}); mend it or choose'
      ' another --workdir'
    ) from error
  except OSError as error:
    raise UserError(
      f'workdir {workdir} cannot be read: {error.strerror}'
    ) from error


def _refuse(
  workdir: str, keys: list[str], old: dict, new: dict, remedy: str = ''
) -> None:
  if keys:
    raise UserError(
      f'workdir {workdir} was made with another config:'
      f' {saved_config.describe(keys, old, new)};'
      f' {remedy or "give the old values or another --workdir"}'
    )


def _check_writable(workdir: str) -> None:
  """Makes the directory and a nameless file in it, the surest test."""
  try:
    os.makedirs(workdir, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as error:
    raise UserError(
      f'workdir {workdir} is not writable: {error.strerror};'
      ' choose another --workdir'
    ) from error
