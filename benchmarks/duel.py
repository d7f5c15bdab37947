"""Measures processes against each other, one step of each after the other.

Frameworks that would fight over threads and memory in one process get one
each. Only one of them works at a time, and every round runs one step of all,
so that a machine whose speed drifts is fair to them.

A worker says what it is in one JSON line once it is ready, runs a step for
every line that it reads, and answers with what the step took. What it prints
besides goes to stderr.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import resident
from moe_jax import strict_json
from moe_jax.errors import UserError

_READY = 'peak_bytes_when_ready'
_PAUSE = 0.1  # seconds: threads of the one before have stopped spinning


class Measured(NamedTuple):
  """What one worker said.

  Attributes:
    facts: of the worker, as it gave them to `serve`.
    seconds: of every step after the warm-up.
    peak_bytes: the most memory that the process has held (its resident set).
    steps_peak_bytes: the same from when it was ready on, without what it needed
      to get there, such as a compiler's; None where the system cannot tell.
  """

  facts: dict[str, Any]
  seconds: list[float]
  peak_bytes: int
  steps_peak_bytes: int | None


def run(
  commands: Mapping[str, Sequence[str]],
  *,
  rounds: int,
  warmup: int,
  threads: int,
) -> dict[str, Measured]:
  """Runs the workers in turn.

  Args:
    commands: the command line of each worker, by its name.
    rounds: steps of each that count.
    warmup: steps of each before them.
    threads: that each may compute with; on Linux, cores too.

  Raises:
    UserError: a worker ended before its time, with its last words on stderr; or
      `threads` is out of range.
  """
  if threads < 1:
    raise UserError(f'--threads = {threads} must be at least 1')
  with contextlib.ExitStack() as stack:
    # One after the other: what a worker does to get ready disturbs no other.
    workers = {
      name: stack.enter_context(_Worker(name, command, threads))
      for name, command in commands.items()
    }
    seconds = {name: [] for name in workers}
    for _ in range(warmup + rounds):
      for name, worker in workers.items():
        time.sleep(_PAUSE)
        seconds[name].append(worker.step())
    return {
      name: Measured(worker.facts, seconds[name][warmup:], *worker.peaks())
      for name, worker in workers.items()
    }


def share_accelerator() -> None:
  """Lets several processes, this one and workers, have jax on one GPU."""
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')


def serve(step: Callable[[], None], facts: Mapping[str, Any]) -> None:
  """A worker's side: runs `step`, which waits for its results, when asked.

  Args:
    step: what is measured.
    facts: of this side, that JSON can hold.
  """
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # whatever a library prints is no answer
  time.sleep(_PAUSE)  # a step's memory is freed a little after its results
  before = resident.peak_bytes()
  anew = resident.start_anew()
  _say(answers, dict(facts) | {_READY: before if anew else None})
  for _ in sys.stdin:
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    _say(answers, {'seconds': seconds, 'peak_bytes': resident.peak_bytes()})


class _Worker:
  """A process that answers; `with` ends it."""

  def __init__(self, name: str, command: Sequence[str], threads: int):
    self._name = name
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {'OMP_NUM_THREADS': str(threads)},
    )
    self._peak_bytes = 0
    try:
      if hasattr(os, 'sched_setaffinity'):  # XLA starts a thread for each core
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.sched_setaffinity(self._process.pid, cores)
      self.facts = self._answer()
      # None where the peak of the steps holds what was before them too.
      self._ready_bytes = self.facts.pop(_READY)
    except BaseException:
      self.__exit__()
      raise

  def step(self) -> float:
    """Seconds that the worker took for one step."""
    with contextlib.suppress(BrokenPipeError):  # its silence is reported
      self._process.stdin.write('\n')
      self._process.stdin.flush()
    answer = self._answer()
    self._peak_bytes = answer['peak_bytes']
    return answer['seconds']

  def peaks(self) -> tuple[int, int | None]:
    """The most bytes that the process has held, in all and in its steps."""
    if self._ready_bytes is None:
      return self._peak_bytes, None
    return max(self._ready_bytes, self._peak_bytes), self._peak_bytes

  def _answer(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    if not line:
      status = self._process.wait()
      raise UserError(
        f'the worker {self._name} ended with status {status}; what it said is'
        ' above'
      )
    return json.loads(line)

  def __enter__(self) -> '_Worker':
    return self

  def __exit__(self, *_: object) -> None:
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    try:
      self._process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()


def _say(file: Any, answer: dict[str, Any]) -> None:
  file.write(strict_json.dumps(answer) + '\n')
  file.flush()
