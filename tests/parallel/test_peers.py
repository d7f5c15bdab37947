"""Who has gone is said by all others, and who has ended well by nobody."""

import json
import queue
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_jax.errors import RetryableError, UserError
from moe_jax.parallel import peers
from moe_jax.parallel.peers import Watch

ROOT = Path(__file__).parents[2]
TOKEN = secrets.token_hex(4)
PATIENCE = 30  # seconds, on a busy machine
QUIET = 0.5  # seconds in which nothing is to happen


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(peers, '_GRACE_SECONDS', 0.2)
  monkeypatch.setattr(peers, '_LEAVE_SECONDS', 0.2)


class Process:
  """A watch, and with what line and status it has ended its process."""

  def __init__(self, count: int) -> None:
    self.ended: queue.Queue[tuple[str, int]] = queue.Queue()
    self.watch = Watch(
      count, lambda line, status: self.ended.put((line, status))
    )

  def end(self) -> tuple[str, int]:
    return self.ended.get(timeout=PATIENCE)


class Star:
  """Process 0, `watching` others that watch it, and one that is to die."""

  def __init__(self, watching: int = 1) -> None:
    server = peers.listen('127.0.0.1')
    self.address = server.getsockname()
    self.mortal_id = watching + 1
    self.all = [Process(watching + 2) for _ in range(watching + 1)]
    self.all[0].watch.accept(server, TOKEN)
    for id, process in enumerate(self.all[1:], 1):
      link = socket.create_connection(self.address)
      process.watch.connect(link, TOKEN, id, 'first')
    self.mortal = socket.create_connection(self.address)
    hello = {'token': TOKEN, 'id': self.mortal_id, 'host': 'mortal'}
    send(self.mortal, hello)
    wait_for(lambda: len(self.all[0].watch._hosts) == watching + 1)


def send(link: socket.socket, news: dict[str, Any]) -> None:
  link.sendall(json.dumps(news).encode() + b'\n')


def wait_for(reached: Callable[[], bool]) -> None:
  deadline = time.monotonic() + PATIENCE
  while not reached():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_who_has_gone_is_named_by_all_that_are_left() -> None:
  star = Star(watching=3)
  star.mortal.close()
  line = 'process 4 of 5 (host mortal) has gone; its own log says why'
  assert [process.end() for process in star.all] == [(line, 75)] * 4


def test_a_watch_that_has_ended_its_process_watches_no_more() -> None:
  before = set(threading.enumerate())
  star = Star()
  threads = set(threading.enumerate()) - before
  assert [thread.name for thread in threads] == ['peers'] * 2
  star.mortal.close()
  for process in star.all:
    process.end()
  wait_for(lambda: not any(thread.is_alive() for thread in threads))


def test_process_0_is_missed_too() -> None:
  with peers.listen('127.0.0.1') as server:
    process = Process(2)
    link = socket.create_connection(server.getsockname())
    process.watch.connect(link, TOKEN, 1, 'first')
    first, _ = server.accept()
    assert json.loads(first.makefile().readline())['id'] == 1
    first.close()
  line = 'process 0 of 2 (host first) has gone; its own log says why'
  assert process.end() == (line, 75)


def test_who_fails_alone_is_followed_after_a_while() -> None:
  star = Star()
  send(star.mortal, {'status': 2})
  line = 'process 2 of 3 (host mortal) has ended with status 2; its own log'
  for process in star.all:
    told, status = process.end()
    assert told.startswith(line)
    assert status == 75


def test_who_fails_alone_does_not_wait_for_those_that_have_gone() -> None:
  star = Star()
  star.all[0].watch.leave(2)
  star.mortal.close()
  assert star.all[0].end() == ('', 2)


@pytest.mark.parametrize('status', [0, 2, 143])
def test_nobody_is_missed_where_all_end(
  status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(peers, '_GRACE_SECONDS', QUIET)
  star = Star()
  send(star.mortal, {'status': status})
  for process in star.all:
    process.watch.leave(status)
  star.mortal.close()
  # That which jax waits for in vain: it ends all the same, as it would have.
  assert star.all[0].end() == ('', status)


def test_who_has_done_all_waits_for_the_others() -> None:
  star = Star()
  send(star.mortal, {'status': 0})
  star.all[1].watch.leave(0)
  time.sleep(QUIET)
  assert all(process.ended.empty() for process in star.all)


def test_strangers_are_neither_watched_nor_heard() -> None:
  star = Star()
  for said in (
    b'',
    b'GET / HTTP/1.1\r\n\r\n',
    b'{"token": "guess", "id": 1, "host": "here"}\n{"id": 1, "status": null}\n',
    b'x' * 5000,
    b'[]\n',
    b'[' * 1000 + b'\n',
    '{"token": "é"}\n'.encode(),
    b'\xff\n',
    b'{"id": 1, "status": null}\n',
  ):
    with socket.create_connection(star.address) as stranger:
      stranger.sendall(said)
  silent = socket.create_connection(star.address)
  time.sleep(QUIET)
  assert all(process.ended.empty() for process in star.all)
  star.mortal.close()
  assert 'process 2 of 3' in star.all[0].end()[0]
  silent.close()


def test_the_kernel_looks_after_hosts_that_have_gone() -> None:
  star = Star()
  (link,) = star.all[1].watch._links
  option = link.socket.getsockopt
  assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
  seconds = option(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
  seconds += option(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) * option(
    socket.IPPROTO_TCP, socket.TCP_KEEPCNT
  )
  assert seconds < 15


def test_process_0_is_found_where_no_flag_names_its_host() -> None:
  with peers.listen('') as server:
    link = peers._connect(peers._names(), server.getsockname()[1])
    assert link
    link.close()


def test_who_cannot_be_watched_is_said(
  capsys: pytest.CaptureFixture[str],
) -> None:
  with peers.listen('127.0.0.1') as server:
    port = server.getsockname()[1]
  assert peers._connect(['127.0.0.1', 'localhost'], port) is None
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(
    f'note: process 0 cannot be reached at 127.0.0.1 or localhost, port {port}'
  )


@pytest.mark.parametrize(
  ('host', 'is_loopback'),
  [
    ('localhost', True),
    ('127.0.0.1', True),
    ('::1', True),
    ('node3', False),
    ('10.0.0.1', False),
    ('localhost.example', False),
  ],
)
def test_a_loopback_name_is_known(host: str, is_loopback: bool) -> None:
  assert peers.is_loopback(host) == is_loopback


@pytest.mark.parametrize(
  ('error', 'status'),
  [
    (SystemExit(143), 143),
    (SystemExit('why'), 1),
    (KeyboardInterrupt(), 130),
    (UserError('x'), 2),
    (RetryableError('x'), 75),
    (RuntimeError('x'), 1),
  ],
)
def test_peers_are_told_how_a_process_ends(
  error: BaseException, status: int
) -> None:
  assert peers._status(error) == status


@pytest.mark.slow
def test_an_abort_waits_for_who_knows_the_reason() -> None:
  code = (
    'import ctypes, os, threading;'
    'from moe_jax.parallel import peers;'
    'peers._hold_aborts();'
    'threading.Timer(1, os._exit, [75]).start();'
    'ctypes.CDLL(None).abort()'
  )
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False)
  assert done.returncode == 75
