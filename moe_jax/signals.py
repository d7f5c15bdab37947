"""SIGINT, SIGTERM and SIGHUP: what ends a program, and what lets it save first.

Python runs its handlers between two steps of the main thread's interpreter,
which comes back from a compilation after minutes, and from a collective that
hangs never. So a thread of its own learns of every signal, at once.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 5.0  # seconds in which a second signal is taken for the first

Handler = Callable[[int, FrameType | None], None]

_TO_HEAR = 1.0  # seconds in which the interpreter hears of a signal, or never
_TO_UNWIND = 8.0  # seconds to remove temporary files in
_STOP = 0  # no signal has this number


def _ignore(number: int, frame: FrameType | None) -> None:
  """Does nothing: that Python has a handler is what wakes the thread."""
  del number, frame


def _default_in_child() -> None:
  """Gives a forked process its signals back; they would be told to ours."""
  for number in SIGNALS:
    if signal.getsignal(number) in _handlers:
      signal.signal(number, signal.SIG_DFL)
      signal.set_wakeup_fd(-1)


_handlers: list[Handler] = []  # that are in use
_endings: list['_Ending'] = []  # around what runs
os.register_at_fork(after_in_child=_default_in_child)


@contextlib.contextmanager
def watched(
  receive: Callable[[int], None],
  handler: Handler = _ignore,
  numbers: Sequence[int] = SIGNALS,
) -> Iterator[None]:
  """Calls `receive` in a thread of its own with the number of each signal.

  A signal that is ignored, as under nohup, stays so. What watched before has
  none of it meanwhile, and all again afterwards. Signals belong to the main
  thread: in another one nothing is done.

  Args:
    receive: Is called with one signal after another.
    handler: What the main thread does when it comes to it.
    numbers: The signals.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  # What was to end it was swallowed, as in a destructor: nothing new begins.
  for each in _endings:
    if each.signal is not None:
      leave(each.signal)
  _handlers.append(handler)
  end, start = os.pipe()
  os.set_blocking(start, False)

  def read() -> None:
    while (number := os.read(end, 1)[0]) != _STOP:
      receive(number)

  thread = threading.Thread(target=read, name='signals', daemon=True)
  thread.start()
  waked = signal.set_wakeup_fd(start, warn_on_full_buffer=False)
  previous = {
    number: signal.signal(number, handler)
    for number in numbers
    if signal.getsignal(number) != signal.SIG_IGN
  }
  try:
    yield
  finally:
    for number, before in previous.items():
      # None is a handler that is not Python's, which it cannot put back.
      signal.signal(number, signal.SIG_DFL if before is None else before)
    signal.set_wakeup_fd(waked)
    os.write(start, bytes([_STOP]))
    thread.join()
    os.close(start)
    os.close(end)
    _handlers.remove(handler)


class Stop:
  """The first signal, which asks a program to stop, and those after it.

  Whoever passes signals on passes on what the whole group of processes has got
  already. So one that follows within `PATIENCE` seconds is the same one again;
  a later one ends the program without what it was about to save.

  Attributes:
    signal: The number of the first one, None before.
  """

  def __init__(
    self,
    first: str,
    end: Callable[[int], None] | None = None,
    pass_on: Callable[[], None] | None = None,
  ) -> None:
    """Waits for nothing yet; `receive` is for `watched`.

    Args:
      first: What a first signal makes the program do, for people.
      end: What a late one does; None leaves the process.
      pass_on: What else a first one does.
    """
    self.signal: int | None = None
    self._first = first
    self._end = leave if end is None else end
    self._pass_on = pass_on
    self._since = 0.0

  def receive(self, number: int) -> None:
    """Takes a signal."""
    name, now = signal.Signals(number).name, time.monotonic()
    if self.signal is None:
      self.signal, self._since = number, now
      if self._pass_on is not None:
        self._pass_on()
      tell(
        f'{name}: {self._first}; once more after {PATIENCE:.0f} s ends it'
        ' at once'
      )
    elif now - self._since < PATIENCE:
      tell(
        f'{name} again, too soon to count: {self._first}; once more after'
        f' {PATIENCE:.0f} s ends it at once'
      )
    else:
      self._end(number)


class _Ending:
  """Ends a program that has nothing to save: soon, and in silence.

  The main thread has a moment to hear of it and a few seconds to remove its
  temporary files; then the process ends wherever it is.
  """

  def __init__(self) -> None:
    self.signal: int | None = None
    self._heard = threading.Event()

  def receive(self, number: int) -> None:
    self.signal = number
    if self._heard.wait(_TO_HEAR):
      time.sleep(_TO_UNWIND)
    leave(number)

  def handle(self, number: int, frame: FrameType | None) -> None:
    # Who signals twice will not wait for the temporary files. And libraries in
    # C that are being imported print a traceback or crash on an exception.
    if self._heard.is_set() or _imports(frame):
      leave(number)
    self.signal = number
    self._heard.set()
    # What is cut in two, as a destructor, fails in many words.
    sys.unraisablehook = lambda _: None
    threading.excepthook = lambda _: None
    raise KeyboardInterrupt


def _imports(frame: FrameType | None) -> bool:
  """Returns whether a module is being imported."""
  while frame is not None:
    if frame.f_code.co_filename.startswith('<frozen importlib'):
      return True
    frame = frame.f_back
  return False


@contextlib.contextmanager
def ending() -> Iterator[None]:
  """Ends the process with 128 + the number of a signal that comes inside.

  What is inside gets a KeyboardInterrupt, whatever the signal; what that turns
  into is not told.
  """
  found = _Ending()
  with watched(found.receive, found.handle):
    _endings.append(found)
    try:
      yield
    except BaseException:
      if found.signal is None:
        raise
    finally:
      _endings.remove(found)
    if found.signal is not None:
      leave(found.signal)


def leave(number: int) -> None:
  """Ends the process, whatever its threads do, as a signal's end is told."""
  for stream in (sys.stdout, sys.stderr):
    # Nothing that waits: its lock may be held by a thread that waits itself.
    with contextlib.suppress(Exception):
      if select.select([], [stream], [], 0)[1]:
        stream.flush()
  os._exit(128 + number)


def tell(text: str) -> None:
  """Writes a line to stderr, unless nobody would read it."""
  with contextlib.suppress(OSError, ValueError):
    if select.select([], [2], [], 0)[1]:
      os.write(2, f'{text}\n'.encode())
