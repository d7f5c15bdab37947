"""Runs programs side by side, each on its share of the machine.

A job is programs one after another; its output goes to a file. A signal stops
all of them as a user would: training saves a checkpoint first.
"""

import contextlib
import dataclasses
import glob
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from moe_jax import runtime, signals
from moe_jax.errors import UserError

_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Job:
  """Programs to run one after another, until one fails.

  Attributes:
    name: What the job is, for people.
    commands: Arguments of `moe_jax`, the program first.
    log: The file that their output is appended to, in a folder that exists.
  """

  name: str
  commands: Sequence[Sequence[str]]
  log: str


@dataclasses.dataclass(frozen=True)
class Share:
  """The part of the machine that one job has.

  Attributes:
    cpus: The cores; none stands for all.
    env: What tells jax which devices are its.
  """

  cpus: tuple[int, ...] = ()
  env: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Running:
  """A job, its share, its program, what was logged before, the signal sent."""

  job: Job
  share: Share
  place: int
  process: subprocess.Popen[bytes]
  written: int
  told: signal.Signals | None = None


def shares(jobs: int | None, most: int) -> list[Share]:
  """Returns the shares of so many jobs side by side.

  On CPUs every job has equally many cores, as the last bits of a run follow
  from their number; on GPUs a job has one, and where there are more jobs than
  GPUs a part of its memory. TPUs are for one job.

  Args:
    jobs: The number of jobs; None is one for each core or GPU.
    most: The most jobs that there are to run.

  Raises:
    UserError: There cannot be so many.
  """
  if jobs is not None and jobs < 1:
    raise UserError(f'--jobs = {jobs} must be at least 1')
  if runtime.runs_on_cpu():
    cpus = sorted(os.sched_getaffinity(0))
    jobs = jobs or min(len(cpus), most)
    each = max(len(cpus) // jobs, 1)
    starts = (n * each % len(cpus) for n in range(jobs))
    return [Share(tuple(cpus[start : start + each])) for start in starts]
  gpus = _gpus()
  if not gpus:
    if jobs not in (None, 1):
      raise UserError(
        f'--jobs = {jobs}: these devices are for one process, so --jobs is 1'
      )
    return [Share()]
  jobs = jobs or min(len(gpus), most)
  each = -(-jobs // len(gpus))
  memory = {runtime.gpu_memory_variable(): f'{0.9 / each:.3f}'}
  return [
    Share(
      env={'CUDA_VISIBLE_DEVICES': gpus[n % len(gpus)]}
      | (memory if each > 1 else {})
    )
    for n in range(jobs)
  ]


def _gpus() -> list[str]:
  """Returns the names of the NVIDIA GPUs that this process may use."""
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  if visible is not None:
    return [name for name in visible.split(',') if name]
  count = len(glob.glob('/dev/nvidia[0-9]*'))
  return [str(number) for number in range(count)]


class Pool:
  """Runs jobs, as many at a time as there are shares.

  It catches SIGINT, SIGTERM and SIGHUP while it is entered: the first ends the
  programs with SIGTERM, a late one (`signals.Stop`) kills them. However this
  process ends, the programs do not outlive it.
  """

  def __init__(self, shares: Sequence[Share], env: Mapping[str, str]) -> None:
    """Makes a pool.

    Args:
      shares: The shares of the machine, one for each job at a time.
      env: The environment of all programs.
    """
    self._stop = signals.Stop('stopping, and saving', end=self._kill)
    self._stop_with = signal.SIGTERM
    self._free = list(shares)
    self._env = env
    self._running: list[_Running] = []
    self._catching = contextlib.ExitStack()

  @property
  def signal(self) -> int | None:
    """The number of the signal that stopped the jobs, None before."""
    return self._stop.signal

  def __enter__(self) -> 'Pool':
    self._catching.enter_context(signals.watched(self._stop.receive))
    return self

  def __exit__(self, *_: object) -> None:
    for running in self._running:
      running.process.kill()
      running.process.wait()
    self._catching.close()

  def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str | None]]:
    """Runs jobs in order, and yields each twice: as it starts and as it ends.

    After a signal no job starts any more, and those that it ended are not
    yielded again.

    Yields:
      A job and None when it starts; a job and its error when it ends: the last
      line that it wrote, or '' if it did well.
    """
    waiting = list(jobs)
    while self._running or (waiting and self.signal is None):
      while waiting and self._free and self.signal is None:
        job, share = waiting.pop(0), self._free.pop(0)
        self._running.append(self._start(job, 0, share))
        yield job, None
      yield from self._ended()
      self._pass_signal_on()
      time.sleep(_POLL_SECONDS)

  def _ended(self) -> Iterator[tuple[Job, str]]:
    """Goes on with jobs whose program has ended; yields those that are done."""
    for running in list(self._running):
      status = running.process.poll()
      if status is None:
        continue
      self._running.remove(running)
      job, place = running.job, running.place + 1
      done = not status and place == len(job.commands)
      if not status and not done and self.signal is None:
        self._running.append(self._start(job, place, running.share))
        continue
      self._free.append(running.share)
      if done:
        yield job, ''
      elif self.signal is None:
        yield job, _error(job, running.written, status)

  def _start(self, job: Job, place: int, share: Share) -> _Running:
    """Starts a program of a job, out of reach of the terminal's signals."""
    child = [sys.executable, '-m', 'moe_jax.programs.child', str(os.getpid())]
    cpus = ','.join(map(str, share.cpus))
    with open(job.log, 'ab') as log:
      written = log.tell()
      process = subprocess.Popen(
        [*child, cpus, *job.commands[place]],
        env={**os.environ, **self._env, **share.env},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )
    return _Running(job, share, place, process, written)

  def _kill(self, number: int) -> None:
    del number
    self._stop_with = signal.SIGKILL

  def _pass_signal_on(self) -> None:
    """Signals every program once: a second time would interrupt its saving."""
    for running in self._running:
      if self.signal is not None and running.told != self._stop_with:
        running.process.send_signal(self._stop_with)
        running.told = self._stop_with


def _error(job: Job, written: int, status: int) -> str:
  """Returns why a program ended: the line that says it, or what ended it.

  Args:
    job: The job.
    written: The bytes that were in its log before.
    status: What the program returned, negative after a signal.
  """
  if status < 0:
    return f'ended by {signal.Signals(-status).name}; see {job.log}'
  with open(job.log, 'rb') as file:
    file.seek(written)
    text = file.read().decode(errors='replace')
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  # What libraries write while the program ends may follow it.
  told = [line for line in lines if line.startswith('error: ')]
  return (told or lines or [f'exit status {status}'])[-1]
