"""Processes that encode one split together: who is at what, and who helps.

Locks go with their process, so what a killed one was at is free at once; where
a file system has no locks, some files are encoded twice, to the same bytes.
Helpers are processes, not threads: a tokenizer in Python holds the
interpreter's lock, and so does most of reading documents.
"""

import contextlib
import errno
import fcntl
import os
import pickle
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from typing import IO, Self

from moe_jax.data.parts import writing

# What the import of the library costs a helper several times over.
_WORTH_SECONDS, _MOST_HELPERS = 20.0, 32
_HELPER = 'from moe_jax.data import helpers; helpers.help_out()'
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


class Locks:
  """The files of a folder that this process is at, against other processes."""

  def __init__(self, folder: str) -> None:
    self._path = os.path.join(folder, 'lock')

  def __enter__(self) -> Self:
    with writing(self._path):
      self._file: IO[bytes] = open(self._path, 'ab')
    return self

  def __exit__(self, *_: object) -> None:
    self._file.close()

  @contextlib.contextmanager
  def held(self, number: int) -> Iterator[bool]:
    """Yields whether no other process holds that number; this one does then."""
    taken = not self.take(number)
    try:
      yield not taken
    finally:
      if not taken:
        with contextlib.suppress(OSError):
          fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

  def take(self, number: int) -> bool:
    """Takes a number up to the end; returns whether nobody else has it."""
    try:
      fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except OSError as error:
      return error.errno not in _TAKEN  # another says that there are no locks
    return True


class Helpers:
  """Other processes of this host that encode files of the same folder."""

  def __init__(self, encoding: object, locks: Locks) -> None:
    self._encoding = encoding
    self._locks = locks
    self._processes: list[subprocess.Popen[bytes]] = []
    self._asked = False

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    for process in self._processes:
      process.kill()
      with contextlib.suppress(OSError):
        process.communicate()

  def start(self, seconds: float, parts: int) -> None:
    """Starts them, if there are none yet and it is worth it.

    What keeps one from helping keeps nobody from encoding: a class that cannot
    be sent to it, or any error, which this process will come to as well.

    Args:
      seconds: How long the rest would take this process alone.
      parts: The files that are missing.
    """
    if self._asked or seconds < _WORTH_SECONDS:
      return
    self._asked = True
    # One process a host; the numbers from 2^20 on are of hosts.
    host = 2**20 + zlib.crc32(socket.gethostname().encode()) % 2**30
    if not self._locks.take(host):
      return
    try:
      sent = pickle.dumps(self._encoding)
    except Exception:  # of a user's class, whatever it is
      return
    cores = len(os.sched_getaffinity(0))
    for _ in range(min(cores, parts, _MOST_HELPERS + 1) - 1):
      self._processes.append(_started(sent))


def _started(sent: bytes) -> subprocess.Popen[bytes]:
  """Returns a process that encodes until all is whole or this one ends."""
  environment = os.environ | {
    'PYTHONPATH': os.pathsep.join(filter(None, sys.path)),
    'TOKENIZERS_PARALLELISM': 'false',  # there is a process for each core
  }
  process = subprocess.Popen(
    [sys.executable, '-c', _HELPER],
    stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    env=environment,
    start_new_session=True,
  )
  assert process.stdin is not None
  with contextlib.suppress(OSError):  # it has ended already
    process.stdin.write(sent)
    process.stdin.flush()
  return process


def help_out() -> None:
  """Encodes what stdin names, until that ends: what a helper runs."""
  encoding = pickle.load(sys.stdin.buffer)

  def end_with_the_other() -> None:
    sys.stdin.buffer.read()
    os._exit(1)

  threading.Thread(target=end_with_the_other, daemon=True).start()
  encoding.parts(with_helpers=False)
