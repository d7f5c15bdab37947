"""Where a run's numbers go: metrics.jsonl, TensorBoard and the terminal."""

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from moe_jax import errors
from moe_jax.config import evaluations, mixture, router_names, saved
from moe_jax.model import sizes
from moe_jax.model.build import compute_dtype
from moe_jax.parallel import multihost
from moe_jax.training import device_peaks, terminal
from moe_jax.training.metrics import (
  load_map,
  router_scalars,
  routing_metrics,
  source_losses,
)
from moe_jax.training.metrics_writer import MetricsWriter
from moe_jax.training.router_gradients import ROUTER_GRADIENTS
from moe_jax.training.state import Setup
from moe_jax.training.trackers import Tracking

_PICTURES = 100  # of a run; TensorBoard shows ten of them


class Logger:
  """Writes a run's progress: metrics.jsonl, TensorBoard and the terminal.

  The metrics of a step are noted while it runs and written once the next one
  has been dispatched, so that reading them does not leave the device idle.
  """

  def __init__(self, setup: Setup, workdir: str, restored: int | None):
    """Opens the files, and drops from them what comes after `restored`.

    Args:
      setup: The run's setup.
      workdir: The workdir.
      restored: The step of the checkpoint that the run goes on from; None where
        it begins.

    Raises:
      UserError: A file of an earlier start is not what it should be.
      RetryableError: The disk is full.
    """
    config, start = setup.config, restored or 0
    self._steps = config.train.steps
    self._sources = mixture.names(config.data)
    self._routers = router_names(config)
    self._pictured: int | None = None
    self._tokens_per_step = config.train.batch_size * config.data.seq_len
    params = setup.abstract['params']
    self._flops_per_token = sizes.flops_per_token(
      config, params, setup.declarations
    )
    self._devices = list(setup.mesh.devices.flat)
    self._dtype = str(compute_dtype(config, setup.mesh))
    self._start = self._read_at = start
    self._active = multihost.is_main_process()
    self._tracking = Tracking(config, workdir, self.say)
    self._open = functools.partial(
      MetricsWriter,
      workdir,
      active=self._active,
      every={
        'train': config.train.log_every,
        # The longest: which of them a line is of, it does not say.
        'evaluation': max(
          (each.every for each in evaluations.during_training(config)),
          default=0,
        ),
      },
      tell=self.say,
      tracking=self._tracking,
    )
    self._writer = self._open(resume_step=restored)
    self._writer.text('config', saved.to_json(config), start)
    self._began = self._since = time.perf_counter()
    self._compiled = False
    self._first_seconds = math.nan
    self._paused = 0.0
    self._waited = self._waited_before = 0.0
    self._noted: tuple[int, dict[str, Any]] | None = None
    self._results: dict[str, Mapping[str, float]] = {}

  def __enter__(self) -> 'Logger':
    if self._active:
      self._tracking.open()
    return self

  def __exit__(self, *_: object) -> None:
    self._writer.close()
    self._tracking.close()

  def say(self, text: str) -> None:
    """Prints on one process of the run; that it cannot ends nothing."""
    if self._active:
      with contextlib.suppress(OSError):
        print(text, flush=True)

  def evaluated(self) -> bool:
    """Returns whether the step gone on from has been evaluated.

    All processes of a run call this alike.
    """
    return bool(multihost.broadcast_from_first(int(self._writer.evaluated)))

  def compiling(self) -> None:
    """Tells that nothing is heard for a while, which may be minutes."""
    self.say('compiling the training step ...')

  def compiled(self, metrics: dict[str, Any], waited: float) -> bool:
    """Waits for the first step, whose time is compilation, not training.

    Args:
      metrics: What the step computes.
      waited: As in `note`.

    Returns:
      Whether it was the first.
    """
    if self._compiled:
      return False
    self._compiled = True
    jax.block_until_ready(metrics)
    now = time.perf_counter()
    self._first_seconds = now - self._began
    self.say(f'first step after {terminal.duration(self._first_seconds)}')
    self._read_at, self._since, self._paused = self._start + 1, now, 0.0
    self._waited_before = waited
    return True

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves out of the pace of training what happens meanwhile."""
    began = time.perf_counter()
    try:
      yield
    finally:
      self._paused += time.perf_counter() - began

  def note(self, step: int, metrics: dict[str, Any], waited: float) -> None:
    """Keeps the metrics of a step that has just been dispatched.

    Args:
      step: The number of the step.
      metrics: What it computes.
      waited: The seconds that the run has waited for batches, up to now.
    """
    self._noted, self._waited = (step, metrics), waited

  def write(self, skipped_steps: int) -> None:
    """Writes what was noted, if anything; waits for that step to end.

    Args:
      skipped_steps: The steps up to that one that changed nothing.
    """
    if self._noted is None:
      return
    (step, metrics), self._noted = self._noted, None
    load, found = metrics.pop('load'), metrics.pop('sources', None)
    gradients = metrics.pop(ROUTER_GRADIENTS, {})
    values = {name: float(value) for name, value in metrics.items()}
    loss = values['loss']
    speed, data_wait = self._pace(step)
    achieved = device_peaks.utilisation(
      speed * self._flops_per_token, self._devices, self._dtype
    )
    values |= {'skipped_steps': skipped_steps, 'tokens_per_second': speed}
    values['data_wait'] = data_wait
    values |= source_losses(self._sources, found)
    routing = routing_metrics(load)
    values |= achieved | routing | gradients
    details = router_scalars(self._routers, values)
    pictures = self._pictures(step, routing)
    self._writer.write(step, 'train', values, details, pictures)
    self.say(
      terminal.progress_line(
        step,
        self._steps,
        loss,
        speed,
        (self._steps - step) * self._tokens_per_step / speed,
        achieved.get('mfu'),
        data_wait,
        _busiest(routing),
      )
    )
    self._results['train'] = {'loss': loss}

  def event(
    self, step: int, split: str, values: Mapping[str, Any], text: str
  ) -> None:
    """Writes what happened at a step, and says it."""
    self._writer.write(step, split, values)
    self.say(text)

  def went_back(self, step: int, values: Mapping[str, Any], text: str) -> None:
    """Drops what was written of later steps, and tells why.

    The line is of the step that follows, so that it goes where a run resumes
    from that checkpoint, which will do again what it did.

    Args:
      step: The step of the checkpoint.
      values: What to write of it.
      text: What to say.
    """
    self._noted = None
    self._writer.close()
    self._writer = self._open(resume_step=step)
    self.event(step + 1, saved.ROLLBACK, values, text)
    self._read_at, self._since, self._paused = step, time.perf_counter(), 0.0
    self._first_seconds = math.nan

  def evaluation(
    self,
    step: int,
    results: Mapping[str, Mapping[str, Any]],
    seconds: float,
  ) -> None:
    """Writes an evaluation.

    Args:
      step: The number of steps done.
      results: What was found of everything that was evaluated, by its name: its
        metrics, and `text` where there is something to be read.
      seconds: How long it took, as a pause of the training.
    """
    self._paused += seconds
    for name, found in results.items():
      self._writer.write(step, name, found)
      metrics = {key: value for key, value in found.items() if key != 'text'}
      told = f': {terminal.metrics_text(metrics)}' if metrics else ''
      self.say(f'step {step}  {name}{told} ({terminal.duration(seconds)})')
      if text := found.get('text'):
        self._writer.text(name, text, step)
        self.say(text)
      if 'loss' in metrics and not math.isfinite(metrics['loss']):
        self.say(terminal.not_finite(name, metrics['loss'], step))
      if metrics:
        self._results[name] = metrics

  def sample(self, step: int, text: str) -> None:
    """Writes what the model has written after so many steps."""
    self._writer.text('sample', text, step)
    self.say(f'step {step}  sample: {errors.printable(text)}')

  def summary(self, done: int) -> str:
    """Returns the last numbers as a short table, and how far the run is."""
    if self._start >= self._steps:
      return (
        f'nothing to do: {self._start} steps are done, of train.steps ='
        f' {self._steps}'
      )
    elapsed = time.perf_counter() - self._began
    stopped = f', stopped at step {done} of {self._steps}'
    table = terminal.results_table(self._results) + '\n'
    return (
      (table if self._results else '')
      + f'{done - self._start} steps in {terminal.duration(elapsed)}'
      + (stopped if done < self._steps else '')
    )

  def _pictures(
    self, step: int, routing: Mapping[str, Any]
  ) -> dict[str, np.ndarray]:
    """Returns the load of all experts as a picture, at every 100th of a run."""
    place = step * _PICTURES // self._steps
    if not routing or place == self._pictured:
      return {}
    self._pictured = place
    return {'expert_load': load_map(routing['expert_counts'])}

  def _pace(self, step: int) -> tuple[float, float]:
    """Returns tokens a second, and the share of the time in which data lacked.

    Both are of the time since the last reading, pauses left out. For the first
    step, before which nothing was read, that includes compilation.
    """
    waited, self._waited_before = (
      self._waited - self._waited_before,
      self._waited,
    )
    if step == self._start + 1 and math.isfinite(self._first_seconds):
      seconds = self._first_seconds
      return self._tokens_per_step / seconds, min(waited / seconds, 1.0)
    now = time.perf_counter()
    seconds = max(now - self._since - self._paused, 1e-9)
    tokens = (step - self._read_at) * self._tokens_per_step
    self._read_at, self._since, self._paused = step, now, 0.0
    return tokens / seconds, min(waited / seconds, 1.0)


def _busiest(routing: Mapping[str, Any]) -> tuple[float, int] | None:
  """Returns what a progress line says of the experts; None without any."""
  if not routing:
    return None
  return float(routing['max_load'].max()), int(routing['idle_experts'].sum())
