"""What a run says about itself: metrics.jsonl, TensorBoard and plain text."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorboardX

from moe_jax.errors import UserError
from moe_jax.training import workdir as workdir_lib


class MetricsWriter:
  """Appends to DIR/metrics.jsonl and to the event files in DIR/tensorboard.

  One JSON object a line, `step` and `split` first. Floats are written so that
  reading gives back the same bits. JSON has no infinities and no NaN: they
  are the strings "Infinity", "-Infinity" and "NaN", which `float` (and
  JavaScript's `Number`) turn back. Every line is flushed as it is written.
  """

  def __init__(
    self, workdir: str, resume_step: int | None, active: bool = True
  ) -> None:
    """Opens the files and takes back what a resumed run will write again.

    Args:
      workdir: the run's directory, which exists.
      resume_step: the step of the checkpoint gone on from; what was written
        of later steps is dropped. None: a new start; everything is dropped.
      active: False writes nothing: for every process but one.

    Raises:
      UserError: metrics.jsonl has a line that is not JSON, not being the last.
    """
    self._active = active
    if not active:
      return
    last_step = -1 if resume_step is None else resume_step
    path = os.path.join(workdir, 'metrics.jsonl')
    _forget_after(path, last_step)
    self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115 (closed below)
    self._events = tensorboardX.SummaryWriter(
      os.path.join(workdir, 'tensorboard'),
      purge_step=last_step + 1,
      # Files are named by the second: two starts within one need the suffix.
      filename_suffix=f'.{last_step + 1}',
    )

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Writes one line; a scalar also to TensorBoard, as `split/name`.

    Args:
      step: steps done.
      split: 'train', or the name of an evaluation.
      values: numbers, or arrays of them, such as one per layer; on the
        device or not.
    """
    if not self._active:
      return
    plain = {name: np.asarray(value).tolist() for name, value in values.items()}
    row = {'step': step, 'split': split} | {
      name: _encodable(value) for name, value in plain.items()
    }
    self._file.write(json.dumps(row, allow_nan=False) + '\n')
    self._file.flush()
    for name, value in plain.items():
      if isinstance(value, int | float):
        self._events.add_scalar(f'{split}/{name}', value, step)

  def close(self) -> None:
    """Closes the files; what was written last is then on disk."""
    if self._active:
      self._file.close()
      self._events.close()


def progress_line(
  step: int,
  steps: int,
  loss: float,
  tokens_per_second: float,
  seconds_left: float,
  mfu: float | None = None,
) -> str:
  """`step 120/1000  12%  loss 3.4512  45.2k tokens/s  1m20s left`.

  Before the time left stands `38.1% MFU`, where that is known.
  """
  width = len(str(steps))
  used = '' if mfu is None else f'  {mfu:.1%} MFU'
  return (
    f'step {step:{width}}/{steps}  {step / steps:4.0%}  loss {loss:.4f}'
    f'  {_short(tokens_per_second)} tokens/s{used}'
    f'  {duration(seconds_left)} left'
  )


def duration(seconds: float) -> str:
  """`1d02h`, `3h05m`, `1m20s` or `7s`; `?` if it cannot be told."""
  if not math.isfinite(seconds):
    return '?'
  whole = round(seconds)
  for unit, name, part, part_name in (
    (86_400, 'd', 3600, 'h'),
    (3600, 'h', 60, 'm'),
    (60, 'm', 1, 's'),
  ):
    if whole >= unit:
      return f'{whole // unit}{name}{whole % unit // part:02}{part_name}'
  return f'{whole}s'


def summary_table(rows: Sequence[Sequence[str]]) -> str:
  """A plain-text table; the first row is its head.

  The first column is set to the left, the others, numbers mostly, to the
  right.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '  '.join(
      [
        row[0].ljust(widths[0]),
        *(
          cell.rjust(width)
          for cell, width in zip(row[1:], widths[1:], strict=True)
        ),
      ]
    ).rstrip()
    for row in rows
  ]
  rule = '  '.join('-' * width for width in widths)
  return '\n'.join([lines[0], rule, *lines[1:]])


def _forget_after(path: str, last_step: int) -> None:
  """Drops the lines of steps after `last_step` and a last line cut short."""
  if not os.path.exists(path):
    return
  with open(path, encoding='utf-8', errors='replace') as file:
    lines = file.read().splitlines()
  kept = []
  for number, line in enumerate(lines, start=1):
    try:
      step = json.loads(line)['step']
    except (ValueError, TypeError, KeyError) as error:
      if number == len(lines):
        break
      raise UserError(
        f'{path}:{number} is not a JSON object with a step; mend or remove it'
      ) from error
    if step <= last_step:
      kept.append(line)
  workdir_lib.replace(path, ''.join(f'{line}\n' for line in kept))


def _encodable(value: Any) -> Any:
  """The value with the floats that JSON lacks as strings."""
  if isinstance(value, list):
    return [_encodable(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return (
      'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'
    )
  return value


def _short(number: float) -> str:
  """Three digits or so: 950, 45.2k, 1.34M."""
  for unit, name in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if number >= unit:
      return f'{number / unit:.3g}{name}'
  return f'{number:.0f}'
