"""Two real processes that form one run, on fake CPU devices of this machine."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import jax

from tests.helpers.nursery import Child, Nursery

ROOT = Path(__file__).parents[2]
DEVICES = 2  # of each process
PATIENCE = 240  # seconds, on a busy machine; a hang is a failure


def free_port() -> int:
  """A port that nobody listens on."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


class Pair:
  """Two processes of a program; leaving the context ends what still runs.

  Attributes:
    processes: process 0, which writes and prints, and process 1.
  """

  def __init__(
    self,
    program: str,
    *flags: list[str],
    nursery: Nursery | None = None,
    **env: str,
  ) -> None:
    """Starts the program twice, with `flags`: of both, or of each.

    A nursery, whose environment it then has, spares the imports.
    """
    both = flags if len(flags) == 2 else flags * 2
    coordinator = f'127.0.0.1:{free_port()}'
    # To files: a pipe that nobody reads fills up and stops its process.
    self._files = contextlib.ExitStack()
    self._out, self._err = (
      [self._files.enter_context(tempfile.TemporaryFile()) for _ in both]  # noqa: SIM115
      for _ in range(2)
    )
    place = [f'--coordinator={coordinator}', '--num_processes=2']
    self.processes: list[subprocess.Popen[bytes] | Child] = []
    for i in range(2):
      argv = [program, *both[i], *place, f'--process_id={i}']
      if nursery:
        child = nursery.fork(argv, self._out[i], self._err[i])
        self.processes.append(child)
        continue
      self.processes.append(
        subprocess.Popen(
          [sys.executable, *argv],
          cwd=ROOT,
          env=os.environ | ENV | env,
          stdout=self._out[i],
          stderr=self._err[i],
        )
      )

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    for process in self.processes:
      process.kill()
      process.wait()
    self._files.close()

  def printed(self, i: int) -> str:
    """What process `i` has written to stdout, without what gloo does.

    Gloo's threads write at once and in pieces, so their lines may be mixed.
    """
    lines = _read(self._out[i]).splitlines(keepends=True)
    gloos = re.compile(r'.*(Gloo|connected|ranks|peer)|[\s\d.:]*$')
    return ''.join(line for line in lines if not gloos.match(line))

  def errors(self, i: int) -> str:
    """What process `i` has written to stderr."""
    return _read(self._err[i])

  def wait_for(self, text: str) -> None:
    """Waits until process 0 has printed `text`."""
    deadline = time.monotonic() + PATIENCE
    while text not in self.printed(0):
      assert time.monotonic() < deadline, self.report()
      assert self.processes[0].poll() is None, self.report()
      time.sleep(0.02)

  def wait(self) -> list[int]:
    """Waits for both; returns their exit statuses."""
    deadline = time.monotonic() + PATIENCE
    try:
      return [
        process.wait(max(deadline - time.monotonic(), 0))
        for process in self.processes
      ]
    except subprocess.TimeoutExpired as error:
      raise AssertionError(f'it hangs\n{self.report()}') from error

  def report(self) -> str:
    """All that both have written."""
    return '\n'.join(f'{i}: {self.printed(i)}{self.errors(i)}' for i in (0, 1))


def finish(program: str, flags: list[str], **env: str) -> None:
  """Runs a program in two processes to its good end."""
  with Pair(program, flags, nursery=None, **env) as pair:
    assert pair.wait() == [0, 0], pair.report()


def _read(file: BinaryIO) -> str:
  # From the start, and without moving where the child writes.
  return os.pread(file.fileno(), 1 << 24, 0).decode(errors='replace')


ENV = {
  'JAX_PLATFORMS': 'cpu',
  'JAX_NUM_CPU_DEVICES': str(DEVICES),
  'JAX_COMPILATION_CACHE_DIR': str(jax.config.jax_compilation_cache_dir),  # type: ignore[attr-defined]
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
}
