"""The directory of a run: whose it is, and whether it can be written.

It is a path of a mounted file system; on several hosts, of one they share.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from moe_jax import disk, files, strict_json
from moe_jax.config import saved as saved_config
from moe_jax.errors import UserError
from moe_jax.parallel import multihost
from moe_jax.training import lock

CHECKPOINTS, DAMAGED = 'checkpoints', 'checkpoints-damaged'
_REMEDY = 'choose another --workdir'


@dataclasses.dataclass(frozen=True)
class RunDir:
  """The directory of a run, checked; `claim` makes it the run's own.

  Attributes:
    path: The directory, which need not exist yet.
    config: The config of the run, or of who reads it.
    read_only: Whether nothing is ever written there.
    remedy: What to do if the run will not do, where the usual advice would be
      wrong; '' otherwise.
    changes: The keys that have another value than when the run was last gone
      on with, and both values, in words; '' if there are none.
  """

  path: str
  config: ConfigDict
  read_only: bool = False
  remedy: str = ''
  changes: str = ''

  @classmethod
  def new_or_resumed(cls, path: str, config: ConfigDict) -> 'RunDir':
    """Returns the directory of a run with `config`, new or to go on with.

    Nothing is written. All processes of a run call this alike.

    Args:
      path: The directory.
      config: A config that differs from DIR/config.json, if there is one, in
        keys that may change on resume.

    Raises:
      UserError: The directory belongs to another run, is not writable, or has
        a path that checkpoints cannot be written to.
    """

    def check() -> str:
      refuse_url(path)
      files.refuse_pattern('workdir', path)
      changes = _check_same_run(path, config)
      check_kinds(path)
      _check_writable(path)
      return changes

    return cls(path, config, changes=multihost.fail_together(check))

  @classmethod
  def existing(
    cls, path: str, config: ConfigDict, remedy: str = ''
  ) -> 'RunDir':
    """Returns the directory of a run of the model that `config` describes.

    All processes call this alike.

    Args:
      path: The directory.
      config: The config of the model, as whoever reads it wants it.
      remedy: What an error is to advise instead of the usual.

    Raises:
      UserError: It holds no run, or one of another model, or has a path that
        may be another's.
    """

    def check() -> None:
      saved, new = config_of(path, remedy), config.to_dict()
      files.refuse_ambiguous('workdir', path)
      keys = saved_config.changed_model(saved, new)
      _refuse(path, keys, saved, new, remedy)

    multihost.fail_together(check)
    return cls(path, config, True, remedy)

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """Keeps other programs from writing here; `lock.held` says how.

    All processes of a run enter it alike, before anything is cleaned up or
    written; one of them holds the lock.

    Raises:
      RetryableError: Another run, or a conversion, holds the directory.
      UserError: It has become that of another run meanwhile.
    """
    with contextlib.ExitStack() as holding:

      def take() -> None:
        if multihost.is_main_process():
          holding.enter_context(lock.held(self.path))
          _check_same_run(self.path, self.config)

      multihost.fail_together(take)
      yield

  def claim(
    self,
    record: Mapping[str, Any] | None = None,
    kept: Mapping[str, bytes] | None = None,
  ) -> None:
    """Makes the directory that of this run: config.json and run.json.

    All processes call this alike; one of them writes.

    Args:
      record: What ran, as JSON can hold it; see `moe_jax.training.record`.
      kept: Further files that the run needs, by their names.

    Raises:
      UserError: The directory cannot be written, or another process does not
        see it.
    """
    multihost.fail_together(self._make)
    _check_shared(self.path)
    multihost.fail_together(lambda: self._write(record, kept or {}))

  def _make(self) -> None:
    """Makes the directory and the folder of checkpoints."""
    if multihost.is_main_process():
      self._written(lambda: os.makedirs(self.checkpoints, exist_ok=True))

  def _write(
    self, record: Mapping[str, Any] | None, kept: Mapping[str, bytes]
  ) -> None:
    """Writes what config.json needs, that file, and run.json."""
    if not multihost.is_main_process():
      return
    for name, content in kept.items():
      path = os.path.join(self.path, name)
      self._written(functools.partial(files.replace, path, content))
    config = saved_config.to_json(self.config)
    self._written(lambda: files.replace(config_path(self.path), config))
    if record is not None:
      text = strict_json.dumps(record, indent=2) + '\n'
      path = os.path.join(self.path, saved_config.RECORD_FILE)
      self._written(lambda: files.replace(path, text))

  def _written(self, write: Callable[[], None]) -> None:
    disk.retried(self.path, write, _REMEDY, 'workdir')

  @property
  def checkpoints(self) -> str:
    """The absolute path of the folder of the run's checkpoints."""
    return os.path.abspath(os.path.join(self.path, CHECKPOINTS))

  @property
  def damaged(self) -> str:
    """The absolute path of the folder of checkpoints that were set aside."""
    return os.path.abspath(os.path.join(self.path, DAMAGED))

  def aside(self, step: int) -> str:
    """Returns where to set the checkpoint of a step aside: a free path."""
    path = os.path.join(self.damaged, str(step))
    names = itertools.chain(
      [path], (f'{path}-{number}' for number in itertools.count(2))
    )
    return next(name for name in names if not os.path.lexists(name))


def config_of(workdir: str, remedy: str = '') -> dict[str, Any]:
  """Returns the config of the run in `workdir`, a dictionary of sections.

  Args:
    workdir: The directory of the run.
    remedy: What an error is to advise instead of the usual.

  Raises:
    UserError: It holds no run.
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
  """Returns the file that holds the config of the run in `workdir`."""
  return os.path.join(workdir, saved_config.CONFIG_FILE)


def _check_shared(workdir: str) -> None:
  """Makes sure that all processes see the same directory.

  Raises:
    UserError: What process 0 writes there, another one does not see.
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


def _saved_config(workdir: str) -> dict[str, Any] | None:
  """Returns the config that the run there was made with, None without one."""
  path = config_path(workdir)
  try:
    return saved_config.from_json(files.read_text(path)).to_dict()
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


def _check_same_run(workdir: str, config: ConfigDict) -> str:
  """Refuses the directory of a run that `config` cannot go on with.

  Returns:
    Which keys have changed, in words.
  """
  saved = _saved_config(workdir)
  if saved is None:
    return ''
  new = config.to_dict()
  _refuse(workdir, saved_config.changed_meaning(saved, new), saved, new)
  return saved_config.changes(saved, new)


def _refuse(
  workdir: str, keys: list[str], old: dict, new: dict, remedy: str = ''
) -> None:
  if keys:
    raise UserError(
      f'workdir {workdir} was made with another config:'
      f' {saved_config.describe(keys, old, new)};'
      f' {remedy or "give the old values or another --workdir"}'
    )


def check_kinds(workdir: str) -> None:
  """Raises a UserError for a file where a folder belongs, or a folder."""
  for name, is_right, kind in (
    (CHECKPOINTS, os.path.isdir, 'folder'),
    ('metrics.jsonl', os.path.isfile, 'file'),
    ('tokenizer.json', os.path.isfile, 'file'),
    ('tokenizer.model', os.path.isfile, 'file'),
    ('tensorboard', os.path.isdir, 'folder'),
    (DAMAGED, os.path.isdir, 'folder'),
  ):
    path = os.path.join(workdir, name)
    if os.path.lexists(path) and not is_right(path):
      raise UserError(f'{path} is no {kind}; move it away')


def _check_writable(workdir: str) -> None:
  """Makes a nameless file in the directory, the surest test.

  Where there is no such directory yet, it is made in the nearest one above.
  """
  above = os.path.abspath(workdir)
  while not os.path.lexists(above):
    above = os.path.dirname(above)

  def make() -> None:
    with tempfile.TemporaryFile(dir=above):
      pass

  disk.retried(workdir, make, _REMEDY, 'workdir')
