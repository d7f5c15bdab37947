"""Programs forked from a process that has imported them: an import takes long.

Run as a program, it is that process. It has touched no device, so that each
child starts jax for itself.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Self

import jax

ROOT = Path(__file__).parents[2]


class Child:
  """A forked process, with the methods of `subprocess.Popen` that we use."""

  def __init__(self, pid: int, status: Path) -> None:
    self.pid = pid
    self.returncode: int | None = None
    self._status = status

  def poll(self) -> int | None:
    """The exit status, minus the number of a signal; None before the end."""
    if self.returncode is None and self._status.exists():
      self.returncode = int(self._status.read_text())
    return self.returncode

  def wait(self, timeout: float = 600) -> int:
    """The exit status, once it has ended."""
    deadline = time.monotonic() + timeout
    while self.poll() is None:
      if time.monotonic() > deadline:
        raise subprocess.TimeoutExpired(str(self.pid), timeout)
      time.sleep(0.01)
    assert self.returncode is not None
    return self.returncode

  def send_signal(self, number: int) -> None:
    """Sends a signal, if it still runs."""
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self) -> None:
    """Kills it, if it still runs."""
    self.send_signal(signal.SIGKILL)


class Nursery:
  """As a context, forks programs; `folder` gets their exit statuses."""

  def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
    self._folder = folder
    self._forked = 0
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'tests.helpers.nursery'],
      cwd=ROOT,
      env=os.environ | env,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._process.communicate()  # its end of file

  def fork(
    self,
    argv: Sequence[str],
    out: IO[Any],
    err: IO[Any],
    **config: Any,
  ) -> Child:
    """Starts a program with its flags; `config` sets options of jax in it."""
    self._forked += 1
    status = self._folder / f'status-{self._forked}'
    files = [f'/proc/{os.getpid()}/fd/{file.fileno()}' for file in (out, err)]
    order = {
      'argv': list(argv),
      'files': files,
      'status': str(status),
      'config': config,
    }
    stdin, stdout = self._process.stdin, self._process.stdout
    assert stdin and stdout
    stdin.write(json.dumps(order) + '\n')
    stdin.flush()
    return Child(int(stdout.readline()), status)


def _serve() -> None:
  """Forks what it is told to, until its standard input ends."""
  signal.signal(signal.SIGCHLD, signal.SIG_IGN)
  for line in sys.stdin:
    order = json.loads(line)
    reader, writer = os.pipe()
    if os.fork():
      os.close(writer)
      print(os.read(reader, 20).decode(), flush=True)
      os.close(reader)
      continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
      os.write(writer, str(pid).encode())
      _report(pid, Path(order['status']))
    os.close(reader)
    os.close(writer)
    _become(**order)


def _report(pid: int, path: Path) -> NoReturn:
  """Leaves in a file how a child of this process ends."""
  status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  unfinished = path.with_suffix('.tmp')
  unfinished.write_text(str(status))
  unfinished.replace(path)
  os._exit(0)


def _become(
  argv: list[str], files: list[str], config: dict[str, Any], **_: Any
) -> NoReturn:
  """Runs a program in this process, as its command line would."""
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  for descriptor, path in enumerate(files, 1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
  for name, value in config.items():
    jax.config.update(name, value)
  sys.argv = argv
  runpy.run_path(argv[0], run_name='__main__')
  sys.exit(0)


if __name__ == '__main__':
  # What the programs import when they run.
  from moe_jax.evaluation import checkpoints  # noqa: F401
  from moe_jax.parallel import launch  # noqa: F401
  from moe_jax.training import loop  # noqa: F401

  _serve()
