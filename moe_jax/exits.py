"""How programs end: with what status, what line, and where the rest is kept.

A user's mistake becomes one line on stderr and exit status 2, a fault of the
world that the same command may overcome one with 75, any other fault of the
world one with 1 and its traceback in DIR/crash.txt; a programming error keeps
its traceback. Nothing here imports jax.
"""

import contextlib
import datetime
import os
import re
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

from moe_jax import disk, signals
from moe_jax.errors import RetryableError, UserError, said

_LONGEST = 500  # characters of what a library says


def exit_with(run: Callable[[], None]) -> NoReturn:
  """Calls `run` and exits with the status of `ended`."""
  sys.exit(ended(run))


def ended(run: Callable[[], None]) -> int:
  """Calls `run` and returns the exit status of a program that does no more.

  It is 0; 2 after a user's mistake; 75 after a fault of the world that
  the same command may overcome, 1 after another; 128 + the number of a signal,
  which SIGPIPE is if nobody has read the output to its end.
  """
  with signals.ending(), _printing() as unread:
    status = _status(run)
    if not status and unread():
      status = 128 + signal.SIGPIPE
  return status


def _status(run: Callable[[], None]) -> int:
  """Calls `run`, tells what it ends with, and returns the exit status."""
  try:
    run()
  except UserError as error:
    return _tell(said(error), 2)
  except RetryableError as error:
    return _tell(said(error), os.EX_TEMPFAIL)
  except KeyboardInterrupt:
    return 128 + signal.SIGINT
  except Exception as error:
    message = said(error)
    if message.startswith('Unable to initialize backend'):
      chosen = os.environ.get('JAX_PLATFORMS', 'not set')
      return _tell(f'JAX_PLATFORMS is {chosen}: {message[:300]}', 2)
    if not _is_of_the_world(error):
      raise
    name = ': '.join(filter(None, [type(error).__name__, _short(message)]))
    told = f'{name}{_kept(error)}'
    return _tell(told, os.EX_TEMPFAIL if disk.is_full(error) else 1)
  return 0


def _short(message: str) -> str:
  """Returns both ends of what a library says: what and why."""
  if len(message) <= _LONGEST:
    return message
  return f'{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}'


def _tell(message: str, status: int) -> int:
  print('error:', message, file=sys.stderr)
  return status


def _is_of_the_world(error: Exception) -> bool:
  """Returns whether an error comes from files, devices or memory."""
  kinds: tuple[type[BaseException], ...] = (
    OSError,
    MemoryError,
    RecursionError,  # of a file that is nested too deeply
  )
  # JAX, which cannot be imported here, may have been, also in part.
  jax_errors = getattr(sys.modules.get('jax'), 'errors', None)
  kinds += tuple(filter(None, [getattr(jax_errors, 'JaxRuntimeError', None)]))
  if isinstance(error, kinds) or disk.is_full(error):
    return True
  # Orbax raises what reading an array failed with as a bare Exception.
  frames = traceback.extract_tb(error.__traceback__)
  return type(error) is Exception and any(
    f'{os.sep}orbax{os.sep}' in frame.filename for frame in frames
  )


def _kept(error: Exception) -> str:
  """Keeps the traceback of an error in a file, and returns where."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  head = f'{now} process {os.getpid()} on {socket.gethostname()}: {sys.argv}\n'
  with contextlib.suppress(Exception):  # memory may be what is missing
    text = head + ''.join(traceback.format_exception(error)) + '\n'
    for make in (_in_workdir, _in_temporary_folder):
      with contextlib.suppress(OSError), make() as file:
        file.write(text)
        file.flush()
        return f'; the traceback is in {file.name}'
  return ''


def _in_workdir() -> TextIO:
  """Opens crash.txt in the --workdir of the command line, if it is there."""
  for word, after in zip(sys.argv, [*sys.argv[1:], ''], strict=True):
    flag = re.fullmatch(r'--?workdir(?:=(.*))?', word, re.DOTALL)
    if flag:
      folder = after if flag[1] is None else flag[1]
      path = os.path.join(os.path.expanduser(folder), 'crash.txt')
      return open(path, 'a', encoding='utf-8', errors='backslashreplace')
  raise FileNotFoundError('no --workdir')


def _in_temporary_folder() -> Any:
  return tempfile.NamedTemporaryFile(
    'w',
    prefix='moe_jax-crash-',
    suffix='.txt',
    encoding='utf-8',
    errors='backslashreplace',
    delete=False,
  )


class _Printed:
  """A stream that goes on where it cannot be written.

  A terminal that is closed, a reader that has gone (`| head`) or a full disk
  below a log is no reason to end what is being computed.

  Attributes:
    unread: Whether its reader has gone.
  """

  def __init__(self, stream: TextIO) -> None:
    self._stream = stream
    self.unread = False

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    self._try(lambda: self._stream.write(self._writable(text)))
    return len(text)

  def writelines(self, lines: Any) -> None:
    for line in lines:
      self.write(line)

  def flush(self) -> None:
    self._try(self._stream.flush)

  def _writable(self, text: str) -> str:
    """Returns `text`, escaped where the stream's encoding lacks it."""
    encoding = self._stream.encoding or 'utf-8'
    return text.encode(encoding, 'backslashreplace').decode(encoding)

  def _try(self, write: Callable[[], Any]) -> None:
    try:
      write()
    except BrokenPipeError:
      self.unread = True
    except OSError:
      pass
    except ValueError:
      if not self._stream.closed:
        raise


@contextlib.contextmanager
def _printing() -> Iterator[Callable[[], bool]]:
  """Lets stdout and stderr never raise; yields whether stdout's reader is gone.

  Programs of programs, as `moe_jax eval` is one, leave it as it is.
  """
  before = sys.stdout, sys.stderr
  wrapped = [
    stream
    if stream is None or isinstance(stream, _Printed)
    else _Printed(stream)
    for stream in before
  ]
  sys.stdout, sys.stderr = wrapped

  def unread() -> bool:
    if wrapped[0] is not None:
      wrapped[0].flush()
    return getattr(wrapped[0], 'unread', False)

  try:
    yield unread
  finally:
    sys.stdout, sys.stderr = before
    for stream in before:
      _settle(stream)


def _settle(stream: TextIO | None) -> None:
  """Makes sure that Python's own flush at the end does not fail."""
  if stream is None:
    return
  try:
    stream.flush()
  except (OSError, ValueError):
    with contextlib.suppress(OSError, ValueError):
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, stream.fileno())
      os.close(nowhere)
