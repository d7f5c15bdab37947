"""Ends this process when another one of the run has gone, and says which.

A collective waits for ever for a process that has died, or fails, as the
network has it; jax notices after a minute or two that heartbeats are missing,
and aborts. So every process keeps a connection to process 0 that carries next
to nothing. The kernel closes it when a process ends, whatever ends it, and
probes whether the host is still there. Process 0 tells the rest whom it lost.

Who ends in good order says so first, and how: after a failure the others have
seconds to end by themselves, as they do where all have failed together.
"""

import contextlib
import ctypes
import json
import math
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.errors import RetryableError, UserError

_CONNECT_SECONDS = 10
# For a process to end by itself after another one has failed: where all have
# failed together, they do.
_GRACE_SECONDS = 8.0
# After an error or a peer's end: what explains it may be on its way.
_NEWS_SECONDS = 1.0
_LEAVE_SECONDS = 3.0
# To say why, on a file system that may hang as well.
_SAY_SECONDS = 4.0
# A host that has gone is noticed after 5 + 3 x 2 seconds.
_PROBES = {'TCP_KEEPIDLE': 5, 'TCP_KEEPINTVL': 2, 'TCP_KEEPCNT': 3}
_UNANSWERED_MS = 11_000
_LINE_BYTES = 1024
_AGAIN = 'give the same command again'


class _Link:
  """A connection that carries lines of JSON; `id` is who is there, if known."""

  def __init__(self, link: socket.socket, id: int | None = None) -> None:
    link.settimeout(_CONNECT_SECONDS)
    _probe(link)
    self.socket = link
    self.id = id
    self._unread = b''

  def send(self, news: dict[str, Any]) -> None:
    """Sends a line; who has gone is noticed when reading."""
    with contextlib.suppress(OSError):
      self.socket.sendall(_line(news))

  def read(self) -> list[dict[str, Any]] | None:
    """Returns the lines that have come, None at the end of all."""
    try:
      received = self.socket.recv(_LINE_BYTES)
      *whole, self._unread = (self._unread + received).split(b'\n')
      lines = [json.loads(line) for line in whole]
    except (OSError, ValueError, RecursionError):
      return None
    strange = not all(isinstance(line, dict) for line in lines)
    ends = not received or len(self._unread) > _LINE_BYTES or strange
    return None if ends else lines


class Watch:
  """Watches the other processes of a run, from a thread of its own.

  Attributes:
    outlook: Returns what giving the same command again will do. It is called in
      another thread and may fail.
  """

  def __init__(
    self, count: int, end: Callable[[str, int], None] | None = None
  ) -> None:
    """Begins to watch nobody.

    Args:
      count: The number of processes.
      end: Ends this process, with a line for its user ('' for none) and an exit
        status. It is called in another thread.
    """
    self.outlook: Callable[[], str] = lambda: _AGAIN
    self._count = count
    self._end = end or self._say_and_exit
    self._lock = threading.Lock()
    self._selector = selectors.DefaultSelector()
    self._links: list[_Link] = []
    self._hosts: dict[int, str] = {}
    self._statuses: dict[int, int] = {}  # of those that said that they end
    self._left: int | None = None  # the status that this process ends with
    self._left_at = math.inf
    self._deadline = math.inf  # to end even so, because of `_cause`
    self._cause = 0
    self._ended = False

  def accept(self, server: socket.socket, token: str) -> None:
    """Has process 0 watch those that connect to `server` and know `token`."""
    self._token = token

    def enter() -> None:
      with contextlib.suppress(OSError):
        self._add(_Link(server.accept()[0]))

    self._selector.register(server, selectors.EVENT_READ, enter)
    self._start()

  def connect(
    self, link: socket.socket, token: str, id: int, host: str
  ) -> None:
    """Has process `id` watch process 0, which is on `host`."""
    self._hosts[0] = host
    first = _Link(link, 0)
    first.send({'token': token, 'id': id, 'host': socket.gethostname()})
    self._add(first)
    self._start()

  def leave(self, status: int) -> None:
    """Says that this process ends with `status`.

    If the others do not end too, jax waits for them in vain. Then this process
    ends nevertheless, after seconds.
    """
    with self._lock:
      self._left, self._left_at = status, time.monotonic()
      self._tell({'status': status})
      if status:
        self._end_within(_GRACE_SECONDS + _LEAVE_SECONDS)

  def _start(self) -> None:
    threading.Thread(target=self._watch, name='peers', daemon=True).start()

  def _watch(self) -> None:
    while not self._ended:
      for key, _ in self._selector.select(0.5):
        with self._lock:
          key.data()
      with self._lock:
        if time.monotonic() >= self._deadline:
          self._lost(self._cause)

  def _add(self, link: _Link) -> None:
    self._links.append(link)
    self._selector.register(
      link.socket, selectors.EVENT_READ, lambda: self._read(link)
    )

  def _read(self, link: _Link) -> None:
    lines = link.read()
    for news in lines or []:
      if link.id is not None:
        self._hear(news, link)
      elif not self._admit(news, link):
        lines = None
        break
    if lines is None:
      self._selector.unregister(link.socket)
      self._links.remove(link)
      link.socket.close()
      if link.id is not None:
        self._closed(link.id)

  def _admit(self, hello: dict[str, Any], link: _Link) -> bool:
    """Returns whether one of the run's own has come, and not a stranger."""
    token = str(hello.get('token')).encode()
    if not secrets.compare_digest(token, self._token.encode()):
      return False
    link.id = int(hello['id'])
    self._hosts[link.id] = str(hello['host'])
    return True

  def _hear(self, news: dict[str, Any], link: _Link) -> None:
    """Takes note of a process that ends, or that process 0 has lost."""
    assert link.id is not None
    id = news.get('id', link.id)
    self._hosts.setdefault(id, news.get('host', ''))
    if news['status'] is None:
      self._lost(id)
      return
    self._statuses[id] = news['status']
    self._tell({'id': id, 'host': self._hosts[id], **news}, but=link.id)
    if news['status'] and self._left is None:
      self._end_within(_GRACE_SECONDS, id)

  def _closed(self, id: int) -> None:
    """Takes note of a process that is no longer there."""
    if self._left is None:
      self._lost(id)
    else:
      # It may have ended well, as this process is about to.
      self._end_within(_LEAVE_SECONDS - (time.monotonic() - self._left_at))

  def _end_within(self, seconds: float, cause: int = 0) -> None:
    deadline = time.monotonic() + seconds
    if deadline < self._deadline:
      self._deadline, self._cause = deadline, cause

  def _lost(self, id: int) -> None:
    """Ends this process, because process `id` has ended or gone."""
    if self._ended:
      return
    self._ended = True
    if self._left is not None:
      self._end('', self._left)
      return
    host, status = self._hosts[id], self._statuses.get(id)
    self._tell({'id': id, 'host': host, 'status': status}, but=id)
    how = 'gone' if status is None else f'ended with status {status}'
    self._end(
      f'process {id} of {self._count} (host {host}) has {how}; its own log says'
      ' why',
      os.EX_TEMPFAIL,
    )

  def _tell(self, news: dict[str, Any], but: int | None = None) -> None:
    for link in self._links:
      if link.id not in (None, but):
        link.send(news)

  def _say_and_exit(self, line: str, status: int) -> None:
    """Ends the process, which would wait for its peers if it ended itself."""
    timer = threading.Timer(_SAY_SECONDS, os._exit, [status])
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # the interpreter shuts down
      timer.start()
    with contextlib.suppress(OSError, ValueError):
      sys.stdout.flush()
    if line:
      outlook = _AGAIN
      with contextlib.suppress(Exception):
        outlook = self.outlook()
      with contextlib.suppress(OSError, ValueError):
        print(f'error: {line}; {outlook}', file=sys.stderr, flush=True)
    os._exit(status)


_watches: list[Watch] = []  # that of this process, if it is one of several


def set_outlook(outlook: Callable[[], str]) -> None:
  """Has `outlook()` end the line of a process that has lost another one."""
  for watch in _watches:
    watch.outlook = outlook


@contextlib.contextmanager
def watched(host: str | None) -> Iterator[None]:
  """As a context, ends this process if another one of the run has gone.

  All processes of a run enter it alike, once they have joined.

  Args:
    host: The name of the host of process 0, if all know it by one.
  """
  if jax.process_count() == 1:
    yield
    return
  watch = _open(host)
  _watches.append(watch)
  try:
    yield
  except BaseException as error:
    if not isinstance(error, SystemExit):
      # Perhaps because of a process that the watch is about to miss.
      time.sleep(_NEWS_SECONDS)
    watch.leave(_status(error))
    raise
  watch.leave(0)


def _status(error: BaseException) -> int:
  """Returns the status that the program is going to end with."""
  if isinstance(error, SystemExit):
    return error.code if isinstance(error.code, int) else 1
  if isinstance(error, KeyboardInterrupt):
    return 128 + signal.SIGINT
  if isinstance(error, RetryableError):
    return os.EX_TEMPFAIL
  return 2 if isinstance(error, UserError) else 1


def is_loopback(host: str) -> bool:
  """Returns whether a host's name means this machine, to itself alone."""
  return host in ('localhost', '::1') or host.startswith('127.')


def _open(host: str | None) -> Watch:
  """Returns the watch of this process, and connects it to process 0."""
  watch = Watch(jax.process_count())
  if jax.process_index() == 0:
    server = listen(host if host and is_loopback(host) else '')
    token = secrets.token_hex(16)
    advertise = {
      'hosts': [host] if host else _names(),
      'port': server.getsockname()[1],
      'token': token,
      'host': socket.gethostname(),
    }
    _broadcast(_line(advertise))
    watch.accept(server, token)
    return watch
  found = json.loads(_broadcast(b''))
  link = _connect(found['hosts'], found['port'])
  if link is not None:
    watch.connect(link, found['token'], jax.process_index(), found['host'])
    _hold_aborts()
  return watch


def listen(host: str, port: int = 0) -> socket.socket:
  """Returns a server at a host's address; '' means all of this machine's.

  Raises:
    OSError: The port is taken.
  """
  if host:
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    return socket.create_server((host, port), family=family)
  if socket.has_dualstack_ipv6():
    return socket.create_server(
      ('', port), family=socket.AF_INET6, dualstack_ipv6=True
    )
  return socket.create_server(('', port))


def _names() -> list[str]:
  """Returns by what others may know this host, where no flag says it."""
  names = []
  with (
    contextlib.suppress(OSError),
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way,
  ):
    way.connect(('192.0.2.1', 9))  # nothing is sent, a route is chosen
    names.append(way.getsockname()[0])
  return [*names, socket.gethostname(), socket.getfqdn()]


def _broadcast(line: bytes) -> bytes:
  """Returns the line that process 0 calls this with."""
  padded = np.frombuffer(line.ljust(_LINE_BYTES), np.uint8)
  return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()


def _connect(hosts: list[str], port: int) -> socket.socket | None:
  """Returns a connection to process 0; None if there is no way to it."""
  for host in hosts:
    try:
      return socket.create_connection((host, port), _CONNECT_SECONDS)
    except OSError as error:
      reason = error
  print(
    f'note: process 0 cannot be reached at {" or ".join(hosts)}, port {port}'
    f' ({reason}); that another process has gone is noticed by jax alone, after'
    ' minutes',
    file=sys.stderr,
  )
  return None


def _probe(link: socket.socket) -> None:
  """Has the kernel find out whether the other host is still there."""
  link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in _PROBES.items():
    if hasattr(socket, name):
      link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
  if hasattr(socket, 'TCP_USER_TIMEOUT'):
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNANSWERED_MS)


def _hold_aborts() -> None:
  """Has the thread that aborts this process sleep first.

  Without process 0 jax aborts, at once and whatever it is told; the watch,
  which sees the same at the same time, is then first to end the process. The
  handler is the C library's `sleep`, which gets the number of the signal: 6
  seconds, by which any other abort comes late.
  """
  library = ctypes.CDLL(None)
  library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
  library.signal.restype = ctypes.c_void_p
  library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def _line(news: dict[str, Any]) -> bytes:
  return json.dumps(news).encode() + b'\n'
