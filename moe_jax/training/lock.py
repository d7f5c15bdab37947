"""One program at a time writes to a directory."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import IO, Any

from moe_jax import disk, files, signals
from moe_jax.errors import RetryableError

NAME = '.lock'
PATIENCE = 10.0  # seconds that the one before may take to end

_REMEDY = 'choose another --workdir'
_POLL_SECONDS = 0.2
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


@contextlib.contextmanager
def held(folder: str, patience: float | None = None) -> Iterator[None]:
  """Holds a directory, which is made if there is none, against other programs.

  The lock is flock's, on DIR/.lock: it goes with the process, however that
  ends. On NFS Linux asks the server for it, so it holds between hosts. Where a
  file system has no locks (Lustre mounted without `flock`), that is told, and
  the directory is not held. A directory in which nothing was written is left as
  it was.

  Args:
    folder: The directory.
    patience: How many seconds to wait for another program that is about to
      end, as a job may be whose successor has begun; None for `PATIENCE`.

  Raises:
    RetryableError: Another program holds it; the message names it.
    UserError: The directory cannot be written.
  """
  made = _missing(folder)
  try:
    file = _take(folder, PATIENCE if patience is None else patience)
    try:
      yield
    finally:
      _release(folder, file)
  finally:
    for each in made:
      with contextlib.suppress(OSError):  # it is not empty
        os.rmdir(each)


def _take(folder: str, patience: float) -> IO[str]:
  """Returns the file of the lock when this process has it."""
  deadline = time.monotonic() + patience
  told = False
  while True:
    file = _opened(folder)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno not in _TAKEN:
        signals.tell(
          f'note: no lock on {file.name} ({error.strerror}): nothing keeps'
          f' another run out of workdir {folder}'
        )
        return file
      holder = _holder(file)
      file.close()
      if time.monotonic() >= deadline:
        raise RetryableError(
          f'workdir {folder} is in use by {holder}; wait for it, stop it, or'
          f' {_REMEDY}'
        ) from error
      if not told:
        signals.tell(
          f'workdir {folder} is in use by {holder}; waiting up to'
          f' {patience:.0f} s'
        )
        told = True
      time.sleep(_POLL_SECONDS)
      continue
    if _is_there(file):
      _name_holder(file)
      return file
    file.close()


def _missing(folder: str) -> list[str]:
  """Returns the folders that would have to be made, the innermost first."""
  missing = []
  above = os.path.abspath(folder)
  while not os.path.lexists(above):
    missing.append(above)
    above = os.path.dirname(above)
  return missing


def _opened(folder: str) -> IO[str]:
  """Opens the file of the lock, for writing, as NFS asks for."""

  def make() -> IO[str]:
    while True:
      os.makedirs(folder, exist_ok=True)
      # Who has held it may remove at that moment what it had made.
      with contextlib.suppress(FileNotFoundError):
        return open(os.path.join(folder, NAME), 'a+', encoding='utf-8')

  return disk.retried(folder, make, _REMEDY, 'workdir')


def _is_there(file: IO[str]) -> bool:
  """Returns whether the file has not been removed since it was opened."""
  try:
    return os.path.samestat(os.stat(file.name), os.fstat(file.fileno()))
  except FileNotFoundError:
    return False


def _name_holder(file: IO[str]) -> None:
  """Writes who this is."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  holder = {'host': socket.gethostname(), 'process': os.getpid(), 'start': now}
  # On a full disk it is held all the same.
  with contextlib.suppress(OSError):
    os.ftruncate(file.fileno(), 0)
    os.write(file.fileno(), f'{json.dumps(holder)}\n'.encode())
    os.fsync(file.fileno())


def holder(folder: str) -> str | None:
  """Returns who holds a directory, None if nobody does; nothing is written.

  For a moment it is held here, which others wait out.
  """
  try:
    with open(os.path.join(folder, NAME), encoding='utf-8') as file:
      try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
      except OSError as error:
        return _holder(file) if error.errno in _TAKEN else None
  except OSError:
    pass
  return None


def _holder(file: IO[str]) -> str:
  """Returns who holds the lock, as far as it has said so."""
  try:
    file.seek(0)
    holder: dict[str, Any] = files.parse_json(file.read())
    return (
      f'process {holder["process"]} on {holder["host"]}, started'
      f' {holder["start"]}'
    )
  except (OSError, ValueError, KeyError, TypeError):
    return 'another process'


def _release(folder: str, file: IO[str]) -> None:
  """Gives the lock back, and removes it where nothing else was written."""
  with file, contextlib.suppress(OSError):
    if os.listdir(folder) == [NAME]:
      os.remove(file.name)
