"""Traces of some steps of a run, for TensorBoard and Perfetto."""

import os
import sys
from typing import Any

import jax

from moe_jax.config import profiled_steps
from moe_jax.errors import said


class Profiler:
  """Writes a trace of the steps that `train.profile` names to DIR/profile.

  Every process of a run writes its own. `tensorboard --logdir=DIR` opens it
  with TensorBoard's profile plugin, and ui.perfetto.dev the file
  `perfetto_trace.json.gz` in it. A trace that cannot be written is told of, and
  the run goes on.
  """

  def __init__(self, steps: str, workdir: str) -> None:
    """Plans a trace.

    Args:
      steps: The validated value of `train.profile`.
      workdir: The directory of the run.
    """
    self._steps = profiled_steps(steps)
    self._folder = os.path.join(workdir, 'profile')
    self._is_tracing = False

  def __enter__(self) -> 'Profiler':
    return self

  def __exit__(self, *_: object) -> None:
    self._stop()

  def start(self, step: int) -> None:
    """Begins the trace if `step`, the next to run, is one of those named."""
    if step in self._steps and not self._is_tracing:
      jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
      self._is_tracing = True

  def stop(self, step: int, metrics: Any) -> None:
    """Ends the trace after the last of its steps, whose end it waits for.

    Args:
      step: The step that was dispatched last.
      metrics: What it returns.
    """
    if self._is_tracing and step + 1 not in self._steps:
      jax.block_until_ready(metrics)
      self._stop()

  def _stop(self) -> None:
    if not self._is_tracing:
      return
    self._is_tracing = False
    try:
      jax.profiler.stop_trace()
    except (OSError, RuntimeError) as error:  # a full disk, in XLA's words too
      print(
        f'note: {self._folder} has no whole trace: {said(error)[:200]}',
        file=sys.stderr,
      )
