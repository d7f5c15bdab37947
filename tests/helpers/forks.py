"""Many real runs of `moe_jax train`, without importing jax for each.

They are forked from a server that has imported the modules and has not touched
a device; each is a session of its own.
"""

import contextlib
import dataclasses
import fcntl
import multiprocessing
import os
import signal
import sys
import termios
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_PRELOAD = [
  'moe_jax.programs.train',
  'moe_jax.training.loop',
  'moe_jax.parallel.launch',
]


@dataclasses.dataclass(eq=False)
class Forked:
  """A run that was started, and where it prints."""

  process: ForkServerProcess
  workdir: Path
  out: Path
  err: Path

  @property
  def pid(self) -> int:
    """Its process."""
    assert self.process.pid is not None
    return self.process.pid

  def printed(self) -> str:
    """What it has printed so far."""
    return self.out.read_text() if self.out.is_file() else ''

  def errors(self) -> str:
    """What it has said on stderr so far."""
    return self.err.read_text()

  def wait_for(self, true: Callable[[], object], seconds: float = 120) -> None:
    """Waits until something is so, as it runs."""
    deadline = time.monotonic() + seconds
    while not true():
      assert self.process.is_alive(), self.errors()
      assert time.monotonic() < deadline, self.printed()
      time.sleep(0.005)

  def signal(self, number: int) -> None:
    """Sends a signal, unless it has ended."""
    with contextlib.suppress(ProcessLookupError):
      os.kill(self.pid, number)

  def ends(self, seconds: float = 120) -> tuple[int, float]:
    """Returns the exit status, and in how many seconds it came."""
    began = time.monotonic()
    self.process.join(seconds)
    taken = time.monotonic() - began
    if self.process.is_alive():
      self.process.kill()
      self.process.join()
      raise AssertionError(f'no end in {seconds} s: {self.printed()}')
    assert self.process.exitcode is not None
    return self.process.exitcode, taken


class Server:
  """Starts runs, with one environment for all."""

  def __init__(self, **env: str) -> None:
    """Sets the environment of the server, which begins with its first run."""
    self._env = {'JAX_PLATFORMS': 'cpu'} | env
    self._context = multiprocessing.get_context('forkserver')
    self._context.set_forkserver_preload(_PRELOAD)

  def start(
    self,
    flags: Sequence[str],
    workdir: Path,
    out: Path | None = None,
    terminal: bool = False,
  ) -> Forked:
    """Starts `moe_jax train`.

    Args:
      flags: Its command line, without --workdir.
      workdir: The directory of the run.
      out: What it prints to: a file, a named pipe, or a terminal, which then
        is that of its session; None for a file beside the workdir.
      terminal: Whether `out` is one.
    """
    number = time.monotonic_ns()
    err = workdir.with_name(f'{workdir.name}-{number}.err')
    out = out or err.with_suffix('.out')
    before = {name: os.environ.get(name) for name in self._env}
    os.environ.update(self._env)
    try:
      process = self._context.Process(
        target=_train,
        args=([*flags, f'--workdir={workdir}'], str(out), str(err), terminal),
      )
      process.start()
    finally:
      for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update(
          {name: value}
        )
    return Forked(process, workdir, out, err)


def _train(flags: list[str], out: str, err: str, terminal: bool) -> None:
  """Trains as the command would, in a process that was just forked."""
  from moe_jax.programs import train

  os.setsid()
  os.chdir(Path(__file__).parents[2])
  # The server ignores SIGINT, and SIGHUP where it was ignored when it began.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  signal.signal(signal.SIGHUP, signal.SIG_DFL)
  printed = os.open(out, os.O_RDWR if terminal else os.O_WRONLY | os.O_CREAT)
  if terminal:
    fcntl.ioctl(printed, termios.TIOCSCTTY, 0)
  told = printed if terminal else os.open(err, os.O_WRONLY | os.O_CREAT)
  os.close(os.open(err, os.O_WRONLY | os.O_CREAT))
  os.dup2(printed, 1)
  os.dup2(told, 2)
  sys.stdout = open(1, 'w', closefd=False)  # noqa: SIM115 (to its end)
  sys.stderr = open(2, 'w', closefd=False)  # noqa: SIM115 (to its end)
  sys.argv = ['moe_jax train', *flags]
  train.main()
