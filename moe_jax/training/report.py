"""What a run tells its user: numbers made readable, and where they go."""

import math
import time
from typing import Any

import jax
import numpy as np

from moe_jax.data.pipeline import TokenSequences
from moe_jax.errors import UserError
from moe_jax.model import sizes
from moe_jax.model.build import compute_dtype
from moe_jax.parallel import multihost
from moe_jax.routing.balance import Load
from moe_jax.training import metrics as metrics_lib
from moe_jax.training import peaks
from moe_jax.training.metrics import MetricsWriter
from moe_jax.training.state import Setup


def routing_metrics(load: Load | None) -> dict[str, Any]:
  """What the routers did in a step, per layer.

  Args:
    load: numpy or jax arrays with leading axes [layers, S], or None.

  Returns:
    Lists with one number per MoE layer, the worst or mean of its sub-layers:
    `max_load` (rows of the busiest expert over the balanced share; 1 is
    perfect), `idle_experts` (experts that no token chose), `router_entropy`
    (nats per token; log N is uniform) and `dropped_share` (of slots). Where
    devices exchange slots through buffers that may be too small, also
    `exchange_overflows`: slots of all sub-layers that took the slower way.
  """
  if load is None:
    return {}
  load = jax.tree.map(np.asarray, load)
  slots = np.maximum(load.counts_N.sum(-1), 1.0)
  tokens = np.maximum(load.tokens, 1.0)
  max_load = load.counts_N.max(-1) * load.counts_N.shape[-1] / slots
  metrics = {
    'max_load': max_load.max(1),
    'idle_experts': (load.counts_N == 0).sum((1, 2)),
    'router_entropy': (load.entropy / tokens).mean(1),
    'dropped_share': (load.dropped / slots).max(1),
  }
  if load.overflowed is not None:
    metrics['exchange_overflows'] = load.overflowed.sum(1)
  return metrics


def describe(setup: Setup, sequences: TokenSequences) -> str:
  """Model, devices and data of a run, one line each."""
  config, mesh = setup.config, setup.mesh
  counts = sizes.count_parameters(config, setup.abstract['params'])
  device = next(iter(mesh.devices.flat))
  axes = ' x '.join(f'{name} {size}' for name, size in mesh.shape.items())
  processes = (
    ''
    if multihost.is_single_process()
    else f', {jax.process_count()} processes'
  )
  epochs = config.train.steps * config.train.batch_size / len(sequences)
  return (
    f'model    {counts.total:,} parameters,'
    f' {counts.active:,} active per token\n'
    f'devices  {mesh.size} {device.device_kind} ({axes}){processes}\n'
    f'data     {config.data.name}: {sequences.num_tokens:,} tokens,'
    f' {epochs:.2f} epochs in {config.train.steps} steps'
  )


class Journal:
  """Writes a run's progress: metrics.jsonl, TensorBoard and the terminal.

  The metrics of a step are noted while it runs and written once the next one
  has been dispatched, so that reading them does not leave the device idle.
  """

  def __init__(self, setup: Setup, workdir: str, start: int):
    config = setup.config
    self._steps = config.train.steps
    self._tokens_per_step = config.train.batch_size * config.data.seq_len
    params = setup.abstract['params']
    self._flops_per_token = sizes.flops_per_token(config, params)
    self._devices = list(setup.mesh.devices.flat)
    self._dtype = str(compute_dtype(config, setup.mesh))
    self._start = self._read_at = start
    self._active = multihost.is_main_process()
    self._writer = MetricsWriter(workdir, start or None, self._active)
    self._began = self._since = time.perf_counter()
    self._first_seconds = math.nan
    self._paused = 0.0
    self._noted: tuple[int, dict[str, Any]] | None = None
    self._results: dict[str, list[str]] = {}

  def __enter__(self) -> 'Journal':
    return self

  def __exit__(self, *_: object) -> None:
    self._writer.close()

  def say(self, text: str) -> None:
    """Prints on one process of the run."""
    if self._active:
      print(text, flush=True)

  def compiled(self, metrics: dict[str, Any]) -> None:
    """Waits for the first step, whose time is compilation, not training."""
    jax.block_until_ready(metrics)
    now = time.perf_counter()
    self._first_seconds = now - self._began
    self.say(f'first step after {metrics_lib.duration(self._first_seconds)}')
    self._read_at, self._since = self._start + 1, now

  def note(self, step: int, metrics: dict[str, Any]) -> None:
    """Keeps the metrics of a step that has just been dispatched."""
    self._noted = step, metrics

  def write(self) -> None:
    """Writes what was noted, if anything; waits for that step to end.

    Raises:
      UserError: the loss is not finite.
    """
    if self._noted is None:
      return
    (step, metrics), self._noted = self._noted, None
    load = metrics.pop('load')
    values = {name: float(value) for name, value in metrics.items()}
    loss = check_finite(values['loss'], step)
    speed = self._tokens_per_second(step)
    achieved = peaks.utilisation(
      speed * self._flops_per_token, self._devices, self._dtype
    )
    values |= {'tokens_per_second': speed} | achieved | routing_metrics(load)
    self._writer.write(step, 'train', values)
    left = (self._steps - step) * self._tokens_per_step / speed
    self.say(
      metrics_lib.progress_line(
        step, self._steps, loss, speed, left, achieved.get('mfu')
      )
    )
    self._results['train'] = [f'{loss:.4f}', '', '']

  def evaluation(
    self, step: int, split: str, result: dict[str, float], seconds: float
  ) -> None:
    """Writes an evaluation that took `seconds`, a pause of the training."""
    self._paused += seconds
    self._writer.write(step, split, result)
    self.say(
      f'step {step}  {split}: loss {result["loss"]:.4f},'
      f' {result["bits_per_byte"]:.4f} bits per byte'
      f' ({metrics_lib.duration(seconds)})'
    )
    self._results[split] = [
      f'{result["loss"]:.4f}',
      f'{result["perplexity"]:.3f}',
      f'{result["bits_per_byte"]:.4f}',
    ]

  def summary(self, done: int) -> str:
    """The last losses as a short table, and how far the run has come."""
    if self._start >= self._steps:
      return (
        f'nothing to do: {self._start} steps are done, of train.steps ='
        f' {self._steps}'
      )
    head = ['split', 'loss', 'perplexity', 'bits per byte']
    rows = [[split, *cells] for split, cells in self._results.items()]
    elapsed = time.perf_counter() - self._began
    stopped = f', stopped at step {done} of {self._steps}'
    return (
      metrics_lib.summary_table([head, *rows])
      + f'\n{done - self._start} steps in {metrics_lib.duration(elapsed)}'
      + (stopped if done < self._steps else '')
    )

  def _tokens_per_second(self, step: int) -> float:
    """Since the last reading, pauses left out.

    For the first step, which nothing was read before, compilation included.
    """
    if step == self._start + 1:
      return self._tokens_per_step / self._first_seconds
    now = time.perf_counter()
    seconds = max(now - self._since - self._paused, 1e-9)
    tokens = (step - self._read_at) * self._tokens_per_step
    self._read_at, self._since, self._paused = step, now, 0.0
    return tokens / seconds


def check_finite(loss: float, step: int) -> float:
  """Returns the loss.

  Raises:
    UserError: it is not finite.
  """
  if not math.isfinite(loss):
    raise UserError(
      f'the loss is {loss} at step {step}: training has diverged; lower'
      ' optimizer.learning_rate or raise optimizer.warmup_steps'
    )
  return loss
