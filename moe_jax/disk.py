"""What a file system refuses, told in one line.

A full disk, a quota or a file server that hangs goes away by itself, or by what
somebody else does, and then the same command goes on: a `RetryableError`. What
needs another path or other rights is a `UserError`.
"""

import errno
import os
import re
import shutil
import time
from collections.abc import Callable
from typing import TypeVar

from moe_jax.errors import RetryableError, UserError

T = TypeVar('T')

# EFBIG is what a limit on the size of files says (`ulimit -f`).
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_PASSING = _FULL | {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN}
_SAYS_FULL = re.compile(
  '|'.join(os.strerror(number) for number in _FULL), re.IGNORECASE
)
_RETRY_SECONDS = 1.0


def refused(
  path: str, error: OSError, remedy: str = '', kind: str = ''
) -> UserError | RetryableError:
  """Returns what a path that cannot be written is told as.

  Args:
    path: The file or directory.
    error: Why it cannot be written.
    remedy: What to do where the same command would fail again.
    kind: What the path is, to begin the message with.
  """
  name = f'{kind} {path}' if kind else path
  said = f'{name} cannot be written: {error.strerror or error}'
  if error.errno in _FULL:
    where = error.filename if isinstance(error.filename, str) else path
    return RetryableError(
      f'{said}{_free(where)}; make room, then the same command goes on'
    )
  if passes(error.errno or 0):
    return RetryableError(f'{said}; the same command goes on when it can')
  return UserError(f'{said}{"; " if remedy else ""}{remedy}')


def passes(number: int) -> bool:
  """Returns whether the same command may go on, once that error is no more.

  Args:
    number: One of `errno`.
  """
  return number in _PASSING


def retried(
  path: str, write: Callable[[], T], remedy: str = '', kind: str = ''
) -> T:
  """Returns `write()`, which is tried again after a second if it may pass.

  Args:
    path: The file or directory.
    write: Writes it, whatever an earlier call has left.
    remedy: As in `refused`.
    kind: As in `refused`.

  Raises:
    RetryableError: The disk is full or does not answer, both times.
    UserError: It cannot be written for another reason.
  """
  try:
    return write()
  except OSError as error:
    if error.errno not in _PASSING:
      raise refused(path, error, remedy, kind) from error
  time.sleep(_RETRY_SECONDS)
  try:
    return write()
  except OSError as error:
    raise refused(path, error, remedy, kind) from error


def is_full(error: BaseException) -> bool:
  """Returns whether an error says that a disk is full, in whatever words.

  Libraries in C++ raise exceptions of other kinds with the system's words.
  """
  if isinstance(error, OSError):
    return error.errno in _FULL
  try:
    return bool(_SAYS_FULL.search(str(error)))
  except Exception:  # of a class whose __str__ fails
    return False


def _free(path: str) -> str:
  """Returns ` (12.0 kB free)` of the file system of `path`, '' if unknown."""
  above = os.path.abspath(path)
  while not os.path.isdir(above):
    above = os.path.dirname(above)
  try:
    free = shutil.disk_usage(above).free
  except OSError:
    return ''
  for unit, name in ((1e9, 'GB'), (1e6, 'MB')):
    if free >= unit:
      return f' ({free / unit:.1f} {name} free)'
  return f' ({free / 1e3:.1f} kB free)'
